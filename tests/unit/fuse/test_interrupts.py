# SPDX-License-Identifier: GPL-2.0-or-later
"""Which readers are let go when the kernel says that a request was interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from zswapd.fuse import interrupts
from zswapd.fuse.interrupts import Interrupts

THREAD = 4711
RUNNING = "Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n"


class Hook:
    """Says which request the handler that runs is for."""

    def __init__(self) -> None:
        self.number = 0

    def current(self) -> tuple[int, int]:
        """The number of the next request, and the thread that made it."""
        self.number += 1
        return self.number, THREAD


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(interrupts, "lowlevel", Hook())
    (tmp_path / str(THREAD)).mkdir()
    (tmp_path / str(THREAD) / "status").write_text(RUNNING)
    return tmp_path


@pytest.mark.parametrize(
    ("status", "is_let_go"),
    [
        (RUNNING, False),
        (RUNNING.replace("SigPnd:\t0000000000000000", "SigPnd:\t0000000000004000", 1), False),
        (RUNNING.replace("SigPnd:\t0000000000000000", "SigPnd:\t0000000000000100", 1), True),
        (RUNNING.replace("ShdPnd:\t0000000000000000", "ShdPnd:\t0000000000004100"), True),
        (None, True),
    ],
    ids=["nothing pending", "alarm", "killed", "process killed", "gone"],
)
async def test_only_whoever_is_killed_is_let_go(
    proc: Path, status: str | None, is_let_go: bool, autojump_clock: trio.testing.MockClock
) -> None:
    file = proc / str(THREAD) / "status"
    if status is None:
        file.unlink()
    else:
        file.write_text(status)
    guard = Interrupts(proc)
    ended: list[str] = []

    async def wait(name: str) -> None:
        with guard.letting_go():
            await trio.sleep(60)
            ended.append(f"{name} was answered")
            return
        ended.append(f"{name} was let go")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.run)
        async with trio.open_nursery() as waiting:
            waiting.start_soon(wait, "interrupted")
            await trio.testing.wait_all_tasks_blocked()
            waiting.start_soon(wait, "other")
            await trio.testing.wait_all_tasks_blocked()
            guard.interrupt(1)
            guard.interrupt(77)  # answered long ago
        nursery.cancel_scope.cancel()
    # The kernel does not say that the other, a direct reader, was killed. If its thread is gone,
    # another process may wait for the data.
    other = is_let_go and status is not None
    outcome = {True: "let go", False: "answered"}
    assert sorted(ended) == [f"interrupted was {outcome[is_let_go]}", f"other was {outcome[other]}"]
    assert guard.let_go == is_let_go + other


async def test_whoever_is_killed_later_is_let_go_then(
    proc: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The kernel tells of the first signal only."""
    guard = Interrupts(proc)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.run)

        async def be_killed() -> None:
            await trio.sleep(5)
            (proc / str(THREAD) / "status").write_text(
                RUNNING.replace("SigPnd:\t0000000000000000", "SigPnd:\t0000000000000100", 1)
            )

        nursery.start_soon(be_killed)
        begin = trio.current_time()
        with guard.letting_go():
            guard.interrupt(1)
            await trio.sleep(60)
        assert 5 <= trio.current_time() - begin < 6
        nursery.cancel_scope.cancel()


async def test_many_that_are_killed_at_once_go_at_once(
    proc: Path, autojump_clock: trio.testing.MockClock
) -> None:
    guard = Interrupts(proc)

    async def wait() -> None:
        with guard.letting_go():
            await trio.sleep(60)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.run)
        async with trio.open_nursery() as waiting:
            for _ in range(10 * interrupts.REQUESTS_PER_STEP):
                waiting.start_soon(wait)
            await trio.sleep(5)
            (proc / str(THREAD) / "status").write_text(
                RUNNING.replace("SigPnd:\t00000000000000", "SigPnd:\t00000000000001", 1)
            )
            begin = trio.current_time()
        assert trio.current_time() - begin <= 2 * interrupts.LOOK_S
        assert guard.let_go == 10 * interrupts.REQUESTS_PER_STEP
        nursery.cancel_scope.cancel()


async def test_without_the_hook_nobody_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "lowlevel", None)
    guard = Interrupts()
    with guard.letting_go() as scope:
        guard.interrupt(0)
        await trio.lowlevel.checkpoint()
    assert not scope.cancelled_caught
