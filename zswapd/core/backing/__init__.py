# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk behind the pool: a file or block device with one slot for each page of each swap file.

`store` opens the file or device and makes requests. `_disk` carries the requests out. `transfers`
orders the requests under way. `health` knows whether the device works. None of them knows which
slots hold data: that is in core/block/slotmap.py. Access rules for a slot are in
core/block/backed.py.
"""
