# SPDX-License-Identifier: GPL-2.0-or-later
"""Byte ranges cut at page borders.

Every byte in exactly one part, as few partial pages as there can be.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import page_sizes
from zswapd.core.block.segments import cut

PAGE = 4096


@pytest.mark.parametrize(
    ("offset", "length", "parts"),
    [
        (0, PAGE, (None, 0, 1, None)),
        (0, 3 * PAGE, (None, 0, 3, None)),
        (5 * PAGE, PAGE, (None, 5, 6, None)),
        (0, 1, ((0, 0, 1), 0, 0, None)),
        (PAGE - 1, 1, ((0, PAGE - 1, PAGE), 1, 1, None)),
        (PAGE - 1, 2, ((0, PAGE - 1, PAGE), 1, 1, (1, 0, 1))),
        (10, 20, ((0, 10, 30), 0, 0, None)),
        (0, PAGE + 1, (None, 0, 1, (1, 0, 1))),
        (1, PAGE, ((0, 1, PAGE), 1, 1, (1, 0, 1))),
        (1, PAGE - 1, ((0, 1, PAGE), 1, 1, None)),
        (512, 3 * PAGE, ((0, 512, PAGE), 1, 3, (3, 0, 512))),
    ],
)
def test_known_ranges(offset: int, length: int, parts: tuple[object, ...]) -> None:
    assert tuple(cut(offset, length, PAGE)) == parts


@given(
    page_size=page_sizes(),
    first=st.integers(0, 1 << 30),
    skip=st.integers(0, 65535),
    length=st.one_of(st.integers(1, 70_000), st.integers(1, 9).map(lambda pages: pages * 4096)),
)
def test_parts_cover_the_range_without_overlap(
    page_size: int, first: int, skip: int, length: int
) -> None:
    offset = first * page_size + skip % page_size
    parts = cut(offset, length, page_size)
    covered = []
    if parts.head:
        number, begin, end = parts.head
        assert 0 <= begin < end <= page_size
        assert (begin, end) != (0, page_size), "a whole page is no partial one"
        covered.append((number * page_size + begin, number * page_size + end))
    if parts.first < parts.end:
        covered.append((parts.first * page_size, parts.end * page_size))
    if parts.tail:
        number, begin, end = parts.tail
        assert begin == 0 < end < page_size
        covered.append((number * page_size, number * page_size + end))
    assert covered[0][0] == offset
    assert covered[-1][1] == offset + length
    assert all(a[1] == b[0] for a, b in itertools.pairwise(covered))
