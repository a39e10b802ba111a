# SPDX-License-Identifier: GPL-2.0-or-later
"""A stop that is asked for, refused, asked for again: which worker is told, and when it ends."""

from __future__ import annotations

import pytest

from zswapd.handover.state import Word
from zswapd.supervisor.stop import STOP_AGAIN_S, StopRequest


@pytest.fixture
def words() -> memoryview[int]:
    return memoryview(bytearray(8 * len(Word))).cast("Q")


def refuse(words: memoryview[int]) -> None:
    words[Word.STOPS_REFUSED] += 1


def test_a_worker_is_told_once_and_its_successor_again(words: memoryview[int]) -> None:
    stopping = StopRequest(words, is_awaited=False)
    assert not stopping.is_due(0.0)
    stopping.want()
    assert stopping.is_under_way()
    assert [stopping.is_due(now) for now in (1.0, 2.0, 1000.0)] == [True, False, False]
    stopping.forget_worker()  # it died before it was done
    assert [stopping.is_due(now) for now in (1001.0, 1002.0)] == [True, False]
    assert stopping.is_under_way()


@pytest.mark.parametrize("dies_at_once", [False, True])
def test_a_stop_that_is_refused_is_over_until_it_is_asked_for_again(
    words: memoryview[int], dies_at_once: bool
) -> None:
    stopping = StopRequest(words, is_awaited=False)
    stopping.want()
    assert stopping.is_due(1.0)
    refuse(words)
    assert dies_at_once or not stopping.is_due(2.0)
    stopping.forget_worker()
    assert not stopping.is_wanted
    assert not stopping.is_under_way()
    assert not stopping.is_due(1000.0)
    stopping.want()
    assert stopping.is_under_way()
    assert stopping.is_due(1001.0)


def test_where_somebody_waits_for_the_end_it_is_tried_again(words: memoryview[int]) -> None:
    stopping = StopRequest(words, is_awaited=True)
    stopping.want()
    assert stopping.is_due(1.0)
    refuse(words)
    assert not stopping.is_due(1.5)
    assert stopping.is_wanted
    assert not stopping.is_under_way()  # it may serve for long: with a spare
    assert [stopping.is_due(now) for now in (STOP_AGAIN_S, 1.0 + STOP_AGAIN_S)] == [False, True]
    assert stopping.is_under_way()
