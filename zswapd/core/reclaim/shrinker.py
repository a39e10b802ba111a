# SPDX-License-Identifier: GPL-2.0-or-later
"""shrinker: when the cache gives memory back, how much, and when it may grow again.

Decides; worker/shrink.py waits.

The cache is a second chance, and its memory anybody's who needs it. Two signals, and whoever runs
the box, make it shrink:

- `low_memory`: free memory is below the low watermark. The cache shrinks until it is above the high
  one, as kswapd does.
- `stalled`: tasks wait for memory (PSI). An eighth of the cache a time, since they may wait for
  something else; not at all while there is memory to spare: then they are at the limit of their own
  memory cgroup, and nothing given back would end that.
- `limit`: the cache is above its limit, which was lowered.
- `command`: `zswapctl shrink N`.

It shrinks in batches of BATCH_S, in which no page is served; between two of them everybody has his
turn. Runs go least recently used first, each as a whole, so that every eviction frees memory.

After a shrink the cache may hold no more than it was left with (`ceiling_frames`). CALM_S later,
and while free memory is above the high watermark, that grows again, to its limit in GROW_S:
otherwise what is given back would be taken again by the next reader, while those for whom it was
meant still wait.

Invariants: evicts nothing while memory is above its marks and nobody waits or asks; a batch ends
after BATCH_S and one run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zswapd import counters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zswapd.core.reclaim.pressure import Marks

BATCH_S = 0.001
"""Time that a batch takes.

A run of small objects may take a few milliseconds more: it goes whole or not at all.
"""
AT_ONCE = 16
"""Frames between two looks at the clock: some 35 µs."""
PLENTY_DIVISOR = 16
"""With 1/16 of all memory to spare, a stall has another cause."""
STALL_PART = 8
"""One part in so many of the cache goes for a stall."""
CALM_S = 5.0
"""How long there must have been enough memory before the cache may grow again."""
GROW_S = 10.0
"""How long it takes from nothing to its limit then, at least."""
REASONS = ("low_memory", "stalled", "limit", "command")


@dataclass(frozen=True, slots=True)
class ShrinkerStatistics:
    """What was given back, and why.

    Attributes:
        shrinks: times it began, by reason.
        evicted_frames: frames that were freed, by whole runs.
        batches: pieces in which that was done.
        batch_seconds: time they took together; no page was served in it.
        longest_batch_s: the longest of them.
        ceiling_frames: frames that the cache may hold now.
        limit_frames: that it may hold when memory is plentiful.
    """

    shrinks: Mapping[str, int]
    evicted_frames: int
    batches: int
    batch_seconds: float
    longest_batch_s: float
    ceiling_frames: int
    limit_frames: int


counters.declare(
    ShrinkerStatistics,
    cumulative="shrinks evicted_frames batches batch_seconds",
    high_water="longest_batch_s",
)


class Evicting(Protocol):
    """What evicts; `eviction.Eviction` is one."""

    limit_frames: int

    def evict(self, count: int) -> int:
        """Free at least `count` frames, if there are as many, by whole runs; return how many."""


class Shrinker:
    """The policy over one cache.

    Args:
        eviction: evicts the least recently used runs. Its limit is set to `ceiling_frames` from
            here on.
        cached: returns the frames that the cache holds.
        total_frames: of the machine.
        clock: monotonic, seconds.

    Attributes:
        limit_frames: frames that the cache may hold when memory is plentiful; settable at any time.
        ceiling_frames: frames that it may hold now.
    """

    def __init__(
        self,
        eviction: Evicting,
        cached: Callable[[], int],
        *,
        total_frames: int,
        limit_frames: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._eviction, self._cached, self._clock = eviction, cached, clock
        self._plenty = total_frames // PLENTY_DIVISOR
        self._limit = limit_frames
        self.ceiling_frames = limit_frames
        self._is_low = False
        self._missing = self._asked = 0
        self._last_look = self._restless_at = clock() - CALM_S
        self._shrinks = dict.fromkeys(REASONS, 0)
        self._frames = self._batches = 0
        self._seconds = self._longest = 0.0

    @property
    def ceiling_frames(self) -> int:
        """Frames that the cache may hold now."""
        return self._ceiling

    @ceiling_frames.setter
    def ceiling_frames(self, frames: int) -> None:
        self._ceiling = self._eviction.limit_frames = frames

    @property
    def limit_frames(self) -> int:
        """Frames that the cache may hold when memory is plentiful."""
        return self._limit

    @limit_frames.setter
    def limit_frames(self, frames: int) -> None:
        self.ceiling_frames = frames if self._ceiling >= self._limit else min(self._ceiling, frames)
        self._limit = frames

    def recall(self, ceiling_frames: int) -> None:
        """Go on where a predecessor was.

        With its ceiling, and a calm time before that rises if it is below the limit.
        """
        if ceiling_frames < self._limit:
            self.ceiling_frames = ceiling_frames
            self._restless_at = self._clock()

    def look(self, marks: Marks, *, stalled: bool = False, on_the_way: int = 0) -> None:
        """Take note of how much memory there is; decides what `batch` will do.

        Args:
            marks: free memory against the watermarks.
            stalled: whether tasks waited for memory since the last look.
            on_the_way: frames that were evicted and will be free memory soon.
        """
        cached, now = self._cached(), self._clock()
        self._asked = min(self._asked, cached)  # some of it may have gone for another reason
        if marks.above_low < 0 and not self._is_low:
            self._is_low = True
            self._shrinks["low_memory"] += cached > 0
        elif marks.above_high > 0:
            self._is_low = False
        stall_counts = stalled and marks.spare < self._plenty
        if stall_counts and cached:
            self._shrinks["stalled"] += 1
            self._asked = max(self._asked, -(-cached // STALL_PART))
        if cached > self._limit and not self._asked:
            self._shrinks["limit"] += 1
            self._asked = cached - self._limit
        self._missing = max(0, 1 - marks.above_high - on_the_way) if self._is_low else 0
        if self._is_low or stall_counts:
            self._restless_at = now
            self.ceiling_frames = min(self.ceiling_frames, cached)
        elif marks.above_high > 0 and now - self._restless_at >= CALM_S:
            elapsed = min(now - self._last_look, now - self._restless_at - CALM_S)
            grown = int(self._limit * elapsed / GROW_S) + 1
            self.ceiling_frames = min(self._limit, self.ceiling_frames + grown)
        self._last_look = now

    def ask(self, frames: int) -> None:
        """Have `frames` more evicted, by somebody's command.

        As many as there are, not those that come later.
        """
        self._shrinks["command"] += 1
        self._asked = min(self._asked + frames, self._cached())

    @property
    def evicted_frames(self) -> int:
        """Frames that were freed, whoever asked for it."""
        return self._frames

    @property
    def has_frames(self) -> bool:
        """Whether the cache holds any."""
        return self._cached() > 0

    @property
    def has_work(self) -> bool:
        """Whether there is something to evict, and a reason."""
        return max(self._missing, self._asked) > 0 and self._cached() > 0

    def batch(self) -> int:
        """Evict runs for BATCH_S, or until what is wanted is done.

        Return the frames that were freed.
        """
        began = now = self._clock()
        wanted, freed = max(self._missing, self._asked), 0
        while freed < wanted and now - began < BATCH_S:
            frames = self._eviction.evict(min(AT_ONCE, wanted - freed))
            if not frames:
                self._missing = self._asked = 0
                break
            freed += frames
            now = self._clock()
        self._missing = max(0, self._missing - freed)
        self._asked = max(0, self._asked - freed)
        self._frames += freed
        self._batches += 1
        self._seconds += now - began
        self._longest = max(self._longest, now - began)
        if self._is_low:
            self.ceiling_frames = min(self.ceiling_frames, self._cached())
        return freed

    def statistics(self) -> ShrinkerStatistics:
        """Return a frozen snapshot."""
        return ShrinkerStatistics(
            shrinks=dict(self._shrinks),
            evicted_frames=self._frames,
            batches=self._batches,
            batch_seconds=self._seconds,
            longest_batch_s=self._longest,
            ceiling_frames=self.ceiling_frames,
            limit_frames=self._limit,
        )
