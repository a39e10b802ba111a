# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: its messages (`protocol`), path (`listener`), server and client.

`server` is the daemon's side and uses trio. `client` is zswapctl's side and does not.
"""
