# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl top` of a real daemon, in a terminal of 80 by 24."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable

import pytest

from tests.support.descriptors import is_readable
from tests.support.swap import Stage, next_worker, stage
from tools.bench.harness.daemon import Daemon, program
from zswapd.errors import ControlError

__all__ = ["stage"]

_CONTROL = re.compile(rb"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-B0]|[=>])|\x0f")


@pytest.fixture
def daemon(stage: Stage) -> Daemon:
    started = stage.daemon("64M", memory__reserve="8M")
    with started.file.open("r+b", buffering=0) as file:
        for number in range(100):
            os.pwrite(file.fileno(), os.urandom(1000) + bytes(3096), number * 4096)
    return started


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *command: str, term: str = "xterm") -> None:
        self._end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": term}
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
        )
        os.close(other)
        self.shown = b""

    def wait_for(self, condition: Callable[[bytes], object], limit: float = 15.0) -> None:
        """Read what it shows until the condition holds for all of it, without control sequences."""
        end = time.monotonic() + limit
        while not condition(_CONTROL.sub(b"", self.shown)):
            assert time.monotonic() < end, self.shown
            if is_readable(self._end, 0.1):
                self.shown += os.read(self._end, 65536)

    def press(self, key: bytes) -> None:
        os.write(self._end, key)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._end)


@pytest.mark.parametrize("term", ["xterm", "vt100", "linux"])
def test_it_shows_and_ends_with_q(daemon: Daemon, term: str) -> None:
    terminal = Terminal(
        *program("zswapctl"), "--socket", str(daemon.socket), "top", "--interval", "0.2", term=term
    )
    try:
        terminal.wait_for(lambda shown: b"Protections" in shown and b"100 pages" in shown)
        terminal.press(b"q")
        assert terminal.process.wait(10) == 0
        assert b"Traceback" not in terminal.shown
    finally:
        terminal.close()


def test_a_terminal_that_cannot_is_told_what_can(daemon: Daemon) -> None:
    terminal = Terminal(
        *program("zswapctl"), "--socket", str(daemon.socket), "top", term="no-such-terminal"
    )
    try:
        terminal.wait_for(lambda shown: b"use --once" in shown)
        assert terminal.process.wait(10) == ControlError.exit_code
    finally:
        terminal.close()


def test_it_goes_on_with_the_next_worker(daemon: Daemon) -> None:
    terminal = Terminal(
        *program("zswapctl"), "--socket", str(daemon.socket), "top", "--interval", "0.1"
    )
    try:
        terminal.wait_for(lambda shown: b"worker 1" in shown)
        old = daemon.ask("status")["worker"]["pid"]
        os.kill(old, signal.SIGKILL)
        next_worker(daemon, old)
        terminal.wait_for(lambda shown: b"1 died before it" in shown)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()


def test_once_is_a_screen_of_80_by_24_and_json_the_report(daemon: Daemon) -> None:
    command = [
        *program("zswapctl"),
        "--socket",
        str(daemon.socket),
        "top",
        "--once",
        "--interval",
        "0.2",
    ]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()
    assert len(shown) <= 24
    assert max(map(len, shown)) <= 80
    assert re.search(r"^stored +0 +100 ", "\n".join(shown), re.MULTILINE)
    report = json.loads(
        subprocess.run(
            [*command, "--json"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    )
    assert report["core"]["zv"]["curr_pages"] == 100
