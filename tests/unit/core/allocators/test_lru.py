# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of use of frames, against a list."""

from __future__ import annotations

import random

import pytest

from zswapd.core.allocators.lru import Lru
from zswapd.errors import InvariantError

FRAMES = 40


@pytest.fixture
def lru() -> Lru:
    made = Lru(FRAMES)
    made.populate(0, FRAMES)
    return made


def test_order_is_that_of_the_last_use(lru: Lru) -> None:
    assert (lru.oldest(), list(lru), lru.entries) == (0, [], 0)
    for frame in (7, 3, 39, 1):
        lru.add(frame)
    lru.touch(3)
    lru.touch(3)
    assert (lru.oldest(), list(lru), lru.entries) == (7, [7, 39, 1, 3], 4)
    lru.remove(7)
    assert list(lru) == [39, 1, 3]
    lru.touch(39)
    lru.remove(3)
    assert list(lru) == [1, 39]
    lru.check()


def test_any_sequence_is_as_a_list_would_have_it(lru: Lru) -> None:
    rng = random.Random(1)
    model: list[int] = []
    for _ in range(5000):
        frame = rng.randrange(1, FRAMES)
        if frame not in model:
            lru.add(frame)
            model.append(frame)
        elif rng.random() < 0.5:
            lru.touch(frame)
            model.remove(frame)
            model.append(frame)
        else:
            lru.remove(frame)
            model.remove(frame)
        lru.check()
        assert list(lru) == model
        assert [frame for frame in range(FRAMES) if frame in lru] == sorted(model)
        assert lru.oldest() == (model[0] if model else 0)


def test_what_was_yielded_may_go_meanwhile(lru: Lru) -> None:
    for frame in range(1, 10):
        lru.add(frame)
    seen = []
    for frame in lru:
        seen.append(frame)
        if frame % 2:
            lru.remove(frame)
    assert seen == list(range(1, 10))
    assert list(lru) == [2, 4, 6, 8]


@pytest.mark.parametrize("word", [0, 1, 3 * 2, 3 * 2 + 1, 5 * 2, 5 * 2 + 1])
def test_check_finds_a_broken_link(lru: Lru, word: int) -> None:
    for frame in (3, 5, 8):
        lru.add(frame)
    lru._words[word] ^= 4
    with pytest.raises(InvariantError):
        lru.check()


def test_check_finds_a_wrong_count_and_a_ring_without_an_end(lru: Lru) -> None:
    for frame in (3, 5, 8):
        lru.add(frame)
    lru.entries += 1
    with pytest.raises(InvariantError):
        lru.check()
    lru.entries -= 1
    lru._words[8 * 2] = 3
    with pytest.raises(InvariantError):
        lru.check()
