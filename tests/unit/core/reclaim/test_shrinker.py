# SPDX-License-Identifier: GPL-2.0-or-later
"""shrinker: when it evicts, how much, how long at a time, and when the cache may grow again.

Over a cache that is a number.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd.core.reclaim.pressure import Marks
from zswapd.core.reclaim.shrinker import (
    AT_ONCE,
    BATCH_S,
    CALM_S,
    GROW_S,
    PLENTY_DIVISOR,
    STALL_PART,
    Shrinker,
)

FINE = Marks(above_low=900, above_high=500, spare=500)
BETWEEN = Marks(above_low=100, above_high=-300, spare=0)
LOW = Marks(above_low=-10, above_high=-410, spare=0)
TOTAL = 100_000


class Cache:
    """`frames` frames in runs of one length, the time to evict a run, and a clock."""

    def __init__(self, frames: int, *, run: int = 1, cost_s: float = 0.0) -> None:
        self.frames, self.run, self.cost_s, self.now = frames, run, cost_s, 1000.0
        self.limit_frames = 0

    def evict(self, count: int) -> int:
        assert count > 0
        before = self.frames
        while self.frames and before - self.frames < count:
            self.now += self.cost_s
            self.frames -= min(self.run, self.frames)
        return before - self.frames

    def shrinker(self) -> Shrinker:
        return Shrinker(
            self, lambda: self.frames, total_frames=TOTAL, limit_frames=1000, clock=lambda: self.now
        )


def run_out(shrinker: Shrinker) -> int:
    """Do all the work there is and return the number of batches."""
    batches = 0
    while shrinker.has_work:
        shrinker.batch()
        batches += 1
    return batches


@pytest.mark.parametrize("marks", [FINE, BETWEEN])
def test_nothing_is_evicted_while_memory_is_above_the_low_mark(marks: Marks) -> None:
    shrinker = Cache(800).shrinker()
    shrinker.look(marks)
    assert not shrinker.has_work
    assert shrinker.statistics().shrinks == {
        "low_memory": 0,
        "stalled": 0,
        "limit": 0,
        "command": 0,
    }


def test_below_the_low_mark_what_is_missing_to_the_high_one_goes() -> None:
    cache = Cache(800)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    run_out(shrinker)
    assert cache.frames == 800 - 411
    assert shrinker.statistics().evicted_frames == 411


def test_between_the_marks_it_goes_on_until_above_the_high_one_and_then_no_further() -> None:
    cache = Cache(1000)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    run_out(shrinker)
    shrinker.look(BETWEEN)  # others took what was given back
    assert shrinker.has_work
    run_out(shrinker)
    shrinker.look(FINE)
    assert not shrinker.has_work
    shrinker.look(BETWEEN)
    assert not shrinker.has_work
    assert shrinker.statistics().shrinks["low_memory"] == 1


def test_a_recovery_in_the_middle_of_it_stops_it() -> None:
    cache = Cache(1000, cost_s=2 * BATCH_S)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    shrinker.batch()
    shrinker.look(FINE)
    assert not shrinker.has_work
    assert cache.frames == 1000 - AT_ONCE


def test_a_batch_ends_in_time_and_says_how_long_it_was() -> None:
    cache = Cache(1000, run=8, cost_s=BATCH_S / 3.9)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    assert shrinker.batch() == 4 * 8
    seen = shrinker.statistics()
    assert seen.longest_batch_s == pytest.approx(BATCH_S, rel=0.03)
    assert (seen.evicted_frames, seen.batches) == (32, 1)


def test_a_stall_costs_a_part_of_the_cache_each_time() -> None:
    cache = Cache(800)
    shrinker = cache.shrinker()
    shrinker.look(FINE, stalled=True)
    run_out(shrinker)
    assert cache.frames == 800 - 800 // STALL_PART
    shrinker.look(FINE, stalled=False)
    assert not shrinker.has_work


def test_a_stall_beside_plenty_of_free_memory_is_a_cgroups_own() -> None:
    shrinker = Cache(800).shrinker()
    shrinker.look(
        Marks(above_low=TOTAL, above_high=TOTAL, spare=TOTAL // PLENTY_DIVISOR), stalled=True
    )
    assert not shrinker.has_work


def test_an_empty_cache_has_nothing_to_give_and_counts_nothing() -> None:
    shrinker = Cache(0).shrinker()
    shrinker.look(LOW, stalled=True)
    assert not shrinker.has_work
    assert sum(shrinker.statistics().shrinks.values()) == 0


def test_a_command_evicts_so_many_whatever_the_marks_say() -> None:
    cache = Cache(800)
    shrinker = cache.shrinker()
    shrinker.ask(50)
    shrinker.look(FINE)
    run_out(shrinker)
    assert cache.frames == 750
    shrinker.ask(10_000)
    run_out(shrinker)
    assert cache.frames == 0
    assert not shrinker.has_work


def test_a_command_for_more_than_there_is_does_not_take_what_comes_later() -> None:
    cache = Cache(800, cost_s=BATCH_S)  # no batch finds the cache empty: the last one ends in time
    shrinker = cache.shrinker()
    shrinker.ask(10_000)
    run_out(shrinker)
    assert cache.frames == 0
    cache.frames = 500
    assert not shrinker.has_work
    shrinker.ask(400)
    cache.frames = 0  # let go of meanwhile, with its volume
    shrinker.look(FINE)
    cache.frames = 500
    assert not shrinker.has_work


def test_a_limit_that_was_lowered_is_reached_without_a_put() -> None:
    cache = Cache(800)
    shrinker = cache.shrinker()
    shrinker.limit_frames = 300
    shrinker.look(FINE)
    run_out(shrinker)
    shrinker.look(FINE)
    assert cache.frames == 300
    assert not shrinker.has_work
    assert shrinker.statistics().shrinks["limit"] == 1


def test_what_was_given_back_may_be_taken_again_only_after_a_calm_time() -> None:
    cache = Cache(1000)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    run_out(shrinker)
    left = cache.frames
    shrinker.look(FINE)
    assert shrinker.ceiling_frames == left
    cache.now += CALM_S / 2
    shrinker.look(BETWEEN)
    cache.now += CALM_S / 2 - 0.01
    shrinker.look(FINE)
    assert shrinker.ceiling_frames == left


def test_it_grows_again_little_by_little_up_to_the_limit() -> None:
    cache = Cache(1000)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    run_out(shrinker)
    shrinker.look(FINE)
    cache.now += CALM_S
    shrinker.look(FINE)
    seen = []
    for _ in range(int(GROW_S)):
        cache.now += 1.0
        shrinker.look(FINE)
        seen.append(shrinker.ceiling_frames)
    assert seen == sorted(seen)
    assert seen[0] < 1000 == seen[-1]


@pytest.mark.parametrize("ceiling", [0, 300, 1000, 5000])
def test_a_successor_begins_with_the_ceiling_that_was_left(ceiling: int) -> None:
    cache = Cache(0)
    shrinker = cache.shrinker()
    shrinker.recall(ceiling)
    assert shrinker.ceiling_frames == cache.limit_frames == min(ceiling, 1000)
    cache.now += CALM_S - 0.1
    shrinker.look(FINE)
    assert shrinker.ceiling_frames == min(ceiling, 1000)
    for _ in range(int(GROW_S) + 1):
        cache.now += 1.0
        shrinker.look(FINE)
    assert shrinker.ceiling_frames == 1000


def test_it_does_not_grow_below_the_high_mark() -> None:
    cache = Cache(1000)
    shrinker = cache.shrinker()
    shrinker.look(LOW)
    run_out(shrinker)
    shrinker.look(FINE)
    ceiling = shrinker.ceiling_frames
    for _ in range(100):
        cache.now += 1.0
        shrinker.look(BETWEEN)
    assert shrinker.ceiling_frames == ceiling


def test_the_ceiling_is_the_evictions_limit() -> None:
    cache = Cache(1000)
    shrinker = cache.shrinker()
    assert cache.limit_frames == 1000
    shrinker.look(LOW)
    run_out(shrinker)
    assert cache.limit_frames == shrinker.ceiling_frames == cache.frames
    cache.limit_frames = 500  # a configuration is applied
    shrinker.limit_frames = 500
    assert cache.limit_frames == 500


def test_a_new_limit_holds_at_once() -> None:
    shrinker = Cache(1000).shrinker()
    shrinker.limit_frames = 400
    assert shrinker.ceiling_frames == 400
    shrinker.limit_frames = 2000
    assert shrinker.ceiling_frames == 2000


@given(
    st.lists(
        st.tuples(
            st.integers(-500, 500),
            st.integers(0, 400),
            st.booleans(),
            st.floats(0, 10),
            st.integers(0, 200),
        ),
        max_size=30,
    )
)
def test_whatever_happens_ceiling_and_counts_stay_right(
    looks: list[tuple[int, int, bool, float, int]],
) -> None:
    cache = Cache(1000, run=3, cost_s=BATCH_S / 7)
    shrinker = cache.shrinker()
    evicted = 0
    for above_low, gap, stalled, pause, put in looks:
        cache.now += pause
        added = max(0, min(put, shrinker.ceiling_frames - cache.frames))
        cache.frames += added
        marks = Marks(above_low, above_low - gap, max(0, above_low - gap))
        before = cache.frames
        shrinker.look(marks, stalled=stalled)
        run_out(shrinker)
        evicted += before - cache.frames
        assert 0 <= shrinker.ceiling_frames <= shrinker.limit_frames
        assert marks.above_low < 0 or stalled or shrinker.statistics().evicted_frames == evicted
    assert shrinker.statistics().evicted_frames == evicted
