# SPDX-License-Identifier: GPL-2.0-or-later
"""The allocators by their names in the configuration; each half may use either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool

if TYPE_CHECKING:
    from zswapd.core.allocators.lru import Lru
    from zswapd.core.allocators.pageframes import PageFrames


def make_allocator(
    name: str, frames: PageFrames, half: int, lru: Lru | None, *, max_zspage_frames: int
) -> ZsPool | ZbudPool:
    """Return a new allocator.

    Args:
        name: "zsmalloc" or "zbud".
        frames: the source of its runs.
        half: the half of its runs, see Allocator.
        lru: keeps the order of use of its runs; None to keep no order.
        max_zspage_frames: see ZsPool. Runs of zbud are single frames.

    Raises:
        ValueError: there is no allocator of that name.
    """
    if name == "zbud":
        return ZbudPool(frames, half, lru)
    if name == "zsmalloc":
        return ZsPool(frames, half, lru, max_zspage_frames=max_zspage_frames)
    raise ValueError(f"there is no allocator {name!r}")
