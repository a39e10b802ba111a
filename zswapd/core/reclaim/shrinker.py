# SPDX-License-Identifier: GPL-2.0-or-later
"""The shrinker: when the cache returns memory, how much, and when it may grow again.

This module decides; worker/shrink.py waits. The cache shrinks for one of four reasons:

- `low_memory`: free memory is below the low watermark. The cache shrinks until free memory is above
  the high watermark, as kswapd does.
- `stalled`: tasks wait for memory (PSI). The cache loses 1/8 at a time, since the stall may have
  another cause. With plenty of spare memory it loses nothing. Then the tasks are at the limit of
  their own memory cgroup, and freed memory would not help them.
- `limit`: the limit was lowered, and the cache is above it.
- `command`: `zswapctl shrink N`.

The cache shrinks in batches of BATCH_S. No page is served during a batch, and requests get a turn
between two batches. Runs are evicted whole, least recently used first, so every eviction frees
memory.

After a shrink the cache must not grow beyond its present size (`ceiling_frames`). The ceiling rises
again after CALM_S, while free memory is above the high watermark. It reaches the limit in GROW_S at
the earliest. Otherwise the next reader would take the freed memory, while the tasks that need it
still wait.

Invariants: no frame is evicted while memory is above its marks, no task stalls and no command
asks. A batch ends after BATCH_S plus one run.
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
"""Length of a batch in seconds.

A run of small objects may take a few milliseconds more, since it is evicted whole.
"""
AT_ONCE = 16
"""Frames between two reads of the clock: about 35 µs."""
PLENTY_DIVISOR = 16
"""With 1/16 of all memory to spare, a stall has another cause."""
STALL_PART = 8
"""A stall evicts 1/8 of the cache."""
CALM_S = 5.0
"""Seconds of enough memory before the cache may grow again."""
GROW_S = 10.0
"""Minimum seconds for the growth from nothing to the limit."""
REASONS = ("low_memory", "stalled", "limit", "command")


@dataclass(frozen=True, slots=True)
class ShrinkerStatistics:
    """Counters of the shrinker.

    Attributes:
        shrinks: shrinks that began, by reason.
        evicted_frames: frames that were freed, in whole runs.
        batches: batches in which they were freed.
        batch_seconds: total time of the batches; no page was served in it.
        longest_batch_s: time of the longest batch.
        ceiling_frames: frames that the cache may hold at present.
        limit_frames: frames that the cache may hold when memory is plentiful.
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
    """An evictor, such as `eviction.Eviction`."""

    limit_frames: int

    def evict(self, count: int) -> int:
        """Free at least `count` frames in whole runs, if there are as many; return how many."""


class Shrinker:
    """The policy over one cache.

    Args:
        eviction: evicts the least recently used runs. The shrinker sets its limit.
        cached: returns the frames that the cache holds.
        total_frames: frames of the machine.
        limit_frames: frames that the cache may hold when memory is plentiful.
        clock: returns monotonic seconds.

    Attributes:
        limit_frames: frames that the cache may hold when memory is plentiful; settable at any time.
        ceiling_frames: frames that the cache may hold at present.
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
        """Frames that the cache may hold at present."""
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
        """Continue with a predecessor's ceiling.

        If the ceiling is below the limit, it rises only after CALM_S.
        """
        if ceiling_frames < self._limit:
            self.ceiling_frames = ceiling_frames
            self._restless_at = self._clock()

    def look(self, marks: Marks, *, stalled: bool = False, on_the_way: int = 0) -> None:
        """Record how much memory there is, and decide what `batch` will do.

        Args:
            marks: free memory against the watermarks.
            stalled: whether tasks waited for memory since the last look.
            on_the_way: evicted frames that will soon be free memory.
        """
        cached, now = self._cached(), self._clock()
        self._asked = min(self._asked, cached)  # frames may have gone for another reason
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
        """Evict `frames` more frames, on command. Frames that come later do not count."""
        self._shrinks["command"] += 1
        self._asked = min(self._asked + frames, self._cached())

    @property
    def evicted_frames(self) -> int:
        """Frames that were freed, for any reason."""
        return self._frames

    @property
    def has_frames(self) -> bool:
        """Whether the cache holds any frames."""
        return self._cached() > 0

    @property
    def has_work(self) -> bool:
        """Whether the cache holds frames and has a reason to evict some."""
        return max(self._missing, self._asked) > 0 and self._cached() > 0

    def batch(self) -> int:
        """Evict runs for BATCH_S, or until enough is freed; return the frames that were freed."""
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
