# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc's size classes: every size has one, and none wastes more than the best zspage would."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from zswapd.core.allocators.sizeclasses import (
    FULLNESS_GROUPS,
    MIN_ALLOC_SIZE,
    SizeClass,
    build_classes,
    frames_for,
)


@pytest.fixture(params=(1, 4, 8, 16), ids=lambda frames: f"max{frames}")
def max_frames(request: pytest.FixtureRequest) -> int:
    """The longest zspage allowed."""
    frames: int = request.param
    return frames


def _class_of(size: int, page_size: int, classes: list[SizeClass], table: list[int]) -> SizeClass:
    step = page_size // 256
    return classes[table[(size + step - 1) // step]]


def test_every_size_fits_its_class(page_size: int, max_frames: int) -> None:
    classes, table = build_classes(page_size, max_frames)
    for size in range(1, page_size + 1):
        found = _class_of(size, page_size, classes, table)
        assert found.size >= size
        if found.number:
            smaller = classes[found.number - 1]
            assert smaller.size < size, f"{size} would fit into the class of {smaller.size}"


def test_no_size_costs_more_than_in_the_best_zspage(page_size: int, max_frames: int) -> None:
    # By brute force, in exact fractions: what rounding to the step and the end of a zspage cost
    # cannot be less. Merging classes must not add to it.
    classes, table = build_classes(page_size, max_frames)
    step = page_size // 256
    for size in range(max(MIN_ALLOC_SIZE, step), page_size + 1, step):
        found = _class_of(size, page_size, classes, table)
        cost = Fraction(found.frames * page_size, found.objects)
        best = min(Fraction(n * page_size, n * page_size // size) for n in range(1, max_frames + 1))
        assert cost == best


def test_class_table_is_consistent(page_size: int, max_frames: int) -> None:
    classes, table = build_classes(page_size, max_frames)
    assert [c.number for c in classes] == list(range(len(classes)))
    assert [c.size for c in classes] == sorted({c.size for c in classes})
    assert classes[-1].size == page_size
    assert classes[0].size >= MIN_ALLOC_SIZE
    assert len(table) == 257
    for c in classes:
        assert 1 <= c.frames <= max_frames
        assert c.objects == c.frames * page_size // c.size
        assert c.frames == frames_for(c.size, page_size, max_frames)
        assert c.size % 16 == 0, "the live word has to be aligned"


def test_similar_classes_are_merged(page_size: int, max_frames: int) -> None:
    classes, _ = build_classes(page_size, max_frames)
    shapes = [(c.frames, c.objects) for c in classes]
    assert all(a != b for a, b in itertools.pairwise(shapes))


def test_longer_zspages_waste_less(page_size: int) -> None:
    def mean_cost(frames: int) -> float:
        classes, table = build_classes(page_size, frames)
        sizes = range(page_size // 8, page_size * 7 // 8, 64)
        found = ((size, _class_of(size, page_size, classes, table)) for size in sizes)
        return sum(c.frames * page_size / c.objects / size for size, c in found) / len(sizes)

    costs = [mean_cost(frames) for frames in (1, 2, 4, 8, 16)]
    assert costs == sorted(costs, reverse=True)
    assert costs[3] < 1.04, (
        "eight frames, the default, shall cost less than four percent over all usual sizes"
    )


def test_fullness_groups_rise_with_use(page_size: int, max_frames: int) -> None:
    for c in build_classes(page_size, max_frames)[0]:
        assert len(c.group_of) == c.objects + 1
        assert list(c.group_of) == sorted(c.group_of)
        assert c.group_of[0] == 0
        assert c.group_of[c.objects] == FULLNESS_GROUPS
        assert all(group < FULLNESS_GROUPS for group in c.group_of[:-1]), (
            "only a full zspage is on no list"
        )
