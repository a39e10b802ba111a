# SPDX-License-Identifier: GPL-2.0-or-later
"""The page: its size, and the arithmetic that several layers share.

The size is the system's (4096, 16384 or 65536 bytes), because the kernel swaps its own pages.
Layers below the composition root take `page_size` as a plain value. So tests run all three sizes on
one machine.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

from zswapd.host import machine

ADDRESS_SPACE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | machine.numbers().map_noreserve
"""Flags of a mapping of the largest size that may be needed, of which little is populated.

Without MAP_NORESERVE, the kernel would count the whole mapping as memory, and refuse a fork of a
process with several of them.
"""

PAGE_SIZE: int = os.sysconf("SC_PAGE_SIZE")
"""Bytes in a page of this system."""


def round_down(value: int, unit: int) -> int:
    """Return the largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit
