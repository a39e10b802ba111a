# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon that was started in a terminal: nothing that the terminal or its shell does keeps a
reader of its file waiting.

Nothing is swapped on here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.roles import Roles
from tests.support.swap import wait_for
from tests.support.terminal import CTRL_BACKSLASH, CTRL_C, CTRL_Z, Terminal
from zswapd.errors import MountError

pytestmark = pytest.mark.mount


@pytest.fixture
def roles(tmp_path: Path) -> Iterator[Roles]:
    made = Roles(tmp_path)
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
def terminal(roles: Roles) -> Iterator[Terminal]:
    del roles  # its processes are ended last
    with Terminal() as made:
        yield made
        print(made.read())


def start(roles: Roles, terminal: Terminal, suffix: str = "") -> dict[str, int]:
    """Start the daemon in the terminal; return its processes."""
    terminal.enter(shlex.join(roles.command) + suffix)
    terminal.wait_for("ready: serving")
    roles.wait_until_it_serves()
    return {"supervisor": roles.supervisor, "worker": roles.worker, "spare": roles.spare}


def state(pid: int) -> str:
    """Return the kernel's letter for what a process is at; T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def goes_on(roles: Roles, before: dict[str, int]) -> None:
    """Hold that the same processes serve, and that none is stopped."""
    roles.verify()
    assert {"supervisor": roles.supervisor, "worker": roles.worker, "spare": roles.spare} == before
    assert [state(pid) for pid in before.values() if state(pid) == "T"] == []


@pytest.mark.parametrize(
    "suffix", ["", " &", " 2>&1 | cat"], ids=["foreground", "background", "pipe"]
)
def test_keys_of_job_control_stop_nothing(roles: Roles, terminal: Terminal, suffix: str) -> None:
    terminal.enter("stty tostop")
    before = start(roles, terminal, suffix)
    for keys in (CTRL_Z, CTRL_BACKSLASH, CTRL_Z):
        terminal.press(keys)
        time.sleep(0.3)
        terminal.read()
        goes_on(roles, before)
    os.kill(before["supervisor"], signal.SIGTERM)
    roles.wait_until_nothing_is_left()


def test_ctrl_c_ends_it_in_order(roles: Roles, terminal: Terminal) -> None:
    start(roles, terminal)
    terminal.press(CTRL_C)
    roles.wait_until_nothing_is_left()
    terminal.enter("echo it ended with $?.")
    terminal.wait_for("it ended with 0.")


def test_signals_of_the_shell_to_the_job_keep_no_reader_waiting(
    roles: Roles, terminal: Terminal
) -> None:
    before = start(roles, terminal, " &")
    for number in ("STOP", "CONT", "TSTP", "TTIN", "TTOU"):
        terminal.enter(f"kill -{number} %1")
        time.sleep(0.3)
        roles.verify()
    goes_on(roles, before)
    # the interpreter's sigtimedwait makes one up after a stop
    assert "signal " not in terminal.read()
    terminal.enter("kill -KILL %1")
    wait_for(lambda: not Path(f"/proc/{before['supervisor']}").exists(), "the supervisor lives")
    roles.verify()
    assert roles.worker == before["worker"]


@pytest.mark.parametrize("suffix", ["", " &"], ids=["foreground", "background"])
def test_end_of_the_terminal_changes_nothing(roles: Roles, terminal: Terminal, suffix: str) -> None:
    before = start(roles, terminal, suffix)
    terminal.hang_up()
    terminal.shell.wait(10)
    time.sleep(0.7)  # a look of the supervisor, which may have something to log
    goes_on(roles, before)
    os.kill(before["worker"], signal.SIGKILL)  # the log goes nowhere
    roles.next_worker(before["worker"])
    os.kill(before["supervisor"], signal.SIGTERM)
    roles.wait_until_nothing_is_left()


def test_screen_that_is_not_read_makes_nobody_wait(
    roles: Roles, terminal: Terminal, expect_output: Callable[..., object]
) -> None:
    expect_output("Fatal Python error")  # as much of it as there was room for
    before = start(roles, terminal)
    terminal.fill(room=20)  # less than a line of the log
    os.kill(before["supervisor"], signal.SIGQUIT)  # says something
    os.kill(before["worker"], signal.SIGUSR1)  # likewise
    time.sleep(0.3)
    goes_on(roles, before)
    os.kill(before["worker"], signal.SIGABRT)  # writes its stack
    roles.next_worker(before["worker"])
    os.kill(before["supervisor"], signal.SIGTERM)
    roles.wait_until_nothing_is_left()


def test_stopped_screen_makes_nobody_wait(roles: Roles, terminal: Terminal) -> None:
    before = start(roles, terminal)
    terminal.stop()
    os.kill(before["worker"], signal.SIGABRT)
    roles.next_worker(before["worker"])
    os.kill(before["supervisor"], signal.SIGTERM)
    roles.wait_until_nothing_is_left()


def test_start_that_fails_before_a_stopped_screen_ends(roles: Roles, terminal: Terminal) -> None:
    roles.directory.joinpath("mnt").mkdir()
    roles.directory.joinpath("mnt/file").touch()
    terminal.fill(room=0)
    process = subprocess.Popen(
        roles.command, stdin=subprocess.DEVNULL, stdout=terminal.line, stderr=terminal.line
    )
    try:
        assert process.wait(30) == MountError.exit_code
    finally:
        process.kill()


def test_full_pipe_makes_nobody_wait(roles: Roles) -> None:
    end, begin = os.pipe()
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, end)
        process = subprocess.Popen(
            roles.command, stdin=subprocess.DEVNULL, stdout=begin, stderr=begin
        )
        undo.callback(process.wait, 10)
        undo.callback(roles.kill)
        roles.wait_until_it_serves()
        assert os.get_blocking(begin)  # the description that a shell would share is as it was
        os.set_blocking(begin, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(begin, b"x")
        os.close(begin)
        worker = roles.worker
        os.kill(worker, signal.SIGABRT)
        roles.next_worker(worker)
        process.terminate()
        assert process.wait(30) == 0
        roles.wait_until_nothing_is_left()


@pytest.mark.parametrize("where", ["/dev/full", "a pipe without reader"])
def test_output_that_cannot_be_written_changes_nothing(roles: Roles, where: str) -> None:
    if where == "/dev/full":
        output = os.open(where, os.O_WRONLY)
    else:
        end, output = os.pipe()
        os.close(end)
    process = subprocess.Popen(
        roles.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    os.close(output)
    try:
        roles.wait_until_it_serves()
        worker = roles.worker
        os.kill(worker, signal.SIGABRT)
        roles.next_worker(worker)
        process.terminate()
        assert process.wait(30) == 0
        roles.wait_until_nothing_is_left()
    finally:
        roles.kill()
        process.wait(10)
