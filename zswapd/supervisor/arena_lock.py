# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps an arena locked in memory beyond a worker's life.

Where the kernel has no noswap tmpfs (before Linux 6.4).

Pages of a memfd are safe from swap while a process has them mapped and locked. A worker does; when
it dies its locks go with it, and until the next one has them the kernel may swap out pages of the
arena, to the very device that nobody serves. So the supervisor maps the arena as well. Its mapping
is locked on fault, like all its memory (mlockall); what the worker has populated since is faulted
in here at every look.

Limit: pages populated since the last look (LOOK_S in supervisor.py) are locked by the worker only.
They are the youngest of the arena, which reclaim takes last.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zswapd.core.allocators.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Mapping


class ArenaLock:
    """Holds an arena's pages in memory, if that takes a lock.

    Args:
        fd: the arena's descriptor, which stays the caller's.
        copy: see `Arena.adopt`.

    Raises:
        ArenaError: it is no arena that can be mapped.
    """

    def __init__(self, fd: int, copy: Mapping[str, Any] | None = None) -> None:
        arena = Arena.adopt(os.dup(fd), copy)
        self._arena: Arena | None = arena
        if arena.kind != "memfd":
            arena.close()
            self._arena = None

    def lock(self) -> int:
        """Lock what the arena holds now; return its bytes, 0 where no lock is needed."""
        arena = self._arena
        if arena is None:
            return 0
        held = 0
        for begin, end in arena.data_runs(0, arena.total_frames * arena.page_size):
            arena.map_in(begin, end - begin)
            held += end - begin
        return held

    def close(self) -> None:
        """Let go of the mapping."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None
