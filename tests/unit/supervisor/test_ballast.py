# SPDX-License-Identifier: GPL-2.0-or-later
"""Ballast is thrown when nothing moves, kept while anything does, and taken back in good times."""

from __future__ import annotations

import errno
import logging
import mmap
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from zswapd.core.reclaim.pressure import Marks
from zswapd.supervisor.ballast import PIECE_BYTES, PIECES, STILL_LOOKS, Ballast

PLENTY = Marks(above_low=1 << 20, above_high=1 << 20, spare=1 << 20)
ENOUGH = Marks(above_low=100, above_high=-100, spare=0)
NONE = Marks(above_low=-10, above_high=-1000, spare=0)


@dataclass
class FakePressure:
    now: Marks | None = PLENTY

    def marks(self) -> Marks | None:
        return self.now


@pytest.fixture
def pressure() -> FakePressure:
    return FakePressure()


@pytest.fixture
def ballast(pressure: FakePressure) -> Iterator[Ballast]:
    ballast = Ballast(pressure)  # type: ignore[arg-type]
    for requests in range(PIECES):
        ballast.look(requests)
    assert ballast.bytes_held == PIECES * PIECE_BYTES
    yield ballast
    ballast.close()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_ballast_is_memory_that_comes_free(
    ballast: Ballast, pressure: FakePressure, expect_log: Any
) -> None:
    expect_log("2 MiB given back", level=logging.WARNING, count=PIECES)
    before = resident()
    pressure.now = NONE
    for _ in range(PIECES + STILL_LOOKS):
        ballast.look(7)
    assert ballast.bytes_held == 0
    assert before - resident() > PIECES * PIECE_BYTES * 3 // 4


def test_ballast_is_never_more_than_its_pieces(ballast: Ballast) -> None:
    for requests in range(10):
        ballast.look(requests)
    assert ballast.bytes_held == PIECES * PIECE_BYTES


def test_ballast_is_kept_while_requests_come(ballast: Ballast, pressure: FakePressure) -> None:
    pressure.now = NONE
    for requests in range(20):
        ballast.look(requests)
    assert ballast.bytes_held == PIECES * PIECE_BYTES


@pytest.mark.parametrize("marks", [ENOUGH, PLENTY, None])
def test_ballast_is_kept_by_an_idle_box_that_has_memory(
    ballast: Ballast, pressure: FakePressure, marks: Marks | None
) -> None:
    pressure.now = marks
    for _ in range(20):
        ballast.look(7)
    assert ballast.bytes_held == PIECES * PIECE_BYTES


def test_ballast_is_taken_back_only_where_there_is_plenty(
    ballast: Ballast, pressure: FakePressure, expect_log: Any
) -> None:
    expect_log("2 MiB given back", level=logging.WARNING, count=1)
    pressure.now = NONE
    for _ in range(STILL_LOOKS + 1):
        ballast.look(7)
    assert ballast.bytes_held == (PIECES - 1) * PIECE_BYTES
    pressure.now = ENOUGH
    ballast.look(8)
    assert ballast.bytes_held == (PIECES - 1) * PIECE_BYTES
    pressure.now = PLENTY
    ballast.look(9)
    assert ballast.bytes_held == PIECES * PIECE_BYTES


def test_memory_that_is_refused_is_no_ballast(
    pressure: FakePressure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    ballast = Ballast(pressure)  # type: ignore[arg-type]
    ballast.look(1)
    assert ballast.bytes_held == 0
