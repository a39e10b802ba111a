# SPDX-License-Identifier: GPL-2.0-or-later
"""The thread for blocking calls: one thread for all, results and errors go to the waiting task."""

from __future__ import annotations

import os
import threading
import time

import pytest
import trio

from tests.support import capabilities
from zswapd.errors import ArenaError
from zswapd.system.offload import Offload


async def test_results_come_back_and_the_loop_runs_meanwhile() -> None:
    offload = Offload()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await trio.sleep(0.01)

    def work(one: int, other: int) -> int:
        time.sleep(0.1)
        return one + other

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        assert await offload.run(work, 2, 3) == 5
        nursery.cancel_scope.cancel()
    assert ticks > 3


async def test_error_is_raised_where_it_is_waited_for_and_the_thread_lives_on() -> None:
    offload = Offload()

    def fail() -> None:
        raise ArenaError("no memory")

    with pytest.raises(ArenaError, match="no memory"):
        await offload.run(fail)
    assert await offload.run(lambda: 7) == 7


async def test_all_jobs_run_in_one_thread_that_was_there_before() -> None:
    before = threading.active_count()
    offload = Offload()
    assert threading.active_count() == before + 1
    idents = {await offload.run(threading.get_ident) for _ in range(20)}
    assert len(idents) == 1
    assert threading.active_count() == before + 1


@capabilities.requires_root()
async def test_idle_task_is_made_an_ordinary_one_while_it_works() -> None:
    offload = Offload()

    def work() -> int:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        begun.set()
        until = time.monotonic() + 10
        while os.sched_getscheduler(0) == os.SCHED_IDLE and time.monotonic() < until:
            time.sleep(0.01)
        return os.sched_getscheduler(0)

    async def hurry() -> None:
        while not begun.is_set():
            await trio.sleep(0.01)
        offload.hurry()

    begun = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hurry)
        assert await offload.run(work) == os.SCHED_OTHER


async def test_cancelled_waiter_waits_until_the_job_is_done() -> None:
    offload = Offload()
    finished = []

    def work() -> None:
        time.sleep(0.1)
        finished.append(1)

    with trio.move_on_after(0.01):
        await offload.run(work)
    assert finished == [1]
