# SPDX-License-Identifier: GPL-2.0-or-later
"""Radix trees that share one set of nodes, against dicts."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.radix import MAX_NEW_NODES, Radix

TREES = 3


def indexes() -> st.SearchStrategy[int]:
    """Draw indexes near each other and near the powers of 64, where trees grow and shrink."""
    near = st.tuples(st.sampled_from([64**power for power in range(6)]), st.integers(-2, 2)).map(
        sum
    )
    return st.one_of(st.integers(0, 200), near, st.integers(0, (1 << 32) - 1)).map(
        lambda i: min(max(i, 0), (1 << 32) - 1)
    )


class RadixMachine(RuleBasedStateMachine):
    """Same pages as the dict, and not one node more than the pages need."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = Objnodes(4000, reserve=4000)
        self.trees = [Radix(self.nodes) for _ in range(TREES)]
        self.models: list[dict[int, int]] = [{} for _ in range(TREES)]
        self.serial = 0

    @rule(tree=st.integers(0, TREES - 1), index=indexes(), count=st.integers(1, 70))
    def set(self, tree: int, index: int, count: int) -> None:
        for at in range(index, min(index + count, 1 << 32)):
            self.serial += 1
            assert self.nodes.available() >= MAX_NEW_NODES
            assert self.trees[tree].set(at, self.serial) == self.models[tree].get(at, 0)
            self.models[tree][at] = self.serial

    @rule(tree=st.integers(0, TREES - 1), index=indexes())
    def remove(self, tree: int, index: int) -> None:
        assert self.trees[tree].remove(index) == self.models[tree].pop(index, 0)

    @rule(
        tree=st.integers(0, TREES - 1),
        index=indexes(),
        count=st.integers(1, 70),
        wrong=st.booleans(),
    )
    def take(self, tree: int, index: int, count: int, wrong: bool) -> None:
        for at in range(index, min(index + count, 1 << 32)):
            value = self.models[tree].get(at, 0)
            assert not self.trees[tree].take(at, self.serial + 1)
            if not wrong and value:
                assert self.trees[tree].take(at, value)
                del self.models[tree][at]

    @rule(tree=st.integers(0, TREES - 1), count=st.integers(1, 300))
    def last_of(self, tree: int, count: int) -> None:
        first = sorted(self.models[tree])[:count]
        assert self.trees[tree].last_of(count) == (first[-1] if first else 0)

    @rule(tree=st.integers(0, TREES - 1), first=indexes(), last=indexes())
    def remove_range(self, tree: int, first: int, last: int) -> None:
        model = self.models[tree]
        hit = [index for index in model if first <= index <= last]
        gone: list[int] = []
        assert self.trees[tree].remove_range(first, last, gone.append) == len(hit)
        assert sorted(gone) == sorted(model.pop(index) for index in hit)

    @rule(tree=st.integers(0, TREES - 1), index=indexes())
    def get(self, tree: int, index: int) -> None:
        assert self.trees[tree].get(index) == self.models[tree].get(index, 0)

    @invariant()
    def same_pages_and_no_lost_node(self) -> None:
        held = 0
        for tree, model in zip(self.trees, self.models, strict=True):
            assert list(tree.items()) == sorted(model.items())
            assert tree.pages == len(model)
            held += tree.check()
        assert held == self.nodes.in_use

    def teardown(self) -> None:
        for tree in self.trees:
            tree.remove_range(0, (1 << 32) - 1, lambda _: None)
        assert self.nodes.in_use == 0


TestRadix = RadixMachine.TestCase
