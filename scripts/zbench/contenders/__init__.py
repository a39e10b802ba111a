# SPDX-License-Identifier: GPL-2.0-or-later
"""The swap devices that are compared, one plug-in each.

A new contender is a module with a subclass of `Contender` and a line in `REGISTRY`; rounds, table, JSON and
the figures to hold know contenders by name only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Contender, MemoryUse
from .nbdkit import NbdkitZstd
from .ramfile import LoopRam
from .zram import ZramLz4
from .zswapd import Zswapd

if TYPE_CHECKING:
    from collections.abc import Callable

REGISTRY: dict[str, Callable[[], Contender]] = {
    LoopRam.name: LoopRam,
    ZramLz4.name: ZramLz4,
    NbdkitZstd.name: NbdkitZstd,
    Zswapd.name: Zswapd,
}
"""Name → maker, in the order of the table."""

__all__ = ["REGISTRY", "Contender", "MemoryUse"]
