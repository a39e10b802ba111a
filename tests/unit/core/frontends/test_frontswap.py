# SPDX-License-Identifier: GPL-2.0-or-later
"""frontswap: swap files side by side, swizzled keys, ranges, counters by the kernel's names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fakes import FailingCompressor, FakePam
from tests.support.stack import Stack, build
from tests.support.strategies import page
from zswapd.core import compress
from zswapd.core.frontends.frontswap import MAX_OFFSET, MAX_SWAPFILES, Frontswap
from zswapd.core.pam.base import MAX_INDEX, RejectReason
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem

SIZE = 64


@pytest.fixture
def pam() -> FakePam:
    return FakePam(SIZE)


@pytest.fixture
def tmem() -> Iterator[Tmem]:
    made = Tmem(Objnodes(40_000, reserve=10_000))
    yield made
    made.check()


@pytest.fixture
def frontswap(tmem: Tmem, pam: FakePam) -> Frontswap:
    made = Frontswap(tmem, pam)
    made.init(0)
    made.init(1)
    return made


def _page(seed: int) -> memoryview:
    return memoryview(seed.to_bytes(8, "little") * (SIZE // 8))


def _load(frontswap: Frontswap, swap_type: int, offset: int) -> memoryview | None:
    out = memoryview(bytearray(SIZE))
    return out if frontswap.load(swap_type, offset, out) else None


@pytest.mark.parametrize(
    ("swap_type", "offset", "oid", "index"),
    [
        (0, 0, 0, 0),
        (0, 255, 255, 0),
        (0, 256, 0, 1),
        (1, 0x12345, 0x145, 0x123),
        (1, MAX_OFFSET, 0x1FF, MAX_INDEX),
    ],
)
def test_offsets_are_swizzled_over_256_objects(
    frontswap: Frontswap, pam: FakePam, swap_type: int, offset: int, oid: int, index: int
) -> None:
    frontswap.store(swap_type, offset, _page(1))
    assert [key[1:3] for key in pam.pages.values()] == [(oid, index)]


def test_every_type_and_offset_has_a_key_of_its_own(frontswap: Frontswap, pam: FakePam) -> None:
    for swap_type in (2, 5, MAX_SWAPFILES - 1):
        frontswap.init(swap_type)
    places = [
        (t, o)
        for t in (0, 1, 2, 5, MAX_SWAPFILES - 1)
        for o in (0, 1, 255, 256, 257, 511, 65536, MAX_OFFSET)
    ]
    for seed, place in enumerate(places):
        assert frontswap.store(*place, _page(seed)) is None
    assert len(pam.pages) == len(places)
    for seed, place in enumerate(places):
        assert _load(frontswap, *place) == _page(seed)


@pytest.mark.parametrize("offset", [MAX_OFFSET + 1, (MAX_OFFSET + 1) * 2, 1 << 64, -1])
def test_offset_past_the_limit_is_refused_and_never_truncated(
    frontswap: Frontswap, pam: FakePam, offset: int
) -> None:
    aliases = {offset & MAX_OFFSET, 0, 255}
    for alias in aliases:
        frontswap.store(0, alias, _page(1))
    assert frontswap.store(0, offset, _page(2)) is RejectReason.INDEX_LIMIT
    assert _load(frontswap, 0, offset) is None
    assert not frontswap.invalidate_page(0, offset)
    assert all(_load(frontswap, 0, alias) == _page(1) for alias in aliases)


def test_offset_at_the_limit_is_kept(frontswap: Frontswap) -> None:
    assert frontswap.store(0, MAX_OFFSET, _page(7)) is None
    assert _load(frontswap, 0, MAX_OFFSET) == _page(7)


@pytest.mark.parametrize("swap_type", [-1, MAX_SWAPFILES, 1000])
def test_type_out_of_range_is_refused(frontswap: Frontswap, swap_type: int) -> None:
    with pytest.raises(ValueError, match=str(MAX_SWAPFILES)):
        frontswap.init(swap_type)


def test_type_in_use_is_refused(frontswap: Frontswap) -> None:
    with pytest.raises(ValueError, match="in use"):
        frontswap.init(1)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (0, 0),
        (5, 4),
        (0, 255),
        (3, 258),
        (255, 256),
        (0, 999),
        (100, 700),
        (257, 513),
        (999, 999),
        (0, MAX_OFFSET),
    ],
)
def test_invalidate_range_takes_just_the_range(
    frontswap: Frontswap, pam: FakePam, first: int, last: int
) -> None:
    for offset in range(1000):
        frontswap.store(0, offset, _page(offset))
        frontswap.store(1, offset, _page(offset))
    hit = [offset for offset in range(1000) if first <= offset <= last]
    assert frontswap.invalidate_range(0, first, last) == len(hit)
    assert [o for o in range(1000) if _load(frontswap, 0, o) is None] == hit
    assert all(_load(frontswap, 1, o) == _page(o) for o in range(1000))
    assert frontswap.statistics().invalidates == len(hit)
    assert len(pam.pages) == 2000 - len(hit)


def test_counters_of_a_quiet_life(frontswap: Frontswap, pam: FakePam) -> None:
    for offset in range(10):
        frontswap.store(0, offset, _page(offset))
    frontswap.store(0, 3, _page(33))
    for offset in (1, 2, 500):
        _load(frontswap, 0, offset)
    frontswap.invalidate_page(0, 1)
    frontswap.invalidate_page(0, 1)
    pam.refuse = RejectReason.POOL_LIMIT_HIT
    frontswap.store(0, 50, _page(1))
    pam.refuse = None
    frontswap.freeze()
    frontswap.store(0, 2, _page(2))
    assert frontswap.statistics().frozen
    frontswap.thaw()
    seen = frontswap.statistics()
    assert (seen.succ_stores, seen.failed_stores) == (11, 2)
    assert (seen.loads, seen.failed_loads) == (2, 1)
    assert not seen.frozen
    # One by itself, one flushed by the frozen store.
    assert seen.invalidates == 2
    assert frontswap.invalidate_area(0) == 8
    assert frontswap.statistics().invalidates == 10


@pytest.mark.parametrize("reason", RejectReason)
def test_refusals_are_counted_by_reason(
    frontswap: Frontswap, pam: FakePam, reason: RejectReason
) -> None:
    pam.refuse = reason
    for _ in range(3):
        assert frontswap.store(0, 1, _page(1)) is reason
    rejects = frontswap.statistics().rejects
    assert {name: count for name, count in dict(rejects).items() if count} == {
        reason.name.lower(): 3
    }


def test_refusal_that_costs_the_older_copy_is_told_just_before(
    frontswap: Frontswap, pam: FakePam
) -> None:
    lost: list[int] = []
    frontswap.init(7, when_losing=lost.append)
    frontswap.store(7, 1, _page(1))
    pam.refuse = RejectReason.FAILED_ALLOC
    frontswap.store(7, 2, _page(2))
    assert lost == []
    frontswap.store(7, 1, _page(2))
    assert lost == [1]
    frontswap.store(7, 1, _page(2))
    assert lost == [1]
    pam.refuse = None
    frontswap.store(7, 1, _page(1))
    frontswap.freeze()
    frontswap.store(7, 1, _page(2))
    assert lost == [1, 1]
    frontswap.store(7, 1, _page(2))
    assert lost == [1, 1]


@pytest.mark.parametrize("there", [True, False])
def test_store_that_fails_is_counted_and_says_whether_it_cost_the_older_copy(there: bool) -> None:
    stack = build(compressor=FailingCompressor(compress.get("lz4"), "RE" if there else "E"))
    lost: list[int] = []
    stack.frontswap.init(0, when_losing=lost.append)
    if there:
        assert stack.frontswap.store(0, 5, memoryview(page("words", 1, 4096))) is None
    with pytest.raises(MemoryError):
        stack.frontswap.store(0, 5, memoryview(page("words", 2, 4096)))
    seen = stack.frontswap.statistics()
    assert (seen.succ_stores, seen.failed_stores) == (int(there), 1)
    assert lost == ([5] if there else [])
    assert stack.load(0, 5) is None
    stack.check()
    stack.close()


def test_range_over_a_sparse_device_costs_what_is_there(frontswap: Frontswap) -> None:
    # As the discard of the whole device at swapon: must not go page by page over a terabyte.
    frontswap.store(0, 12345, _page(1))
    for _ in range(20):
        assert frontswap.invalidate_range(0, 20_000, MAX_OFFSET) == 0
    assert frontswap.invalidate_range(0, 0, MAX_OFFSET) == 1


@pytest.fixture
def stack(page_size: int) -> Iterator[Stack]:
    made = build(page_size)
    made.frontswap.init(0)
    yield made
    made.check()
    made.close()


def test_damaged_page_raises_for_its_reader_only(stack: Stack, page_size: int) -> None:
    for offset in range(20):
        stack.frontswap.store(0, offset, memoryview(page("words", offset, page_size)))
    victim = next(p for p in stack.tmem.pampds(stack.zv) if stack.zv.key_of(p).oid == 7)
    stack.arena.view[victim + 30] ^= 0x10
    from zswapd.errors import CorruptedPageError

    for offset in range(20):
        if offset == 7:
            with pytest.raises(CorruptedPageError, match="0x7"):
                stack.load(0, offset)
        else:
            assert stack.load(0, offset) == page("words", offset, page_size)
    assert stack.zv.statistics().corrupted == 1
    assert stack.frontswap.invalidate_page(0, 7), "it can be got rid of"
