# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker's side of the disk: the key, and the loop that writes back."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from zswapd.handover.key import find_key, make_key
from zswapd.worker import disk
from zswapd.worker.disk import COMPACT_TURNS, BackedPool


class _State:
    def __init__(self) -> None:
        self.areas = {
            "backing.key": memoryview(bytearray(64)),
            "backing.key.copy": memoryview(bytearray(mmap.PAGESIZE + 72)),
        }

    def area(self, name: str) -> memoryview:
        return self.areas[name]


def test_key_is_random_and_each_state_has_its_own(expect_log: Callable[..., None]) -> None:
    expect_log("key of the backing has changed in memory", level=logging.ERROR, count=4)
    keys = set()
    for _ in range(4):
        state = _State()
        make_key(state)  # type: ignore[arg-type]
        key = bytes(state.areas["backing.key"])
        keys |= {key[:32], key[32:]}
        state.areas["backing.key"][7] ^= 1
        assert bytes(find_key(state)) == key  # type: ignore[arg-type]
    assert len(keys) == 8
    assert all(len(set(key)) > 16 for key in keys)


class _Writeback:
    """Steps that find nothing, then pages, then nothing for good."""

    def __init__(self, steps: list[tuple[int, bool]]) -> None:
        self.steps = steps
        self.in_flight = 0
        self.commanded = 0
        self.is_looking = False

    def look(self) -> bool:
        return False

    def wanted(self) -> str:
        return "limit" if self.steps else ""

    def step(self, _why: str) -> int:
        begun, self.is_looking = self.steps.pop(0)
        return begun


def run(writeback: _Writeback, seconds: float) -> int:
    """Let the loop run for so long; return how often it compacted, which always pays."""
    moved = []
    core: Any = SimpleNamespace(
        writeback=writeback, wants_compaction=lambda: True, compact_step=lambda: moved.append(1)
    )
    pool = BackedPool.__new__(BackedPool)
    pool.transfers = SimpleNamespace(kick=lambda: None)  # type: ignore[assignment]

    async def until_then() -> None:
        with trio.move_on_after(seconds):
            await pool._write_back(core)

    trio.run(until_then, clock=trio.testing.MockClock(autojump_threshold=0))
    return len(moved)


def test_writeback_that_has_only_found_empty_pages_goes_on_at_once_and_what_is_stuck_waits() -> (
    None
):
    looking = _Writeback([(0, True)] * 500 + [(5, False)])
    run(looking, disk.LOOK_S * 1.5)
    assert looking.steps == []
    stuck = _Writeback([(0, False)] * 500)
    run(stuck, disk.LOOK_S * 3.5)
    assert len(stuck.steps) == 497, "one try a look"


def test_compaction_makes_frames_of_the_holes_while_pages_go() -> None:
    assert run(_Writeback([(5, False)] * COMPACT_TURNS * 3), 1.0) == 3
