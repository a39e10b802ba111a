# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs: runs of frames that are being populated or given back to the system, by a thread that may block (see pageframes.py).

A job's frames are on no book between `begin_refill` or `begin_trim` and `commit`, so its thread shares them with nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zswapd import crashpoints
from zswapd.crashpoints import reach

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.allocators.arena import Arena


@dataclass(slots=True)
class Job:
    """Runs of frames to be populated or given back; made by `begin_refill` and `begin_trim`, ended by `commit`."""

    populate: bool
    page_size: int
    chunk_frames: int
    runs: list[tuple[int, int]] = field(default_factory=list)
    companions: list[Callable[[int, int], None]] = field(default_factory=list)
    """See `PageFrames.accompany`."""
    done: int = 0
    """How many of the runs the work got through."""

    def work(self, arena: Arena) -> None:
        """Populate or punch the runs, in any thread; stops at the first failure, `commit` then undoes the rest.

        Raises:
            ArenaError: the system has no memory to give.
        """
        for first, count in self.runs:
            if self.populate:
                # The whole chunk's part of the table: coalescing looks at a run's neighbours.
                for populate in (arena.populate_table, *self.companions):
                    populate(first - first % self.chunk_frames, self.chunk_frames)
                reach(crashpoints.REFILL_TABLE)
                arena.populate(first * self.page_size, count * self.page_size)
                reach(crashpoints.REFILL_POPULATED)
            else:
                arena.punch(first * self.page_size, count * self.page_size)
                reach(crashpoints.TRIM_PUNCHED)
            self.done += 1
