# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs: runs of frames that are being populated or given back to the system.

By a thread that may block (see pageframes.py).

A job's frames are on no book between `begin_refill` or `begin_trim` and `commit`, so its thread
shares them with nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zswapd.core import crashpoints
from zswapd.core.crashpoints import reach
from zswapd.errors import ArenaError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.allocators.arena import Arena


def at_the_watermarks() -> ArenaError:
    """Return the error of a job that leaves the system the memory it has."""
    return ArenaError(
        "the system's free memory is at its watermarks",
        hint="the reserve is filled when there is more",
    )


@dataclass(slots=True)
class Job:
    """Runs of frames to be populated or given back.

    Made by `begin_refill` and `begin_trim`, ended by `commit`.
    """

    populate: bool
    page_size: int
    chunk_frames: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    companions: list[Callable[[int, int], None]] = field(default_factory=list)
    """See `PageFrames.accompany`."""
    done: int = 0
    """How many of the runs the work got through."""

    def work(self, arena: Arena, floor: int = 0) -> None:
        """Populate or punch the runs, in any thread.

        Stops at the first failure, `commit` then undoes the rest.

        Args:
            arena: where they are.
            floor: populate no more once the system has fewer free bytes than this.

        Raises:
            ArenaError: the system has no memory to give, or no more above `floor`.
        """
        if not self.populate:
            self._punch(arena)
            return
        for place, (first, count) in enumerate(self.runs):
            # The whole chunk's part of the table: coalescing looks at a run's neighbours.
            for populate in (arena.populate_table, *self.companions):
                populate(first - first % self.chunk_frames, self.chunk_frames)
            reach(crashpoints.REFILL_TABLE)
            populated = (
                arena.populate(first * self.page_size, count * self.page_size, floor=floor)
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
            arena.punch(
                first * self.page_size, count * self.page_size
            )  # says why it could not be done before
            self.done += 1
