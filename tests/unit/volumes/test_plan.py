# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages are read together, and what a stream is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd.volumes.plan import STREAMS, Streams, runs


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([], []),
        ([5], [(5, 1)]),
        ([5, 6, 7], [(5, 3)]),
        ([5, 8], [(5, 4)]),
        ([5, 9], [(5, 1), (9, 1)]),
        ([0, 1, 4, 5, 20], [(0, 6), (20, 1)]),
        (list(range(20)), [(0, 8), (8, 8), (16, 4)]),
        ([0, 3, 6, 9], [(0, 7), (9, 1)]),
    ],
)
def test_runs_join_what_is_near_up_to_a_length(
    pages: list[int], expected: list[tuple[int, int]]
) -> None:
    assert runs(pages, gap=2, most=8) == expected


@given(st.sets(st.integers(0, 300)), st.integers(0, 8), st.integers(1, 64))
def test_every_page_is_in_exactly_one_run_and_no_run_is_wider_than_it_must_be(
    pages: set[int], gap: int, most: int
) -> None:
    found = runs(sorted(pages), gap=gap, most=most)
    covered = [page for first, count in found for page in range(first, first + count)]
    assert len(covered) == len(set(covered))
    assert pages <= set(covered)
    for first, count in found:
        assert {first, first + count - 1} <= pages
        assert count <= most


def test_stream_grows_while_requests_continue_it_whoever_comes_between() -> None:
    streams = Streams()
    assert [streams.note(offset, 10) for offset in (0, 10, 500, 20, 510, 35)] == [
        10,
        20,
        10,
        30,
        20,
        10,
    ]
    assert streams.note(20, 10) == 10, "again from where it was is no continuation"


def test_oldest_stream_is_forgotten_first() -> None:
    streams = Streams()
    for number in range(STREAMS + 1):
        streams.note(number * 1000, 10)
    assert streams.note(10, 10) == 10, "the first is forgotten"
    assert streams.note(STREAMS * 1000 + 10, 10) == 20
