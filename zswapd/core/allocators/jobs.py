# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs: runs of frames that a thread populates or punches (see pageframes.py).

The thread may block. A job's frames are removed from all counts and lists between `begin_refill` or
`begin_trim` and `commit`. So the thread shares them with no other user.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zswapd.core import crashpoints
from zswapd.core.crashpoints import reach
from zswapd.errors import ArenaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.allocators.arena import Arena


LEISURE_S = 0.05
"""Time, s, for which the thread of a job with a floor is an idle task (`_populate.c`).

It counts for the whole job. A job of many runs would otherwise be idle again with each run, and
would take 0.5 s on a machine with busy processors.
"""


def at_the_watermarks() -> ArenaError:
    """Return the error of a job that stops to leave the system its remaining free memory."""
    return ArenaError(
        "the system's free memory is at its watermarks",
        hint="the reserve is refilled when the system has more free memory",
    )


@dataclass(slots=True)
class Job:
    """Runs of frames to populate or punch.

    `begin_refill` and `begin_trim` make a job. `commit` ends it.
    """

    populate: bool
    page_size: int
    chunk_frames: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    companions: list[Callable[[int, int], None]] = field(default_factory=list)
    """See `PageFrames.accompany`."""
    done: int = 0
    """The number of runs that are populated or punched."""
    committed: int = 0
    """The number of runs whose result was entered (`PageFrames.take_finished`)."""
    is_hurried: bool = False
    """True if a store waits: the thread is no idle task any more. Any thread may set it."""

    def work(self, arena: Arena, floor: int = 0) -> None:
        """Populate or punch the runs, in any thread.

        Stops at the first failure. `commit` then restores the remaining runs.

        Args:
            arena: the arena of the frames.
            floor: stop populating once the system has fewer free bytes than this.

        Raises:
            ArenaError: the system has no memory, or not more than `floor`.
        """
        if not self.populate:
            self._punch(arena)
            return
        leisure_ends = time.monotonic() + LEISURE_S
        for place, (first, count) in enumerate(self.runs):
            # Populate the chunk's whole part of the table: coalescing reads a run's neighbours.
            for populate in (arena.populate_table, *self.companions):
                populate(first - first % self.chunk_frames, self.chunk_frames)
            reach(crashpoints.REFILL_TABLE)
            populated = (
                arena.populate(
                    first * self.page_size,
                    count * self.page_size,
                    floor=floor,
                    is_idle=floor > 0 and not self.is_hurried and time.monotonic() < leisure_ends,
                )
                // self.page_size
            )
            reach(crashpoints.REFILL_POPULATED)
            if populated < count:
                self.runs[place : place + 1] = [
                    (first, populated),
                    (first + populated, count - populated),
                ][not populated :]
                self.done += populated > 0
                raise at_the_watermarks()
            self.done += 1

    def _punch(self, arena: Arena) -> None:
        self.done = arena.punch_runs(self.runs)
        reach(crashpoints.TRIM_PUNCHED)
        for first, count in self.runs[self.done :]:
            # This call raises the error that ended punch_runs.
            arena.punch(first * self.page_size, count * self.page_size)
            self.done += 1
