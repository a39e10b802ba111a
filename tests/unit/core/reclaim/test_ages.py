# SPDX-License-Identifier: GPL-2.0-or-later
"""How long ago pages were stored, told from the serial numbers of stores."""

from __future__ import annotations

import json
import os

import pytest

from tests.support.snapshots import make, make_core
from zswapd.core.cache import CachedRuns
from zswapd.core.reclaim.ages import BOUNDS_S, NOTES, SAMPLE, StoreAges

MASK = 0xFFFFFFFF


class Device:
    """Pages by number, with the serial numbers of their stores."""

    def __init__(self, pages: int, first: int = 0) -> None:
        self.pages = pages
        self.serials = [0] * pages
        self.newest = first

    def store(self, number: int) -> None:
        self.newest = self.newest % MASK + 1
        self.serials[number] = self.newest

    def generation(self, number: int) -> int:
        return self.serials[number]


class Clock:
    """Time that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(ages: StoreAges, clock: Clock, seconds: float) -> None:
    """Let time pass, with a look a second while that is no more than a thousand.

    Else a thousand in all.
    """
    step = max(seconds / 1000, 1.0)
    end = clock.now + seconds
    while clock.now < end:
        clock.now += step
        ages.look()


def filled(first: int = 0) -> tuple[Device, Clock, StoreAges]:
    """Return eight pages of each class.

    Stored two days, five hours, half an hour, five minutes ago, and now.
    """
    device, clock = Device(40, first), Clock()
    ages = StoreAges([device], lambda: device.newest, clock=clock)
    ages.look()
    for place, pause in enumerate((86400 * 2, 3600 * 5, 1800, 300, 0)):
        for number in range(place * 8, place * 8 + 8):
            device.store(number)
        run(ages, clock, pause)
    return device, clock, ages


def test_each_class_has_its_pages() -> None:
    _, _, ages = filled()
    assert ages.sample() == (8, 8, 8, 8, 8)


def test_serial_numbers_may_begin_anew() -> None:
    _, _, ages = filled(MASK - 20)
    assert ages.sample() == (8, 8, 8, 8, 8)


def test_a_successor_goes_on_with_the_notes() -> None:
    device, clock, ages = filled()
    left = json.loads(json.dumps(ages.remember()))
    assert sum(map(len, left)) <= len(BOUNDS_S) * (NOTES + 3)
    successor = StoreAges([device], lambda: device.newest, clock=clock)
    successor.recall(left)
    successor.look()
    assert successor.sample() == (8, 8, 8, 8, 8)
    ignorant = StoreAges([device], lambda: device.newest, clock=clock)
    ignorant.look()
    assert ignorant.sample() == (40, 0, 0, 0, 0)


def test_a_sample_is_no_longer_for_a_large_device() -> None:
    device = Device(SAMPLE * 50)
    device.serials = [1] * device.pages
    looks = []
    device.generation = lambda number: looks.append(number) or 1  # type: ignore[func-returns-value,method-assign]
    ages = StoreAges([device], lambda: 1, clock=Clock())
    assert sum(ages.sample()) == SAMPLE
    ages.sample()
    assert len(set(looks)) == 2 * SAMPLE


def test_a_core_has_them() -> None:
    core = make_core(30)
    core.ages.look()
    assert (
        sum(sum(core.statistics().store_ages) for _ in range(4)) == 30
    )  # a quarter of the places each
    assert core.statistics(ages_sampled=False).store_ages == ()
    core.close()


@pytest.mark.parametrize("allocator", ["zbud", "zsmalloc"])
def test_the_runs_of_a_cache_are_as_old_as_their_pages(allocator: str) -> None:
    core = make(cache__limit="4M", cache__allocator=allocator)
    assert core.cache
    cache, clock = core.cache, Clock()
    runs = CachedRuns(cache.lru, cache.allocator, cache.zbuds)
    ages = StoreAges([runs], lambda: cache.zbuds.newest, places=runs.pages, clock=clock)
    volume = cache.cleancache.init_fs()
    ages.look()
    for number in range(40):
        cache.cleancache.put_page(volume, 2, number, memoryview(os.urandom(1500) + bytes(2596)))
        if number == 19:
            for pause in (5, 90):
                clock.now += pause
                ages.look()
    young, old, *rest = ages.sample()
    assert young + old == cache.lru.entries
    assert min(young, old) > cache.lru.entries // 4
    assert not any(rest)
    assert cache.statistics().ages
    assert cache.statistics(ages_sampled=False).ages == ()
    while cache.eviction.evict(1):
        assert sum(ages.sample()) <= cache.lru.entries
    assert sum(ages.sample()) == 0
    core.close()
