# SPDX-License-Identifier: GPL-2.0-or-later
"""Starts that end before anything is served leave nothing, whatever ends them;
and closed standard files end none.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import TOP
from tests.support.roles import Roles
from tools.bench.harness.daemon import program
from zswapd.errors import ConfigError, ControlError

pytestmark = pytest.mark.mount

EXCEPTIONS = (
    "OSError",
    "MemoryError",
    "KeyboardInterrupt",
    "ImportError",
    "AssertionError",
    "SystemExit",
    "RuntimeError",
    "ZswapdError",
)
STEPS = (
    "supervisor/settings.py:choose",
    "control/listener.py:_claim",
    "control/listener.py:_listen",
    "core/allocators/arena.py:Arena.populate",
    "fuse/mount.py:Mount._make_mountpoint",
    "fuse/mount.py:Mount._mount",
    "fuse/mount.py:_mounted@3",
    "handover/state.py:SharedState.new",
    "system/code.py:populate",
    "supervisor/supervisor.py:Supervisor.__init__",
    "supervisor/supervisor.py:Supervisor._fork",
    "supervisor/watchdog.py:Watchdog.begin",
    "supervisor/supervisor.py:Supervisor._patience",
    "system/signals.py:SignalFile.wait",
    "worker/prepare.py:prepare",
    "worker/assembly.py:build",
    "core/core.py:Core.self_test",
    "fuse/session.py:Session.open",
    "control/server.py:Server.serve",
    "worker/worker.py:Worker._say_ready",
)
"""Those of a start that make something, or stand between two that do;
a few others come from all that there are.
"""
OTHERS = 6
CLOSED = {
    "input": (0,),
    "output": (1,),
    "errors": (2,),
    "output and errors": (1, 2),
    "all": (0, 1, 2),
}


def fail_at(directory: Path, *words: str) -> list[dict[str, Any]]:
    """Start a daemon for each word, see failing_start.py; return what has become of them."""
    done = _failing_start(directory, *words)
    return [json.loads(line) for line in done.splitlines()]


def _failing_start(directory: Path, *words: str) -> str:
    command = [sys.executable, "-m", "tests.support.failing_start", str(directory), *words]
    done = subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True, timeout=200)
    return done.stdout


def test_exception_at_any_step_of_a_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    steps = _failing_start(tmp_path / "a", "list").splitlines()
    before = list(dict.fromkeys(steps[: steps.index("worker/worker.py:Worker._say_ready")]))
    assert {step.partition("@")[0] for step in STEPS} <= {
        *before,
        "worker/worker.py:Worker._say_ready",
    }
    chosen = [*STEPS, *random.sample(before, OTHERS)]
    kinds = random.sample(EXCEPTIONS, len(EXCEPTIONS))
    words = [f"{step}={kinds[number % len(kinds)]}" for number, step in enumerate(chosen)]
    (tmp_path / "b").mkdir()
    outcomes = fail_at(tmp_path / "b", *words)
    assert len(outcomes) == len(words)
    for outcome in outcomes:
        assert outcome["left"] == [], outcome
        assert (outcome["code"] == 0) is outcome["serves"], outcome
        assert outcome["serves"] or outcome["output"] or outcome["exception"] == "SystemExit", (
            outcome
        )
    ends = {outcome["step"] for outcome in outcomes if not outcome["serves"]}
    assert set(STEPS) - ends <= {"worker/worker.py:Worker._say_ready"}


def test_first_worker_that_is_killed_again_and_again_leaves_nothing(tmp_path: Path) -> None:
    (outcome,) = fail_at(tmp_path, "worker/assembly.py:build=SIGKILL")
    assert outcome["code"] == 1
    assert outcome["left"] == []
    assert "no worker has come to serve" in outcome["output"]


def test_start_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    starts = []
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        roles = Roles(tmp_path / str(number))
        process = subprocess.Popen(
            roles.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        starts.append((roles, process))
    try:
        for number, (_, process) in enumerate(starts):
            time.sleep(0.3 + 0.2 * random.random())
            process.send_signal((signal.SIGTERM, signal.SIGINT)[number % 2])
        for roles, process in starts:
            process.wait(60)
            roles.wait_until_nothing_is_left()
    finally:
        for roles, process in starts:
            roles.kill()
            process.wait(10)


@pytest.mark.parametrize("which", CLOSED.values(), ids=CLOSED)
def test_daemon_without_standard_files_serves(tmp_path: Path, which: Sequence[int]) -> None:
    roles = Roles(tmp_path)
    with contextlib.ExitStack() as undo:
        undo.callback(roles.kill)
        process = subprocess.Popen(
            closing(which, roles.command), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        undo.callback(process.kill)
        roles.wait_until_it_serves()
        for pid in (roles.supervisor, roles.worker, roles.spare):
            for number in which:
                assert os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null"
        worker = roles.worker
        os.kill(worker, signal.SIGABRT)
        roles.next_worker(worker)
        process.terminate()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert b"Traceback" not in errors
        assert (b"worker 2 serves" in errors) is (2 not in which)
        roles.wait_until_nothing_is_left()


def closing(which: Sequence[int], command: Sequence[str]) -> list[str]:
    """Return a command that runs another one without some standard files."""
    redirections = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in which)
    return ["sh", "-c", f'exec "$@" {redirections}', "sh", *command]


COMMANDS: dict[str, tuple[list[str], int]] = {
    "config": ([*program("zswapd"), "config", "defaults"], 0),
    "wrong": ([*program("zswapd"), "run", "--set", "nosuch.setting=1"], ConfigError.exit_code),
    "status": (
        [*program("zswapctl"), "--socket", "/nonexistent", "status"],
        ControlError.exit_code,
    ),
}


@pytest.mark.parametrize(("command", "code"), COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_commands_without_standard_files_end_as_with_them(
    command: list[str], code: int, which: Sequence[int]
) -> None:
    done = subprocess.run(closing(which, command), check=False, capture_output=True, timeout=30)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr
    assert 2 in which or bool(done.stderr) is bool(code)


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-n 12", "Too many open files"),
        ("-f 100", "ulimit -f unlimited"),
        ("-t 5", "ulimit -t unlimited"),
    ],
)
def test_start_under_a_limit_that_cannot_be_lifted_says_so(
    tmp_path: Path, limit: str, words: str
) -> None:
    roles = Roles(tmp_path)
    command = [
        "bash",
        "-c",
        f'ulimit {limit} && exec setpriv --bounding-set=-sys_resource "$@"',
        "bash",
        *roles.command,
    ]
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        # `ulimit -f` would cut byte code short too, and Python takes such a file for whole.
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode in (1, 4, 9)
    assert words in done.stderr
    assert roles.leftovers() == []
