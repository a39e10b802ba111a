# SPDX-License-Identifier: GPL-2.0-or-later
"""The radix tree and its nodes.

Machine words, none of them leaked, none of them asked from the kernel on the page path.
"""

from __future__ import annotations

import ctypes
import errno
import random

import pytest

from zswapd.core.tmem import objnodes as objnodes_module
from zswapd.core.tmem.objnodes import NODE_BYTES, NODE_SLOTS, Objnodes, nodes_for
from zswapd.core.tmem.radix import MAX_NEW_NODES, Radix
from zswapd.errors import ArenaError, InvariantError

EDGES = (0, 1, 63, 64, 65, 4095, 4096, 64**3 - 1, 64**3, 64**4, 64**5 - 1, 64**5, (1 << 32) - 1)


@pytest.fixture
def nodes() -> Objnodes:
    return Objnodes(20_000, reserve=2000)


def test_node_is_sixty_four_machine_words() -> None:
    assert (NODE_SLOTS, NODE_BYTES) == (64, 512)


@pytest.mark.parametrize("index", EDGES)
def test_single_page_at_any_index_is_found_and_costs_a_path(nodes: Objnodes, index: int) -> None:
    tree = Radix(nodes)
    assert tree.set(index, 77) == 0
    assert tree.get(index) == 77
    assert tree.pages == 1
    height = max(1, -(-index.bit_length() // 6))
    assert tree.check() == nodes.in_use == height, "an empty node was left in the tree"
    assert list(tree.items()) == [(index, 77)]
    for other in EDGES:
        if other != index:
            assert tree.get(other) == 0
    assert tree.remove(index) == 77
    assert (tree.pages, nodes.in_use) == (0, 0)


@pytest.mark.parametrize("order", ["up", "down", "random"])
def test_all_edges_together(nodes: Objnodes, order: str) -> None:
    tree = Radix(nodes)
    edges = {
        "up": list(EDGES),
        "down": list(EDGES)[::-1],
        "random": random.Random(1).sample(EDGES, len(EDGES)),
    }[order]
    for number, index in enumerate(edges, 1):
        tree.set(index, number)
        tree.check()
    assert dict(tree.items()) == {index: number for number, index in enumerate(edges, 1)}
    assert [index for index, _ in tree.items()] == sorted(EDGES)
    for index in reversed(edges):
        assert tree.remove(index)
        assert tree.get(index) == 0
        if tree.pages:
            tree.check()
    assert nodes.in_use == 0


@pytest.mark.parametrize("index", EDGES)
def test_set_needs_no_more_nodes_than_promised(nodes: Objnodes, index: int) -> None:
    for already in EDGES:
        tree = Radix(nodes)
        tree.set(already, 1)
        before = nodes.in_use
        tree.set(index, 2)
        assert nodes.in_use - before <= MAX_NEW_NODES
        tree.remove_range(0, (1 << 32) - 1, lambda _: None)


def test_index_above_the_tree_is_not_there_and_not_truncated(nodes: Objnodes) -> None:
    tree = Radix(nodes)
    tree.set(5, 1)
    for alias in (64 + 5, 64**2 + 5, (1 << 32) + 5, (1 << 60) + 5):
        assert tree.get(alias) == 0
        assert tree.remove(alias) == 0
        assert not tree.take(alias, 1)
    assert tree.get(5) == 1


def test_tree_shrinks_when_its_far_pages_go(nodes: Objnodes) -> None:
    tree = Radix(nodes)
    tree.set(3, 1)
    assert nodes.in_use == 1
    tree.set((1 << 32) - 1, 2)
    assert nodes.in_use > 6
    tree.remove((1 << 32) - 1)
    assert nodes.in_use == 1
    assert tree.get(3) == 1
    tree.check()


def test_replacing_a_value_returns_the_old_one_and_takes_no_node(nodes: Objnodes) -> None:
    tree = Radix(nodes)
    tree.set(100, 1)
    before = nodes.in_use
    assert tree.set(100, 2) == 1
    assert (tree.get(100), tree.pages, nodes.in_use) == (2, 1, before)


@pytest.mark.parametrize(
    ("first", "last"),
    [(0, 0), (10, 99), (64, 127), (60, 70), (4000, 5000), (0, (1 << 32) - 1), (9, 8)],
)
def test_remove_range_takes_just_the_range(nodes: Objnodes, first: int, last: int) -> None:
    tree = Radix(nodes)
    there = [*range(300), *range(4090, 4100), 70_000]
    for index in there:
        tree.set(index, index + 1)
    gone: list[int] = []
    hit = [index for index in there if first <= index <= last]
    assert tree.remove_range(first, last, gone.append) == len(hit)
    assert sorted(gone) == [index + 1 for index in hit]
    assert [index for index, _ in tree.items()] == [
        index for index in there if index not in set(hit)
    ]
    if tree.pages:
        tree.check()
    else:
        assert nodes.in_use == 0


def test_remove_range_over_a_huge_empty_range_costs_only_what_is_there(nodes: Objnodes) -> None:
    tree = Radix(nodes)
    tree.set(7, 1)
    tree.set((1 << 32) - 1, 1)
    # Would take hours if it went page by page.
    assert tree.remove_range(8, (1 << 32) - 2, lambda _: None) == 0
    assert tree.pages == 2


def test_values_are_whole_machine_words(nodes: Objnodes) -> None:
    tree = Radix(nodes)
    tree.set(1, (1 << 64) - 1)
    assert tree.get(1) == (1 << 64) - 1


def test_empty_reserve_refuses() -> None:
    nodes = Objnodes(30, reserve=30)
    assert nodes.available() == 30
    got = [nodes.alloc() for _ in range(30)]
    assert sorted(got) == sorted(set(got))
    assert 0 not in got
    assert nodes.alloc() == 0
    assert nodes.available() == 0
    assert not nodes.wants_refill(), "no more than the capacity"
    for node in got:
        nodes.free(node)
    assert nodes.statistics().curr_objnode_count == 0
    assert nodes.statistics().curr_objnode_count_max == 30


def test_node_handed_out_again_is_all_zeros() -> None:
    nodes = Objnodes(10, reserve=10)
    first = [nodes.alloc() for _ in range(10)]
    for node in first:
        nodes.free(node)
    for node in [nodes.alloc() for _ in range(10)]:
        assert not any(nodes.words[node * NODE_SLOTS : (node + 1) * NODE_SLOTS])
        assert nodes.used_slots[node] == 0


def test_refill_goes_on_after_the_first_reserve() -> None:
    nodes = Objnodes(10_000, reserve=100)
    while nodes.alloc():
        pass
    taken = nodes.in_use
    assert 100 <= taken < 10_000
    assert nodes.wants_refill()
    nodes.commit(nodes.refill(nodes.begin_refill()))
    node = nodes.alloc()
    assert node
    assert nodes.statistics().populated_bytes >= taken * NODE_BYTES


def test_available_is_what_can_be_had() -> None:
    nodes = Objnodes(60, reserve=60)
    held = [nodes.alloc() for _ in range(40)]
    for node in held[:25]:
        nodes.free(node)
    for _ in range(10):
        nodes.alloc()
    expected = 60 - 40 + 25 - 10
    assert nodes.available() == nodes.statistics().reserve == expected
    assert sum(bool(nodes.alloc()) for _ in range(100)) == expected


def test_new_nodes_count_nothing() -> None:
    seen = Objnodes(10, reserve=10).statistics()
    assert (seen.curr_objnode_count, seen.curr_objnode_count_max, seen.failed_objnode_alloc) == (
        0,
        0,
        0,
    )
    assert seen.reserve == 10


def test_nodes_are_touched_without_a_fault() -> None:
    # What the page path writes to is backed by memory beforehand: the slots, and the counts of
    # slots in use.
    import resource

    nodes = Objnodes(300_000, reserve=40_000)
    held = [nodes.alloc() for _ in range(40_000)]
    for measured in (False, True):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for node in held[:16] if not measured else held[16::64]:
            nodes.words[node * NODE_SLOTS] = 1
            nodes.used_slots[node] = 1
    # Some 620 pages were touched; the interpreter itself may fault now and then.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults <= 20


def test_low_reserve_is_announced_once_until_it_is_refilled() -> None:
    nodes = Objnodes(20_000, reserve=100)
    calls: list[int] = []
    nodes.when_low = lambda: calls.append(nodes.available())
    while not calls:
        assert nodes.alloc()
    for _ in range(50):
        assert nodes.alloc()
    assert calls == [99]
    nodes.commit(nodes.refill(nodes.begin_refill()))
    assert not nodes.wants_refill()
    while len(calls) == 1:
        assert nodes.alloc()
    assert calls == [99, 99]


def test_last_nodes_are_given_without_a_call_for_more() -> None:
    nodes = Objnodes(50, reserve=50)
    nodes.when_low = lambda: pytest.fail("there is nothing to refill from")
    while nodes.alloc():
        pass
    assert nodes.in_use == 50


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL])
def test_refill_says_when_the_kernel_has_no_memory(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    nodes = Objnodes(10_000, reserve=100)

    def madvise(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(objnodes_module._libc, "madvise", madvise)
    if code == errno.EINVAL:  # a kernel before 5.14: its memory comes with the first touch
        nodes.commit(nodes.refill(nodes.begin_refill()))
        return
    before = nodes.available()
    with pytest.raises(ArenaError, match="Cannot allocate memory"):
        nodes.refill(nodes.begin_refill())
    assert nodes.available() == before


def test_index_too_large_for_the_address_space_is_an_error_with_a_hint() -> None:
    with pytest.raises(ArenaError) as caught:
        Objnodes(1 << 50, reserve=1)
    assert caught.value.hint


@pytest.mark.parametrize("pages", [1, 2, 63, 64, 65, 4096, 4097, 20_000])
@pytest.mark.parametrize("objects", [1, 4])
def test_nodes_for_a_full_device_are_enough_to_the_last_page(pages: int, objects: int) -> None:
    capacity = nodes_for(pages, objects)
    nodes = Objnodes(capacity, reserve=capacity)
    trees = [Radix(nodes) for _ in range(objects)]
    for page in range(pages):
        trees[page % objects].set(page // objects, 1)
    assert nodes.in_use <= capacity
    assert capacity <= 2 * objects + pages // 32, "far more than the trees can need"


def test_tree_without_a_node_is_an_invariant_error() -> None:
    nodes = Objnodes(2, reserve=2)
    tree = Radix(nodes)
    with pytest.raises(InvariantError, match="no index node"):
        tree.set(1 << 20, 1)


def test_check_finds_a_wrong_count(nodes: Objnodes) -> None:
    tree = Radix(nodes)
    for index in range(10):
        tree.set(index, 1)
    tree.pages += 1
    with pytest.raises(InvariantError):
        tree.check()
    tree.pages -= 1
    node = next(node for node in range(1, 100) if nodes.used_slots[node])
    nodes.used_slots[node] += 1
    with pytest.raises(InvariantError):
        tree.check()
