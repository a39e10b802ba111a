# SPDX-License-Identifier: GPL-2.0-or-later
"""The swap devices to compare, one plug-in each.

A new contender is a module with a subclass of `Contender` and a line in `_ALL`; rounds, table, JSON
and the figures to hold know contenders by name only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.contenders.base import Contender, MemoryUse
from tools.bench.contenders.nbdkit import NbdkitZstd
from tools.bench.contenders.ramfile import LoopRam
from tools.bench.contenders.swapfile import NoSwap, SlowFile, SwapFile
from tools.bench.contenders.zram import ZramLz4, ZramLzoRle
from tools.bench.contenders.zswapd import Zswapd, ZswapdFour, ZswapdTwo

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
"""The class of each contender by its name, in the order of the table."""

__all__ = ["REGISTRY", "Contender", "MemoryUse"]
