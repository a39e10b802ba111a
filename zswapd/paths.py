# SPDX-License-Identifier: GPL-2.0-or-later
"""Where things are by default, for those who must not import the table of settings to know it."""

from __future__ import annotations

SOCKET = "/run/zswapd/zswapd.sock"
"""The control socket: zswapctl is to answer at once, and the table takes a sixth of its time to import."""
