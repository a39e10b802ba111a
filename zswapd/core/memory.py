# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory that the next stores need, and whether a refill or the disk can bring it.

A store takes frames and index nodes from populated reserves. Writes come faster than a refill
populates frames: 4 KiB in 8 µs against 1 to 2 µs, but the refill runs in another thread, which may
wait for a processor or for the GIL. So the reserve is empty now and then while the system has
plenty of memory. A write that waits some milliseconds is then better than one that is refused.

A pool at its limit with a disk behind it sends each page to the disk. Each page takes a transfer
buffer there. All buffers are in use while pages come faster than the disk takes them. Then the
write waits as for any other disk: until buffers are free, or until the disk is in trouble.

Limits: the need of a write is estimated from above. A page may need a new zspage of up to 8 frames,
but many pages share one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

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
        has_room: returns whether the pool's limits allow a number of further frames.
        is_disk_busy: returns whether a write of a number of pages should wait for buffers of the
            disk behind the pool; None without a disk.

    Attributes:
        waits_for_disk: what was missing at the last `is_short` are buffers of the disk.
    """

    def __init__(
        self,
        frames: PageFrames,
        nodes: Objnodes,
        *,
        has_room: Callable[[int], bool],
        is_disk_busy: Callable[[int], bool] | None,
    ) -> None:
        self._frames = frames
        self._nodes = nodes
        self._pool_has_room = has_room
        self._is_disk_busy = is_disk_busy
        self.waits_for_disk = False
        self._given_up_at = -1

    def is_short(self, pages: int) -> bool:
        """Return whether a store of `pages` pages should wait.

        It should if a refill can bring what is missing. A pool at its limit is not short: a refill
        does not help it. With a disk, a store should wait for the disk's buffers then.
        Neither is the reserve short after `give_up`.
        """
        frames, nodes = self._frames, self._nodes
        if self._is_disk_busy is not None:
            self.waits_for_disk = self._is_disk_busy(pages) and not self._has_room(pages)
            if self.waits_for_disk:
                return True
        if self._given_up_at >= 0 and self._is_given_up():
            return False
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

    def _has_room(self, pages: int) -> bool:
        """Return whether the pool can take all pages, with the reserve or after a refill."""
        needed = min(pages * FRAMES_PER_PAGE, pages + FRAMES_EXTRA)
        frames = self._frames
        if frames.table.long_frames < needed and (not frames.can_grow() or self._is_given_up()):
            return False
        return self._pool_has_room(needed)

    def _refilled(self) -> int:
        """Return a number that grows when a refill brings memory."""
        return self._frames.refilled_frames + self._nodes.populated

    def give_up(self) -> None:
        """Let no write wait for a refill until one brings memory: a write waited in vain."""
        self._given_up_at = self._refilled()

    def _is_given_up(self) -> bool:
        return self._given_up_at == self._refilled()

    def await_refill(self) -> None:
        """Make the refill begin, or go on, as fast as it can: a write waits for it."""
        if not self.waits_for_disk:
            self._frames.await_refill()

    def end_wait(self) -> None:
        """Note that no write waits any more, so that the next refill keeps to the watermarks."""
        self._frames.is_awaited = False
