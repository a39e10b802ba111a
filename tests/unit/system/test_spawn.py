# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that a process starts while it serves.

What they inherit, what they say, and how they end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tools.bench.harness.system import children
from zswapd.system import spawn

TELL = (
    "import sys; print(open('/proc/self/status').read()); print('to stderr', file=sys.stderr);"
    " print(repr(sys.stdin.read()))"
)


def test_run_returns_what_a_program_says_and_how_it_ends() -> None:
    done = spawn.run([sys.executable, "-c", f"{TELL}; sys.exit(7)"], limit=30)
    assert done.code == 7
    assert done.err == b"to stderr\n"
    assert done.out.endswith(b"''\n")  # it had no input
    assert spawn.run(["sh", "-c", "kill -9 $$"], limit=30) == (-9, b"", b"")
    assert (
        len(spawn.run([sys.executable, "-c", "print('x' * (1 << 20))"], limit=30).out)
        == (1 << 20) + 1
    )


def test_program_inherits_no_blocked_signals() -> None:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        done = spawn.run([sys.executable, "-c", TELL], limit=30)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    assert b"SigBlk:\t0000000000000000" in done.out


def test_program_inherits_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSWAPD_A", "ü=b")
    assert spawn.run(["sh", "-c", "echo $ZSWAPD_A"], limit=30).out == "ü=b\n".encode()


def test_program_that_takes_too_long_is_killed_and_nothing_is_left_of_it() -> None:
    before, others = set(os.listdir("/proc/self/fd")), set(children(os.getpid()))
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.2 s"):
        spawn.run(["sleep", "60"], limit=0.2)
    assert time.monotonic() - begin < 10
    assert set(os.listdir("/proc/self/fd")) <= before, "the collector may close some of others"
    assert set(children(os.getpid())) <= others, "not even a zombie"


def test_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        spawn.run(["no-such-program"], limit=1)


FLAG = """
import ctypes, sys
from zswapd.system import spawn as spawning
libc = ctypes.CDLL(None)
if libc.prctl(57, 1, 0, 0, 0) != 0:
    print("not permitted")
    sys.exit()
code = "import ctypes; print(ctypes.CDLL(None).prctl(58, 0, 0, 0, 0))"
done = spawning.run([sys.executable, "-c", code], limit=30)
print(done.out.decode().strip(), libc.prctl(58, 0, 0, 0, 0))
"""


def test_program_is_no_io_flusher_and_its_parent_stays_one() -> None:
    said = subprocess.run(
        [sys.executable, "-c", FLAG], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert said in ("0 1", "not permitted")
