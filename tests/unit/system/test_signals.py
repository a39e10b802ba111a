# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that a process fetches, and those that no longer reach it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TOP
from tests.support.terminal import Terminal
from zswapd.system import signals
from zswapd.system.signals import (
    FAULTS,
    SI_KERNEL,
    SI_USER,
    Received,
    SignalFile,
    is_hangup,
    name_of,
)

BLOCKED = """
import os, signal, sys, threading
from zswapd.system.signals import *
block_signals()
if {forked} and (pid := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
if {forked}:
    become_servant()
# With a second thread, the C library takes its own real-time signals.
thread = threading.Thread(target=threading.Event().wait, args=(30,), daemon=True)
thread.start()
wanted = {{signal.SIGUSR1, signal.SIGTSTP, signal.SIGRTMAX}}
file = SignalFile(frozenset(wanted))
for number in range(1, 65):
    if number not in {spared}:
        os.kill(os.getpid(), number)
seen = file.wait(5)
assert {{received.number for received in seen}} == wanted, seen
assert all(received.sender == os.getpid() and received.code == SI_USER for received in seen), seen
assert file.read() == [] and file.wait(0.01) == []
print("alive", os.getsid(0) == os.getpid())
"""


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TOP,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_no_signal_gets_through_but_those_that_cannot_be_blocked() -> None:
    assert run(BLOCKED.format(forked=False, spared={9, 19})).startswith("alive")


def test_servant_has_a_session_of_its_own_and_is_open_to_faults_only() -> None:
    assert run(BLOCKED.format(forked=True, spared={9, 19, *map(int, FAULTS)})) == "alive True\n"
    with pytest.raises(AssertionError, match="returncode=245"):
        run(BLOCKED.format(forked=True, spared={9, 19, *map(int, FAULTS - {signal.SIGSEGV})}))


CHILD = """
import os, signal, time
from zswapd.system import spawn as spawning
from zswapd.system.signals import *
block_signals()
ignore_signals()
child = spawning.spawn(["sleep", "30"])
time.sleep(0.2)
for number in CATCHABLE - FAULTS:
    os.kill(child._pid, number)
assert child.wait(0.3) is None
child.interrupt()
assert child.wait(5) == -signal.SIGKILL
"""


def test_program_of_a_worker_ends_by_no_signal_but_sigkill_and_faults() -> None:
    run(CHILD)


def test_only_a_terminal_that_is_gone_makes_sighup_a_hangup() -> None:
    assert is_hangup(Received(signal.SIGHUP, SI_KERNEL, 0))
    assert not is_hangup(Received(signal.SIGHUP, SI_USER, os.getppid()))
    assert not is_hangup(Received(signal.SIGHUP, SI_USER, os.getpid()))


@pytest.mark.parametrize("is_there", [True, False])
def test_sighup_of_the_shell_is_a_hangup_without_its_terminal(
    monkeypatch: pytest.MonkeyPatch, *, is_there: bool
) -> None:
    monkeypatch.setattr(os, "getsid", lambda _: 4711)
    monkeypatch.setattr(signals, "_has_terminal", lambda: is_there)
    assert is_hangup(Received(signal.SIGHUP, SI_USER, 4711)) is not is_there
    assert not is_hangup(Received(signal.SIGHUP, SI_USER, 4712))


def test_terminal_is_seen_while_it_is_there(tmp_path: Path) -> None:
    with Terminal() as terminal:
        terminal.enter(
            f"{sys.executable} -P -c 'from zswapd.system import signals;"
            " print(signals._has_terminal(), 1)'"
        )
        terminal.wait_for("True 1")
    code = "from zswapd.system import signals; print(signals._has_terminal())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOP,
        check=True,
        capture_output=True,
        start_new_session=True,
    )
    assert done.stdout == b"False\n"


LIMITS = (
    "import resource; from zswapd.system import lift_limits; print(lift_limits(),"
    " resource.getrlimit(resource.RLIMIT_CPU))"
)


def test_limit_of_processor_time_is_lifted_as_far_as_it_may_be() -> None:
    for hard, said in (("unlimited", "None (-1, -1)"), ("1000", "1000 (1000, 1000)")):
        command = (
            f"ulimit -St 900; ulimit -Ht {hard}; exec setpriv --bounding-set=-sys_resource"
            f" {sys.executable} -c '{LIMITS}'"
        )
        done = subprocess.run(
            ["bash", "-c", command], cwd=TOP, check=True, capture_output=True, text=True
        )
        assert done.stdout.strip() == said


def test_signals_have_names() -> None:
    assert [name_of(number) for number in (15, 34, 35)] == ["SIGTERM", "SIGRTMIN", "signal 35"]


def test_file_of_signals_is_given_back() -> None:
    with contextlib.closing(SignalFile(frozenset({signal.SIGUSR2}))) as file:
        descriptor = file.descriptor
        assert not os.get_inheritable(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
