# SPDX-License-Identifier: GPL-2.0-or-later
"""Every signal to every process of a daemon: what docs/survival.md says becomes of it,
with a file that is served meanwhile.

Nothing is swapped on here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.roles import Roles
from tests.support.swap import wait_for
from zswapd.system.signals import FAULTS, name_of

pytestmark = pytest.mark.mount

DEADLY = {*FAULTS, signal.SIGKILL}
"""A worker that gets one is followed by another."""
ALL = range(1, 65)
NOTHING = {
    "supervisor": {*ALL}
    - {signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGHUP},
    "worker": {*ALL} - DEADLY - {signal.SIGSTOP},
    "spare": {*ALL} - DEADLY - {signal.SIGSTOP},
}
"""The signals that change nothing, by the process that gets them."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Roles]:
    roles = Roles(tmp_path, service__hang_timeout="1")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(roles.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        roles.wait_until_it_serves()
        yield roles
        if process.poll() is None:
            process.terminate()
        assert process.wait(30) == 0
        roles.wait_until_nothing_is_left()
    finally:
        roles.kill()
        process.wait(10)
        print((tmp_path / "log").read_text())


def seconds_between(log: str, first: str, then: str) -> int:
    """Return the time from one line of a log to another."""
    clocks = []
    for text in (first, then):
        line = next(line for line in log.splitlines() if text in line)
        hours, minutes, seconds = map(int, line.split(" ")[0].split(":"))
        clocks.append(hours * 3600 + minutes * 60 + seconds)
    return (clocks[1] - clocks[0]) % 86400


def log_of(daemon: Roles) -> str:
    return (daemon.directory / "log").read_text()


def test_signals_that_change_nothing(daemon: Roles) -> None:
    before = {"supervisor": daemon.supervisor, "worker": daemon.worker, "spare": daemon.spare}
    for number in ALL:
        for role, pid in before.items():
            if number in NOTHING[role]:
                os.kill(pid, number)
    daemon.verify()
    time.sleep(1.2)  # two looks of the supervisor
    daemon.verify()
    assert {
        "supervisor": daemon.supervisor,
        "worker": daemon.worker,
        "spare": daemon.spare,
    } == before
    assert f"from process {os.getpid()} is ignored" in log_of(daemon)
    assert "is ignored: SIGTERM and SIGINT end the daemon" in log_of(daemon)


def test_death_of_a_worker_is_survived(daemon: Roles, expect_output: Callable[..., object]) -> None:
    expect_output("Fatal Python error")  # it says where it was
    supervisor = daemon.supervisor
    for number in sorted(DEADLY):
        old = daemon.worker
        os.kill(old, number)
        daemon.next_worker(old)
        assert f"worker {old} died: {name_of(number)}" in log_of(daemon)
    assert daemon.supervisor == supervisor


def test_death_of_a_spare_is_survived(daemon: Roles) -> None:
    old = daemon.spare
    worker = daemon.worker
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: "the spare worker" in log_of(daemon), "the supervisor has not noticed")
    os.kill(worker, signal.SIGKILL)
    daemon.next_worker(worker)


def test_stopped_spare_takes_over_all_the_same(daemon: Roles) -> None:
    worker, spare = daemon.worker, daemon.spare
    time.sleep(1)  # until it has its memory
    os.kill(spare, signal.SIGSTOP)
    begin = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    assert daemon.next_worker(worker) == spare
    assert time.monotonic() - begin < 5


def test_stopped_worker_is_replaced(daemon: Roles) -> None:
    worker = daemon.worker
    os.kill(worker, signal.SIGSTOP)
    daemon.next_worker(worker)


def test_worker_of_a_stopped_supervisor_serves(daemon: Roles) -> None:
    supervisor, worker = daemon.supervisor, daemon.worker
    os.kill(supervisor, signal.SIGSTOP)
    try:
        daemon.verify()
        assert daemon.worker == worker
    finally:
        os.kill(supervisor, signal.SIGCONT)


def test_sighup_reads_the_settings_again_and_goes_on(daemon: Roles) -> None:
    supervisor, old = daemon.supervisor, daemon.worker
    os.kill(supervisor, signal.SIGHUP)
    daemon.next_worker(old)
    assert daemon.supervisor == supervisor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_supervisor_is_asked_to_end(daemon: Roles, number: int) -> None:
    os.kill(daemon.supervisor, number)
    daemon.wait_until_nothing_is_left()


def test_orphan_hears_the_next_supervisor_only(tmp_path: Path) -> None:
    roles = Roles(tmp_path)
    with contextlib.ExitStack() as undo:
        log = undo.enter_context((tmp_path / "log").open("wb"))
        undo.callback(roles.kill)
        first = subprocess.Popen(roles.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        roles.wait_until_it_serves()
        worker = roles.worker
        first.kill()
        first.wait(10)
        wait_for(lambda: roles.all() == {worker: "zswapd-worker"}, "the spare lives on")
        for number in {*ALL} - DEADLY - {signal.SIGSTOP, signal.SIGTERM, signal.SIGINT}:
            os.kill(worker, number)
        time.sleep(0.5)
        roles.verify()
        assert roles.worker == worker
        second = subprocess.Popen(roles.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        roles.next_worker(worker)
        # It was asked and has left; one that has to be killed is waited for 10 s before.
        assert seconds_between(log_of(roles), "has lost its supervisor", "worker 2 serves") < 8
        second.terminate()
        assert second.wait(30) == 0
        roles.wait_until_nothing_is_left()
