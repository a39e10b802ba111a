# SPDX-License-Identifier: GPL-2.0-or-later
"""Crash points: an armed point kills at the right time, and others cost at most 20 ns."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.support.compiled import PACKAGE, is_compiled
from tests.support.stack import build
from tests.support.strategies import page
from zswapd.core import crashpoints
from zswapd.core.block.device import Device


def _fate(work: Callable[[], None]) -> int:
    """Return the signal that ended a forked process doing the work, or 0."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    _pid, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.parametrize(
    ("nth", "reached", "dies"), [(1, 1, True), (1, 5, True), (3, 2, False), (3, 3, True)]
)
def test_point_kills_when_it_is_reached_for_the_nth_time(
    nth: int, reached: int, dies: bool
) -> None:
    def work() -> None:
        crashpoints.arm("store_alive", nth)
        for _ in range(reached):
            crashpoints.reach(crashpoints.STORE_CHECKED)
            crashpoints.reach(crashpoints.STORE_ALIVE)

    assert _fate(work) == (signal.SIGKILL if dies else 0)


def test_nothing_is_armed_by_itself_or_after_disarming() -> None:
    def work() -> None:
        for number, _ in crashpoints.POINTS.values():
            crashpoints.reach(number)
        crashpoints.arm("store_alive")
        crashpoints.disarm()
        crashpoints.reach(crashpoints.STORE_ALIVE)

    assert _fate(work) == 0


@pytest.mark.parametrize(
    ("text", "reached", "dies"),
    [("store_alive", 1, True), ("store_alive:2", 1, False), ("store_alive:2", 2, True)],
)
def test_environment_arms(text: str, reached: int, dies: bool) -> None:
    def work() -> None:
        assert crashpoints.arm_from_environment({"ZSWAPD_CRASH": text})
        for _ in range(reached):
            crashpoints.reach(crashpoints.STORE_ALIVE)

    assert _fate(work) == (signal.SIGKILL if dies else 0)


@pytest.mark.parametrize(
    ("text", "worker", "is_takeover", "armed"),
    [
        ("takeover_page", 2, True, True),
        ("takeover_page", 2, False, False),
        ("store_alive", 2, True, False),
        ("store_alive", 2, False, True),
        ("takeover_page:1:kill:2", 2, True, True),
        ("takeover_page:1:kill:2", 3, True, False),
    ],
)
def test_points_of_a_takeover_are_armed_before_it_and_only_in_the_worker_that_is_meant(
    text: str, worker: int, is_takeover: bool, armed: bool
) -> None:
    try:
        assert (
            crashpoints.arm_from_environment(
                {"ZSWAPD_CRASH": text}, worker, is_takeover=is_takeover
            )
            is armed
        )
    finally:
        crashpoints.disarm()


def test_environment_that_says_nothing_arms_nothing() -> None:
    assert not crashpoints.arm_from_environment({})
    assert not crashpoints.arm_from_environment({"ZSWAPD_CRASH": ""})


@pytest.mark.parametrize("text", ["nowhere", "store_alive:0", "store_alive:-1", "store_alive:x"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no crash point|invalid literal"):
        crashpoints.arm_from_environment({"ZSWAPD_CRASH": text})


def test_every_point_has_a_number_of_its_own_and_a_place_in_the_code() -> None:
    numbers = [number for number, _ in crashpoints.POINTS.values()]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert set(re.findall(r"reach\(crashpoints\.(\w+)\)", text)) == {
        name.upper() for name in crashpoints.POINTS
    }
    for name, (number, meaning) in crashpoints.POINTS.items():
        assert getattr(crashpoints, name.upper()) == number
        assert meaning


@pytest.mark.skipif(
    not is_compiled(),
    reason=(
        "a point costs 20 ns or less where the page path is compiled; this run is on plain Python"
    ),
)
def test_points_are_a_small_part_of_a_store() -> None:
    # From Python a call of `reach` costs an entry into compiled code on top (some 40 ns), which the
    # compiled page path does not have; a loop that calls something as small in the same way is
    # taken off.
    stack = build(frames=600, node_reserve=600)
    device = Device("swap", 512 * 4096, stack.frontswap, 0, page_size=4096)
    data = memoryview(page("words", 1, 4096))

    def stores() -> None:
        for number in range(500):
            device.write(number * 4096, data)

    def calls(function: Callable[[int], object]) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(50_000):
                function(3)

        return loop

    def best(work: Callable[[], None], count: int) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times) / count

    a_store = best(stores, 500)
    a_point = best(calls(crashpoints.reach), 50_000) - best(calls(abs), 50_000)
    stack.close()
    assert a_point < 20e-9 * max(1.0, a_store / 5e-6), (
        "a machine at which a store takes longer may take longer for this"
    )
