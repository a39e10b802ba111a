# SPDX-License-Identifier: GPL-2.0-or-later
"""tmem: clients, pools and objects, limits that are refused and never truncated.

Counters by zcache's names.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fakes import FakePam
from zswapd.core.pam.base import MAX_INDEX, MAX_OID, MAX_POOLS, RejectReason
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.radix import Radix
from zswapd.core.tmem.tmem import Tmem
from zswapd.errors import InvariantError

SIZE = 64
"""Pages are opaque to tmem, so they may be small here."""


@pytest.fixture
def pam() -> FakePam:
    return FakePam(SIZE)


@pytest.fixture
def tmem() -> Iterator[Tmem]:
    made = Tmem(Objnodes(5000, reserve=1000))
    yield made
    made.check()


@pytest.fixture
def pool(tmem: Tmem, pam: FakePam) -> int:
    return tmem.new_pool(tmem.new_client(), pam, persistent=True)


def _page(seed: int) -> memoryview:
    return memoryview(seed.to_bytes(8, "little") * (SIZE // 8))


def _get(tmem: Tmem, pool: int, oid: int, index: int) -> memoryview | None:
    out = memoryview(bytearray(SIZE))
    return out if tmem.get(pool, oid, index, out) else None


def test_pools_have_numbers_of_their_own(tmem: Tmem, pam: FakePam) -> None:
    client = tmem.new_client()
    pools = [tmem.new_pool(client, pam, persistent=True) for _ in range(5)]
    assert len(set(pools)) == 5
    for pool in pools:
        assert tmem.put(pool, 1, 1, _page(pool)) is None
    for pool in pools:
        assert _get(tmem, pool, 1, 1) == _page(pool)


def test_pool_numbers_run_out_with_an_error(tmem: Tmem, pam: FakePam) -> None:
    client = tmem.new_client()
    for _ in range(MAX_POOLS):
        tmem.new_pool(client, pam, persistent=True)
    with pytest.raises(ValueError, match=str(MAX_POOLS)):
        tmem.new_pool(client, pam, persistent=True)
    tmem.destroy_pool(77)
    assert tmem.new_pool(client, pam, persistent=True) == 77


def test_pool_of_an_unknown_client_is_refused(tmem: Tmem, pam: FakePam) -> None:
    with pytest.raises(ValueError, match="client 9"):
        tmem.new_pool(9, pam, persistent=True)


@pytest.mark.parametrize("number", [1, 255, 256, -1, 1 << 20])
def test_unknown_pool_is_refused_everywhere(tmem: Tmem, pool: int, number: int) -> None:
    assert pool == 0
    out = memoryview(bytearray(SIZE))
    for call in (
        lambda: tmem.put(number, 1, 1, _page(1)),
        lambda: tmem.get(number, 1, 1, out),
        lambda: tmem.flush_page(number, 1, 1),
        lambda: tmem.flush_object(number, 1),
        lambda: tmem.flush_range(number, 1, 0, 9),
        lambda: tmem.destroy_pool(number),
        lambda: tmem.pool_pages(number),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()


def test_destroyed_pool_is_gone_and_its_pages_are_freed(
    tmem: Tmem, pam: FakePam, pool: int
) -> None:
    for index in range(100):
        tmem.put(pool, index % 3, index * 77, _page(index))
    assert tmem.destroy_pool(pool) == 100
    assert pam.pages == {}
    assert tmem.statistics().curr_obj_count == tmem.statistics().curr_objnode_count == 0
    with pytest.raises(ValueError, match="no tmem pool"):
        tmem.put(pool, 1, 1, _page(1))


def test_destroyed_client_takes_its_pools_and_no_others(tmem: Tmem, pam: FakePam) -> None:
    mine, other = tmem.new_client(), tmem.new_client()
    pools = [tmem.new_pool(client, pam, persistent=True) for client in (mine, other, mine)]
    for pool in pools:
        tmem.put(pool, 1, 1, _page(pool))
    assert tmem.destroy_client(mine) == 2
    assert _get(tmem, pools[1], 1, 1) == _page(pools[1])
    with pytest.raises(ValueError, match="no tmem pool"):
        tmem.pool_pages(pools[0])
    with pytest.raises(ValueError, match="client"):
        tmem.new_pool(mine, pam, persistent=True)


@pytest.mark.parametrize(
    ("oid", "index"),
    [
        (0, MAX_INDEX + 1),
        (0, MAX_INDEX + 1 + 5),
        (0, 1 << 64),
        (0, -1),
        (MAX_OID + 1, 0),
        (MAX_OID + 1 + 7, 5),
        (1 << 192, 0),
        (-1, 0),
    ],
)
def test_key_past_the_limit_is_refused_and_never_truncated(
    tmem: Tmem, pam: FakePam, pool: int, oid: int, index: int
) -> None:
    # What a truncation would hit.
    aliases = {(oid & MAX_OID, index & MAX_INDEX), (0, 0), (0, 5), (7, 5)}
    for alias in aliases:
        assert tmem.put(pool, *alias, _page(1)) is None
    assert tmem.put(pool, oid, index, _page(2)) is RejectReason.INDEX_LIMIT
    assert _get(tmem, pool, oid, index) is None
    assert not tmem.flush_page(pool, oid, index)
    for alias in aliases:
        assert _get(tmem, pool, *alias) == _page(1)
    assert len(pam.pages) == len(aliases)


@pytest.mark.parametrize(
    ("oid", "index"), [(0, 0), (MAX_OID, MAX_INDEX), (MAX_OID, 0), (0, MAX_INDEX)]
)
def test_key_at_the_limit_is_kept(tmem: Tmem, pool: int, oid: int, index: int) -> None:
    assert tmem.put(pool, oid, index, _page(3)) is None
    assert _get(tmem, pool, oid, index) == _page(3)
    assert tmem.flush_page(pool, oid, index)
    assert _get(tmem, pool, oid, index) is None


def test_new_copy_is_made_before_the_old_one_goes(tmem: Tmem, pam: FakePam, pool: int) -> None:
    tmem.put(pool, 1, 1, _page(1))
    pam.log.clear()
    tmem.put(pool, 1, 1, _page(2))
    assert [what for what, _ in pam.log] == ["create", "free"]
    assert pam.replacing == [False, True]
    assert tmem.statistics().replaced == 1


def _flushed(tmem: Tmem) -> list[tuple[int, int, int]]:
    """The keys of all pages that refused puts flush from now on."""
    flushed: list[tuple[int, int, int]] = []
    tmem.when_flushing = lambda *key: flushed.append(key)
    return flushed


def test_refused_replacement_frees_the_old_copy(tmem: Tmem, pam: FakePam, pool: int) -> None:
    flushed = _flushed(tmem)
    tmem.put(pool, 1, 1, _page(1))
    pam.refuse = RejectReason.FAILED_ALLOC
    assert tmem.put(pool, 1, 1, _page(2)) is RejectReason.FAILED_ALLOC
    assert flushed == [(pool, 1, 1)]
    assert pam.pages == {}
    assert _get(tmem, pool, 1, 1) is None
    assert tmem.put(pool, 1, 1, _page(2)) is RejectReason.FAILED_ALLOC
    assert len(flushed) == 1, "this time there was nothing to flush"
    seen = tmem.statistics()
    assert (seen.put_to_flush, seen.failed_pers_puts, seen.failed_eph_puts) == (1, 2, 0)


def test_refusal_past_the_limit_flushes_nothing(tmem: Tmem, pam: FakePam, pool: int) -> None:
    flushed = _flushed(tmem)
    tmem.put(pool, 1, 1, _page(1))
    pam.refuse = RejectReason.FAILED_ALLOC
    tmem.put(pool, 1, 1, _page(2))
    assert len(flushed) == 1
    assert tmem.put(pool, 1, MAX_INDEX + 1, _page(3)) is RejectReason.INDEX_LIMIT
    assert len(flushed) == 1


def test_refused_put_of_an_ephemeral_pool_has_its_own_counter(tmem: Tmem, pam: FakePam) -> None:
    pool = tmem.new_pool(tmem.new_client(), pam, persistent=False)
    pam.refuse = RejectReason.COMPRESS_POOR
    assert tmem.put(pool, 1, 1, _page(1)) is RejectReason.COMPRESS_POOR
    assert (tmem.statistics().failed_pers_puts, tmem.statistics().failed_eph_puts) == (0, 1)


def test_refused_put_leaves_no_object_behind(tmem: Tmem, pam: FakePam, pool: int) -> None:
    pam.refuse = RejectReason.FAILED_ALLOC
    tmem.put(pool, 1, 1 << 30, _page(1))
    assert tmem.statistics().curr_obj_count == tmem.statistics().curr_objnode_count == 0


def test_get_that_misses_leaves_the_buffer_alone(tmem: Tmem, pool: int) -> None:
    out = bytearray(b"\xaa" * SIZE)
    assert not tmem.get(pool, 1, 1, memoryview(out))
    tmem.put(pool, 1, 1, _page(1))
    assert not tmem.get(pool, 1, 2, memoryview(out))
    assert out == b"\xaa" * SIZE


def test_flush_counters_tell_asked_from_found(tmem: Tmem, pool: int) -> None:
    for index in range(4):
        tmem.put(pool, 1, index, _page(index))
    assert [tmem.flush_page(pool, 1, index) for index in (0, 0, 9)] == [True, False, False]
    assert [tmem.flush_page(pool, 2, 0)] == [False]
    seen = tmem.statistics()
    assert (seen.flush_total, seen.flush_found) == (4, 1)
    assert [tmem.flush_object(pool, oid) for oid in (1, 1, 5)] == [3, 0, 0]
    seen = tmem.statistics()
    assert (seen.flobj_total, seen.flobj_found) == (3, 1)


def test_flush_range_takes_just_the_range(tmem: Tmem, pam: FakePam, pool: int) -> None:
    for index in range(200):
        tmem.put(pool, 1, index, _page(index))
        tmem.put(pool, 2, index, _page(index))
    assert tmem.flush_range(pool, 1, 50, 149) == 100
    assert tmem.flush_range(pool, 1, 50, 149) == 0
    assert tmem.flush_range(pool, 1, 100, 99) == 0
    assert [index for index in range(200) if _get(tmem, pool, 1, index)] == [
        *range(50),
        *range(150, 200),
    ]
    assert tmem.pool_pages(pool) == 300 == len(pam.pages)


def test_object_counts_rise_and_fall(tmem: Tmem, pool: int) -> None:
    for oid in range(7):
        tmem.put(pool, oid, 0, _page(oid))
    for oid in range(5):
        tmem.flush_object(pool, oid)
    seen = tmem.statistics()
    assert (seen.curr_obj_count, seen.curr_obj_count_max) == (2, 7)
    assert (seen.curr_objnode_count, seen.curr_objnode_count_max) == (2, 7)


def test_empty_node_reserve_refuses_a_new_page_but_not_a_replacement(pam: FakePam) -> None:
    tmem = Tmem(Objnodes(40, reserve=40))
    flushed = _flushed(tmem)
    pool = tmem.new_pool(tmem.new_client(), pam, persistent=True)
    taken = 0
    while (outcome := tmem.put(pool, taken, 0, _page(1))) is None:
        taken += 1
    assert outcome is RejectReason.FAILED_OBJNODE
    assert flushed == []
    assert 0 < taken <= 40
    assert tmem.statistics().failed_objnode_alloc == 1
    assert tmem.put(pool, 0, 0, _page(2)) is None, "it needs no node"
    assert len(pam.pages) == taken
    tmem.flush_object(pool, 0)
    assert tmem.put(pool, 0, 0, _page(3)) is None
    tmem.check()


def test_replace_only_while_the_expected_copy_stands(tmem: Tmem, pam: FakePam, pool: int) -> None:
    tmem.put(pool, 1, 1, _page(1))
    (old,) = pam.pages
    moved = pam.create(pool, 1, 1, _page(1), replacing=True)
    assert not tmem.replace(pool, 1, 1, old + 999, moved)
    assert not tmem.replace(pool, 1, 2, old, moved)
    assert not tmem.replace(pool, 2, 1, old, moved)
    assert tmem.replace(pool, 1, 1, old, moved)
    pam.free(old)
    assert _get(tmem, pool, 1, 1) == _page(1)
    assert tmem.pool_pages(pool) == 1


def test_page_is_forgotten_only_as_the_copy_that_the_index_names(
    tmem: Tmem, pam: FakePam, pool: int
) -> None:
    for index in (3, 4):
        tmem.put(pool, 9, index, _page(index))
    pampd, kept = tmem.find(pool, 9, 3), len(pam.pages)
    for wrong in (
        (pool, 9, 3, pampd + 1),
        (pool, 9, 4, pampd),
        (pool, 9, 5, pampd),
        (pool, 8, 3, pampd),
        (pool + 1, 9, 3, pampd),
    ):
        assert not tmem.forget(*wrong)
    assert not tmem.forget(MAX_POOLS, 9, 3, pampd)
    assert tmem.find(pool, 9, 3) == pampd
    assert tmem.forget(pool, 9, 3, pampd)
    assert (tmem.find(pool, 9, 3), tmem.pool_pages(pool)) == (0, 1)
    assert len(pam.pages) == kept, "the copy is its back end's to free"
    pam.free(pampd)
    last = tmem.find(pool, 9, 4)
    assert tmem.forget(pool, 9, 4, last)
    pam.free(last)
    seen = tmem.statistics()
    assert (seen.curr_obj_count, seen.curr_objnode_count, seen.flush_total) == (0, 0, 0)


def test_compaction_updates_the_index(tmem: Tmem, pam: FakePam, pool: int) -> None:
    for index in range(10):
        tmem.put(pool, index % 2, index, _page(index))
    assert tmem.compact(pam) == 10
    for index in range(10):
        assert _get(tmem, pool, index % 2, index) == _page(index)
    assert sorted(tmem.pampds(pam)) == sorted(pam.pages)


def test_page_that_moves_without_being_named_is_an_invariant_error(
    tmem: Tmem, pam: FakePam, pool: int
) -> None:
    pampd = pam.create(pool, 1, 1, _page(1), replacing=False)
    with pytest.raises(InvariantError):
        tmem.compact(pam)
    pam.pages.pop(pampd, None)


def test_pampds_of_one_back_end_only(tmem: Tmem, pam: FakePam) -> None:
    other = FakePam(SIZE)
    client = tmem.new_client()
    pools = [tmem.new_pool(client, kept, persistent=True) for kept in (pam, other)]
    for pool in pools:
        for index in range(3):
            tmem.put(pool, 0, index, _page(index))
    assert sorted(tmem.pampds(pam)) == sorted(pam.pages)
    assert sorted(tmem.pampds(other)) == sorted(other.pages)


def test_check_finds_a_page_under_the_wrong_key(tmem: Tmem, pam: FakePam, pool: int) -> None:
    tmem.put(pool, 1, 1, _page(1))
    (pampd,) = pam.pages
    good = pam.pages[pampd]
    pam.pages[pampd] = (pool, 1, 2, good[3])
    with pytest.raises(InvariantError):
        tmem.check()
    pam.pages[pampd] = good


@pytest.mark.parametrize("what", ["pages", "objects", "empty object", "nodes"])
def test_check_finds_wrong_books(pam: FakePam, what: str) -> None:
    tmem = Tmem(Objnodes(500, reserve=500))
    pool = tmem.new_pool(tmem.new_client(), pam, persistent=True)
    for index in range(5):
        tmem.put(pool, 1, index, _page(index))
    tmem.check()
    inner = tmem._pools[pool]
    assert inner is not None
    match what:
        case "pages":
            inner.pages += 1
        case "objects":
            tmem._objects += 1
        case "empty object":
            inner.objects[9] = Radix(tmem._nodes)
            tmem._objects += 1
        case "nodes":
            tmem._nodes.alloc()
    with pytest.raises(InvariantError):
        tmem.check()


def test_object_pages_are_counted(tmem: Tmem, pool: int) -> None:
    for index in range(7):
        tmem.put(pool, 3, index * 100, _page(index))
    assert tmem.object_pages(pool, 3) == 7
    assert tmem.object_pages(pool, 4) == 0
