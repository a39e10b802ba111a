# SPDX-License-Identifier: GPL-2.0-or-later
"""What the supervisor takes for dead, and that it buries it in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from zswapd.supervisor import orphan, reaper
from zswapd.supervisor.reaper import Reaper, exit_status_if_dead

KILLED = 9


def process(proc: Path, *threads: tuple[str, str], status: int = KILLED) -> int:
    """Make up /proc of a process of these threads (name, state), its main one first."""
    for number, (name, state) in enumerate(threads):
        rest = " ".join([state, *["0"] * (reaper._EXIT_CODE - 1), str(status)])
        text = f"{100 + number} ({name}) {rest}\n"
        (proc / "100" / "task" / str(100 + number)).mkdir(parents=True, exist_ok=True)
        (proc / "100" / "task" / str(100 + number) / "stat").write_text(text)
        if not number:
            (proc / "100" / "stat").write_text(text)
    return 100


@pytest.mark.parametrize(
    ("threads", "is_dead"),
    [
        ([("zswapd", "S")], False),
        ([("zswapd", "S"), ("volume0-read", "D")], False),
        ([("zswapd", "Z")], True),
        ([("zswapd", "Z"), ("volume0-read", "D")], True),
        ([("zswapd", "Z"), ("volume0-look", "D"), ("offload", "Z")], True),
        ([("zswapd", "Z"), ("volume0-read", "D"), ("offload", "D")], False),
        ([("zswapd", "Z"), ("backing", "D"), ("volume1-read", "D")], True),
        ([("name) Z 0 (odd", "S")], False),
    ],
)
def test_dead_is_whose_main_thread_is_and_whose_others_do_no_harm(
    tmp_path: Path, threads: list[tuple[str, str]], is_dead: bool
) -> None:
    assert (exit_status_if_dead(process(tmp_path, *threads), tmp_path) == KILLED) is is_dead


def test_no_such_process_is_nobody_s_death(tmp_path: Path) -> None:
    assert exit_status_if_dead(100, tmp_path) is None


def test_status_is_the_one_that_wait_tells() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert exit_status_if_dead(child.pid) is None
    child.send_signal(signal.SIGTERM)
    end = time.monotonic() + 5
    while (status := exit_status_if_dead(child.pid)) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert status is not None
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    left = Reaper()
    left.add(child.pid)
    left.reap()
    left.reap()
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, os.WNOHANG)
    child.returncode = 0


def test_retiring_does_not_wait_for_a_thread_that_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(orphan, "exit_status_if_dead", lambda _pid: 0)
    begin = time.monotonic()
    orphan.retire(child.pid)
    assert time.monotonic() - begin < 5
    child.wait(5)
