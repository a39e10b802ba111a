# SPDX-License-Identifier: GPL-2.0-or-later
"""The spare worker: it waits, becomes what it is told to, and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from zswapd.supervisor.reaper import Reaper
from zswapd.supervisor.spare import Spare


def become(code: int) -> NoReturn:
    os._exit(code)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_spare_becomes_what_it_has_prepared_for() -> None:
    spare = Spare(lambda: 42, become)
    wait_for(lambda: spare.is_ready)
    assert spare.promote()
    assert exit_code(spare.pid) == 42


def test_spare_that_is_not_ready_is_not_promoted() -> None:
    spare = Spare(lambda: time.sleep(60), lambda _: become(0))
    assert not spare.is_ready
    assert not spare.promote()
    spare.end(wait=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(spare.pid, 0)


def test_spare_that_is_killed_and_not_waited_for_is_buried_later() -> None:
    spare = Spare(lambda: time.sleep(60), lambda _: become(0))
    if not spare.end(wait=False):
        remains = Reaper()
        remains.add(spare.pid)
        os.waitid(os.P_PID, spare.pid, os.WEXITED | os.WNOWAIT)
        remains.reap()
    with pytest.raises(ChildProcessError):
        os.waitpid(spare.pid, 0)


def test_spare_that_has_ended_says_so_once_it_has() -> None:
    spare = Spare(lambda: 42, become)
    wait_for(lambda: spare.is_ready)
    assert not spare.has_ended()
    os.kill(spare.pid, signal.SIGKILL)
    wait_for(spare.has_ended)


@pytest.mark.parametrize("is_seen", [False, True])
def test_dead_spare_is_not_promoted(is_seen: bool) -> None:
    spare = Spare(lambda: 42, become)
    wait_for(lambda: spare.is_ready)
    os.kill(spare.pid, signal.SIGKILL)
    if is_seen:
        assert exit_code(spare.pid) == -signal.SIGKILL
    else:
        os.waitid(os.P_PID, spare.pid, os.WEXITED | os.WNOWAIT)
    assert not spare.promote()
    spare.end(wait=True)


def test_spare_whose_preparation_fails_ends(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> int:
        raise MemoryError

    spare = Spare(fail, become)
    assert exit_code(spare.pid) == 1
    assert not spare.promote()
    spare.end(wait=True)
    assert not caplog.records  # it was said in the other process


@pytest.mark.parametrize("is_heard", [False, True])
def test_spare_ends_with_its_parent_and_says_nothing(tmp_path: Path, is_heard: bool) -> None:
    code = f"""if True:
        import os, select, time
        poll = select.poll()
        from zswapd.supervisor.spare import Spare
        spare = Spare(lambda: 0, lambda _: os._exit(0))
        poll.register(spare._line, select.POLLIN)
        poll.poll()
        assert not {is_heard} or spare.is_ready
        open({str(tmp_path / "pid")!r}, "w").write(str(spare.pid))
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, timeout=30
    )
    assert done.stderr == b""
    pid = int((tmp_path / "pid").read_text())
    wait_for(
        lambda: (
            not Path(f"/proc/{pid}").exists()
            or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
        )
    )


@pytest.mark.slow
def test_spare_whose_parent_dies_before_it_is_ready_ends_in_silence(tmp_path: Path) -> None:
    code = """
import os, sys, time
from zswapd.supervisor.spare import Spare
def prepare():
    while os.getppid() == PARENT:
        time.sleep(0.01)
PARENT = os.getpid()
Spare(prepare, lambda _: os._exit(9))
os._exit(0)
"""
    with (tmp_path / "said").open("w") as said:
        subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=said, stderr=said, timeout=20
        )
    time.sleep(0.5)
    assert (tmp_path / "said").read_text() == ""
