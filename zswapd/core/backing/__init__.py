# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk behind the pool: one slot for each page of each swap file, on a file or a block device.

`store` opens it and makes requests, `_disk` does them, `transfers` keeps order among what is under
way, and `health` knows whether the device works. None of them knows what a page means: which slots
hold data is core/block/slotmap.py's, who may read or write one core/block/backed.py's business.
"""
