# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory that the next stores need, and whether a refill can bring it.

A store takes frames and index nodes from populated reserves. Writes come faster than a refill
populates frames: 4 KiB in 8 µs against 1 to 2 µs, but the refill runs in another thread, which may
wait for a processor or for the GIL. So the reserve is empty now and then while the system has
plenty of memory. A write that waits some milliseconds is then better than one that is refused.

Limits: the need of a write is estimated from above. A page may need a new zspage of up to 8 frames,
but many pages share one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.tmem.objnodes import Objnodes

FRAMES_EXTRA: Final = 256
"""Frames for new zspages, beside one frame for each page."""
FRAMES_PER_PAGE: Final = 8
"""Frames that a single page may take: the longest zspage by default."""
PAGES_PER_NODE: Final = 32
NODES_EXTRA: Final = 16
"""Index nodes of a write: half as many slots in use as there are, and the nodes above them."""


class StoreMemory:
    """The reserves that stores take from.

    Args:
        frames: the page frames.
        nodes: the index nodes of the persistent half.
    """

    def __init__(self, frames: PageFrames, nodes: Objnodes) -> None:
        self._frames = frames
        self._nodes = nodes

    def is_short(self, pages: int) -> bool:
        """Return whether a store of `pages` pages should wait: a refill can bring what is missing.

        A pool at its limit is not short: a refill does not help it.
        """
        frames, nodes = self._frames, self._nodes
        needed_nodes = pages // PAGES_PER_NODE + NODES_EXTRA
        if frames.table.long_frames >= pages + FRAMES_EXTRA and nodes.available() >= needed_nodes:
            return False
        needed = min(pages * FRAMES_PER_PAGE, pages + FRAMES_EXTRA, frames.reserve_target // 2)
        if frames.table.long_frames < needed:
            frames.take_finished()
            if (
                frames.table.long_frames < needed
                and frames.can_grow()
                and frames.used_frames - frames.ephemeral_frames < frames.limit_frames
            ):
                return True
        return nodes.available() < needed_nodes and nodes.can_grow()

    def progress(self) -> int:
        """Return a number that changes when a refill has brought memory."""
        return self._frames.refilled_frames + self._nodes.populated

    def await_refill(self) -> None:
        """Make the refill begin, or go on, as fast as it can: a write waits for it."""
        self._frames.await_refill()

    def end_wait(self) -> None:
        """Note that no write waits any more, so that the next refill keeps to the watermarks."""
        self._frames.is_awaited = False
