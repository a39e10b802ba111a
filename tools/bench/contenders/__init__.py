# SPDX-License-Identifier: GPL-2.0-or-later
"""The swap devices that are compared, one plug-in each.

A new contender is a module with a subclass of `Contender` and a line in `_ALL`; rounds, table, JSON and
the figures to hold know contenders by name only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Contender, MemoryUse
from .nbdkit import NbdkitZstd
from .ramfile import LoopRam
from .swapfile import NoSwap, SlowFile, SwapFile
from .zram import ZramLz4, ZramLzoRle
from .zswapd import Zswapd, ZswapdFour, ZswapdTwo

if TYPE_CHECKING:
    from collections.abc import Callable

_ALL: tuple[type[Contender], ...] = (
    NoSwap,
    SlowFile,
    SwapFile,
    LoopRam,
    ZramLzoRle,
    ZramLz4,
    NbdkitZstd,
    Zswapd,
    ZswapdTwo,
    ZswapdFour,
)

REGISTRY: dict[str, Callable[[], Contender]] = {maker.name: maker for maker in _ALL}
"""Name → maker, in the order of the table."""

__all__ = ["REGISTRY", "Contender", "MemoryUse"]
