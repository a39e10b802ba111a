# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules for ephemeral pages.

(docs/coherency.md, 2 to 6), each a test over every back end that may keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.fakes import FakePam
from tests.support.stack import build
from tests.support.strategies import KINDS, page
from zswapd.core.frontends.cleancache import MAX_INODE, MAX_PAGE, Cleancache
from zswapd.core.pam.base import Pam, RejectReason
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem
from zswapd.errors import CorruptedPageError

INODE = 5


class Cache:
    """A cleancache, one pool in it, and what is below.

    Attributes:
        room: what `make_room` says.
        damage: changes every page that is kept.
    """

    def __init__(
        self,
        pam: Pam,
        tmem: Tmem,
        page_size: int,
        check: Callable[[], None],
        damage: Callable[[], None],
        *,
        shared: bool,
    ) -> None:
        self.page_size = page_size
        self.room: RejectReason | None = None
        self.front = Cleancache(tmem, pam, lambda: self.room)
        self.pool = self.front.init_shared_fs() if shared else self.front.init_fs()
        self.tmem = tmem
        self.pam = pam
        self._check = check
        self.damage = damage

    def put(
        self, index: int, kind: str = "words", seed: int = 1, *, inode: int = INODE
    ) -> RejectReason | None:
        return self.front.put_page(
            self.pool, inode, index, memoryview(page(kind, seed, self.page_size))
        )

    def get(self, index: int, *, inode: int = INODE, keep: bool = False) -> bytes | None:
        out = bytearray(self.page_size)
        return (
            bytes(out)
            if self.front.get_page(self.pool, inode, index, memoryview(out), keep=keep)
            else None
        )

    def check(self) -> None:
        self.tmem.check()
        self._check()


@pytest.fixture(params=["fake", "zv-zsmalloc", "zbuds-zbud", "zbuds-zsmalloc"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Cache]]:
    """Build a cache over this back end; everything about it is proved at the end."""
    made: list[tuple[Cache, Callable[[], None]]] = []

    def make_cache(*, shared: bool = False, page_size: int = 4096) -> Cache:
        if request.param == "fake":
            pam, tmem = FakePam(page_size), Tmem(Objnodes(20_000, reserve=600))
            cache = Cache(
                pam,
                tmem,
                page_size,
                lambda: None,
                lambda: setattr(pam, "get", _damaged),
                shared=shared,
            )
            made.append((cache, lambda: None))
        else:
            backend, ephemeral = request.param.split("-")
            stack = build(page_size, ephemeral=ephemeral)
            pam = stack.zv if backend == "zv" else stack.cache.zbuds

            def damage() -> None:
                for pampd in stack.tmem.pampds(pam):
                    stack.arena.view[pampd + 40] ^= 1

            cache = Cache(pam, stack.tmem, page_size, stack.check, damage, shared=shared)
            made.append((cache, stack.close))
        return cache

    yield make_cache
    for cache, close in made:
        cache.check()
        close()


@pytest.fixture
def cache(make: Callable[..., Cache]) -> Cache:
    return make()


@pytest.mark.parametrize("kind", KINDS)
def test_coherency_rule_5_a_cleancache_get_takes_the_page_out(cache: Cache, kind: str) -> None:
    if cache.put(7, kind) is RejectReason.COMPRESS_POOR:
        assert kind in ("poor", "noise"), "the others gain something by being kept"
        cache.front = Cleancache(cache.tmem, cache.pam, lambda: None)
        cache.pool = cache.front.init_fs()
        assert cache.put(7, "half") is None
        kind = "half"
    assert cache.get(7) == page(kind, 1, cache.page_size)
    assert cache.get(7) is None
    assert cache.tmem.pool_pages(cache.pool) == 0
    statistics = cache.front.statistics()
    assert (statistics.puts, statistics.succ_gets, statistics.failed_gets, statistics.pages) == (
        1,
        1,
        1,
        0,
    )


def test_coherency_rule_5_pages_stay_in_a_shared_pool_and_for_who_asks(
    make: Callable[..., Cache],
) -> None:
    for cache, keep in ((make(shared=True), False), (make(), True)):
        cache.put(7)
        for _ in range(3):
            assert cache.get(7, keep=keep) == page("words", 1, cache.page_size)
        assert cache.front.statistics().pages == 1


@pytest.mark.parametrize("second", KINDS)
def test_coherency_rule_4_put_put_get_never_gives_the_first_cleancache(
    cache: Cache, second: str
) -> None:
    assert cache.put(7, "half", 1) is None
    if cache.put(7, second, 2) is None:
        assert cache.get(7) == page(second, 2, cache.page_size)
    else:
        assert second in ("poor", "noise")
    assert cache.get(7) is None, "the first must not show behind the second"


def test_coherency_rule_4_after_a_failed_get_gets_fail_until_a_put_cleancache(cache: Cache) -> None:
    for index in (6, 8, 7 + (1 << 32)):
        cache.put(index)
    cache.put(7, inode=INODE + 1)
    for _ in range(3):
        assert cache.get(7) is None
    cache.put(7, "half", 3)
    assert cache.get(7) == page("half", 3, cache.page_size)


@pytest.mark.parametrize("why", ["no room", "frozen", "back end"])
def test_coherency_rule_2_refused_put_leaves_nothing_stale(
    cache: Cache, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(7)
    cache.put(8)
    expected = RejectReason.FROZEN
    if why == "no room":
        cache.room = expected = RejectReason.POOL_LIMIT_HIT
    elif why == "frozen":
        cache.front.freeze()
    else:
        expected = RejectReason.COMPRESS_POOR
        monkeypatch.setattr(cache.tmem._pools[cache.pool], "pam", Refusing(cache.pam))
    assert cache.put(7, seed=2) is expected
    assert cache.get(7) is None
    assert cache.get(8) == page("words", 1, cache.page_size), "its neighbour has to stay"
    monkeypatch.undo()
    cache.room = None
    cache.front.thaw()
    assert cache.get(7) is None
    assert cache.put(7, seed=3) is None
    statistics = cache.front.statistics()
    assert (statistics.puts, statistics.failed_puts, statistics.rejects) == (
        3,
        1,
        {expected.name.lower(): 1},
    )


class Refusing:
    """A back end that keeps what it has and takes nothing."""

    def __init__(self, pam: Pam) -> None:
        self.get, self.free, self.key_of = pam.get, pam.free, pam.key_of

    def create(self, *_: object, replacing: bool) -> int:
        return -RejectReason.COMPRESS_POOR


def test_coherency_rule_3_what_is_invalidated_is_gone_and_nothing_else(cache: Cache) -> None:
    other = cache.front.init_fs()
    indexes = [0, 1, 2, 3, 4, 100, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, MAX_PAGE]
    for inode in (INODE, INODE + 1):
        for index in indexes:
            assert cache.put(index, inode=inode) is None
    cache.front.put_page(other, INODE, 0, memoryview(page("words", 1, cache.page_size)))
    front, pool = cache.front, cache.pool
    assert front.invalidate_page(pool, INODE, 0)
    assert not front.invalidate_page(pool, INODE, 0)
    assert front.invalidate_range(pool, INODE, 2, 4) == 3
    assert front.invalidate_range(pool, INODE, (1 << 32) - 1, 1 << 32) == 2
    assert {index for index in indexes if cache.get(index, keep=True)} == {
        1,
        100,
        (1 << 32) + 1,
        MAX_PAGE,
    }
    assert front.invalidate_inode(pool, INODE) == 4
    assert not [index for index in indexes if cache.get(index)]
    assert len([index for index in indexes if cache.get(index, inode=INODE + 1, keep=True)]) == len(
        indexes
    )
    assert front.invalidate_fs(pool) == len(indexes)
    assert front.statistics().invalidates == 20
    assert front.pages(other) == 1, "another file system's stay"
    with pytest.raises(ValueError, match="no file system"):
        front.get_page(pool, INODE, 1, memoryview(bytearray(cache.page_size)))
    assert front.init_fs() == pool, "its number is free again"
    assert front.pages(pool) == 0


def test_pages_go_some_at_a_time_wherever_they_are(cache: Cache) -> None:
    indexes = [*range(0, 100, 3), 70_000, (1 << 32) - 1, 1 << 32, (1 << 40) + 5, MAX_PAGE]
    for index in indexes:
        assert cache.put(index) is None
    assert cache.put(3, inode=INODE + 1) is None
    other = cache.front.init_fs()
    assert (
        cache.front.put_page(other, INODE, 3, memoryview(page("words", 1, cache.page_size))) is None
    )
    left = len(indexes) + 1
    while left:
        assert cache.front.invalidate_some(cache.pool, 7) == min(left, 7)
        left -= min(left, 7)
        assert cache.front.pages(cache.pool) == left
        assert sum(cache.get(index, keep=True) is not None for index in indexes) in (left, left - 1)
        cache.check()
    assert cache.front.invalidate_some(cache.pool, 7) == 0
    assert cache.front.statistics().invalidates == len(indexes) + 1
    assert cache.front.pages(other) == 1


def test_file_above_16_tib_is_kept_apart_and_what_cannot_be_named_is_refused(cache: Cache) -> None:
    """Pages whose numbers differ by a multiple of 2**32 are different pages."""
    indexes = [3 + (segment << 32) for segment in (0, 1, 2, 255, 65535)]
    for seed, index in enumerate(indexes):
        assert cache.put(index, seed=seed) is None
    for seed, index in enumerate(indexes):
        assert cache.get(index) == page("words", seed, cache.page_size)
    for inode, index in (
        (INODE, MAX_PAGE + 1),
        (INODE, 3 + (1 << 64)),
        (MAX_INODE + 1, 3),
        (INODE + (1 << 64), 3),
    ):
        cache.put(3)
        assert cache.put(index, inode=inode) is RejectReason.INDEX_LIMIT
        assert cache.get(index, inode=inode) is None
        assert not cache.front.invalidate_page(cache.pool, inode, index)
        assert cache.get(3) is not None
    assert cache.put(MAX_PAGE, inode=MAX_INODE) is None
    assert cache.front.invalidate_inode(cache.pool, MAX_INODE) == 1


def test_damaged_page_is_a_miss_and_does_not_come_back(cache: Cache) -> None:
    cache.put(7)
    cache.damage()
    assert cache.get(7, keep=True) is None
    statistics = cache.front.statistics()
    assert (statistics.damaged, statistics.failed_gets, statistics.pages) == (1, 1, 0)


def _damaged(*_: object) -> None:
    raise CorruptedPageError("says the test")
