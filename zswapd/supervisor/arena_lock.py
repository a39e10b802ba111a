# SPDX-License-Identifier: GPL-2.0-or-later
"""The lock that keeps an arena in memory after a worker's death.

It is needed where the kernel has neither a noswap tmpfs (Linux 6.4) nor a locked segment
(core/allocators/segment.py), so for an arena that a program before this one has made.

The kernel does not swap out pages of a memfd while a process has them mapped and locked. A worker
locks them, and its locks end with it. Until the next worker has locked them, the kernel could swap
the arena out to the device that no worker serves. So the supervisor maps the arena too. Its mapping
is locked on fault, like all its memory (mlockall). Each look faults in what the worker has
populated since the last one.

Limit: only the worker locks pages that were populated since the last look (LOOK_S in
supervisor.py). They are the youngest pages of the arena, which reclaim takes last. A tool that
pages memory out proactively (DAMON, memory.reclaim) may take them between two workers. The daemon
then waits for itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zswapd.core.allocators.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Mapping


class ArenaLock:
    """The supervisor's mapping of an arena, if the arena needs a lock.

    Args:
        fd: the arena's descriptor. The caller keeps it.
        copy: see `Arena.adopt`.

    Raises:
        ArenaError: the file is no arena, or cannot be mapped.
    """

    def __init__(self, fd: int, copy: Mapping[str, Any] | None = None) -> None:
        arena = Arena.adopt(os.dup(fd), copy)
        self._arena: Arena | None = arena
        if arena.is_unevictable:
            arena.close()
            self._arena = None

    def lock(self) -> int:
        """Lock all populated pages of the arena; return their bytes, 0 if it needs no lock."""
        arena = self._arena
        if arena is None:
            return 0
        held = 0
        for begin, end in arena.data_runs(0, arena.total_frames * arena.page_size):
            arena.map_in(begin, end - begin)
            held += end - begin
        return held

    def close(self) -> None:
        """Unmap the arena."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None
