# SPDX-License-Identifier: GPL-2.0-or-later
"""When a worker counts as hanging, by a clock that the test turns."""

from __future__ import annotations

import pytest

from zswapd.supervisor.watchdog import MOST_DOUBLINGS, START_S, Watchdog

GIB = 1 << 30


def watching(
    limit: float = 10,
    *,
    size: int = GIB,
    is_forked: bool = False,
    is_building: bool = False,
    early_deaths: int = 0,
) -> Watchdog:
    watch = Watchdog(limit, size)
    watch.begin(
        100.0, (0, 0), is_forked=is_forked, is_building=is_building, early_deaths=early_deaths
    )
    return watch


@pytest.mark.parametrize("size", [GIB >> 4, 64 * GIB])
@pytest.mark.parametrize("serves", [True, False])
def test_silence_is_as_long_during_a_takeover_as_in_service_however_much_there_is(
    size: int, serves: bool
) -> None:
    watch = watching(size=size)
    assert not watch.has_expired(109.9, (0, 0), serves=serves)
    assert watch.has_expired(110.0, (0, 0), serves=serves)


def test_takeover_that_comes_along_may_take_as_long_as_it_likes() -> None:
    watch = watching()
    for second in range(0, 1000, 9):
        assert not watch.has_expired(100.0 + second, (second, 0), serves=False)
    assert watch.silence(1100.0, (1000, 0)) == 0
    assert watch.has_expired(1110.0, (1000, 0), serves=False)


def test_requests_are_signs_of_life_too() -> None:
    watch = watching()
    assert not watch.has_expired(111.0, (0, 1), serves=True)


def test_one_that_is_forked_on_the_spot_may_look_for_memory_first() -> None:
    watch = watching(is_forked=True, size=8 * GIB)
    assert not watch.has_expired(99.9 + START_S, (0, 0), serves=False)
    assert watch.has_expired(100.0 + START_S, (0, 0), serves=False)
    watch = watching(is_forked=True)
    assert not watch.has_expired(101.0, (1, 0), serves=False)
    assert watch.has_expired(111.0, (1, 0), serves=False), "it has found it, and hangs"


def test_building_takes_as_long_as_there_is_to_populate() -> None:
    watch = watching(is_building=True, size=3 * GIB)
    assert not watch.has_expired(99.9 + 4 * START_S, (0, 0), serves=False)
    assert watch.has_expired(100.0 + 4 * START_S, (0, 0), serves=False)


@pytest.mark.parametrize(("deaths", "times"), [(1, 2), (3, 8), (50, 1 << MOST_DOUBLINGS)])
def test_who_follows_one_that_was_ended_too_soon_gets_more_time(deaths: int, times: int) -> None:
    watch = watching(early_deaths=deaths)
    assert not watch.has_expired(99.9 + 10 * times, (0, 0), serves=False)
    assert watch.has_expired(100.0 + 10 * times, (0, 0), serves=False)
    assert watch.has_expired(100.0 + 10 * times, (0, 0), serves=True)


def test_time_in_which_nobody_looked_does_not_count() -> None:
    watch = watching()
    watch.ignore(30)
    assert not watch.has_expired(139.9, (0, 0), serves=True)
    assert watch.has_expired(140.0, (0, 0), serves=True)


def test_without_a_limit_nobody_hangs() -> None:
    assert not watching(0).has_expired(1e9, (0, 0), serves=True)
