# SPDX-License-Identifier: GPL-2.0-or-later
"""Which open file may change a block file: what a successor makes of its predecessor's notes,
whenever the predecessor died.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from zswapd.fuse.writers import Writers

FILE, OTHER = 2, 3
REQUEST = 4711


def make() -> tuple[Writers, list[Any]]:
    """Return writers, and what their changes have left for a successor, the newest last."""
    writers = Writers([FILE, OTHER])
    left: list[Any] = []
    writers.when_changed = lambda: left.append(json.loads(json.dumps(writers.remember())))
    return writers, left


def successor_of(left: Any) -> Writers:
    writers = Writers([FILE, OTHER])
    writers.recall(left)
    return writers


def test_files_do_not_feel_each_other() -> None:
    writers, _ = make()
    assert writers.open(FILE, 1)
    assert writers.open(OTHER, 2)
    assert not writers.open(FILE, 3)


def test_successor_refuses_a_second_writer_and_lets_the_first_go_on() -> None:
    writers, _ = make()
    handle = writers.open(FILE, REQUEST)
    heir = successor_of(json.loads(json.dumps(writers.remember())))
    # it is certain: a program may have it open, without a loop device
    heir.settle(FILE, is_attached=False)
    assert not heir.open(FILE, REQUEST + 2)
    assert heir.admit(FILE, handle)
    assert not heir.admit(FILE, handle + (1 << 42))
    heir.close(handle)
    assert heir.open(FILE, REQUEST + 4) not in {0, handle}


def test_open_whose_answer_was_lost_gets_the_same_handle_when_it_comes_again() -> None:
    writers, left = make()
    handle = writers.open(FILE, REQUEST)
    heir = successor_of(left[-1])
    assert heir.open(FILE, REQUEST) == handle
    assert not heir.open(FILE, REQUEST + 2)


def test_open_whose_answer_was_lost_and_that_never_comes_again_locks_nobody_out() -> None:
    writers, left = make()
    writers.open(FILE, REQUEST)
    heir = successor_of(left[-1])
    assert not heir.open(FILE, REQUEST + 2)
    heir.settle(FILE, is_attached=False)
    assert heir.open(FILE, REQUEST + 4)


def test_open_whose_answer_arrived_keeps_its_file_while_a_loop_device_is_over_it() -> None:
    writers, left = make()
    handle = writers.open(FILE, REQUEST)
    heir = successor_of(left[-1])
    heir.settle(FILE, is_attached=True)
    assert not heir.open(FILE, REQUEST + 2)
    assert heir.admit(FILE, handle)


def test_close_that_comes_twice_closes_nobody_else() -> None:
    writers, left = make()
    handle = writers.open(FILE, REQUEST)
    writers.close(handle)
    heir = successor_of(left[-1])
    assert heir.open(FILE, REQUEST + 2) != handle
    heir.close(handle)
    assert not heir.open(FILE, REQUEST + 4)


@pytest.mark.parametrize("handle", [FILE, 9 << 42 | FILE])
def test_predecessor_without_memory_of_handles_leaves_the_file_to_its_loop_device(
    handle: int,
) -> None:
    heir = successor_of(None)
    heir.settle(FILE, is_attached=True)
    assert not heir.open(FILE, REQUEST)
    assert heir.admit(FILE, handle)
    assert not heir.admit(FILE, handle + (1 << 43))
    again = successor_of(json.loads(json.dumps(heir.remember())))
    again.settle(FILE, is_attached=True)
    assert not again.open(FILE, REQUEST)
    again.close(handle)
    again.settle(FILE, is_attached=False)
    assert again.open(FILE, REQUEST)


def test_predecessor_without_memory_of_handles_locks_nobody_out() -> None:
    heir = successor_of(None)
    assert not heir.open(FILE, REQUEST)
    heir.settle(FILE, is_attached=False)
    assert heir.open(FILE, REQUEST + 2)


def test_numberless_handle_of_a_reader_does_not_end_that_of_the_loop_device() -> None:
    heir = successor_of(None)
    assert heir.admit(FILE, FILE)
    heir.close(FILE)
    heir.settle(FILE, is_attached=True)
    assert not heir.open(FILE, REQUEST)
    assert heir.admit(FILE, FILE)


def test_what_the_hook_remembers_is_void_whenever_the_writer_changes() -> None:
    writers, _ = make()
    void: list[int] = []
    writers.when_void = void.append
    handle = writers.open(FILE, 1)
    assert void.pop() == FILE
    writers.close(handle)
    assert void.pop() == FILE


async def test_waiting_ends_when_the_file_is_free(autojump_clock: trio.testing.MockClock) -> None:
    writers, _ = make()
    handle = writers.open(FILE, 1)
    with trio.move_on_after(1) as scope:
        await writers.until_free(FILE, 1)
    assert not scope.cancelled_caught, "the request that has it gets it again"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writers.until_free, FILE, 2)
        await trio.testing.wait_all_tasks_blocked()
        writers.close(handle)
