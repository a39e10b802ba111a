# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's end of the line to the agent (agent.c has the protocol).

Run commands in the guest, each with a time limit.

A thread reads; whoever waits, waits on its own command with its own limit. So several commands run
at once, and asking "does the box answer?" goes on while a workload runs. A limit that passes raises
`Silent`, and nothing here waits without one.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from typing import BinaryIO

SEND_LIMIT_S = 30.0


class Silent(HarnessError):  # noqa: N818 - said of a box
    """The box, or a command in it, did not answer in time."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended.

    Attributes:
        command: as it was given.
        status: its exit code, or minus the signal that ended it.
        output: what it wrote to stdout and stderr.
        seconds: from the request to the end, by the host's clock.
    """

    command: str
    status: int
    output: str
    seconds: float

    def check(self) -> Done:
        """Return itself.

        Raises:
            HarnessError: the command failed.
        """
        if self.status != 0:
            raise HarnessError(
                f"in the guest, {self.command!r} ended with {self.status}:\n{self.output}"
            )
        return self


class Running:
    """A command that runs in the guest, or has run.

    Args:
        channel: where it runs.
        number: its number in the protocol.
        command: for messages.
    """

    def __init__(self, channel: Channel, number: int, command: str) -> None:
        self.command = command
        self._channel = channel
        self._number = number
        self._start = time.monotonic()
        self._seconds = 0.0
        self._ended = threading.Event()
        self._status: int | None = None
        self._pieces: list[bytes] = []

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    @property
    def output(self) -> str:
        """What it has written so far."""
        return b"".join(self._pieces).decode(errors="replace")

    def kill(self) -> None:
        """Send SIGKILL to it and all it started."""
        self._channel.send(b"kill %d\n" % self._number)

    def wait(self, limit: float) -> Done:
        """Wait for its end.

        Raises:
            Silent: it has not ended after `limit` seconds (it still runs), or the guest is gone.
        """
        if not self._ended.wait(limit):
            raise Silent(
                f"in the guest, {self.command!r} has not ended after {limit:.0f} s:\n{self.output}"
            )
        if self._status is None:
            raise Silent(f"the guest ended while {self.command!r} ran:\n{self.output}")
        return Done(self.command, self._status, self.output, self._seconds)

    def heard(self, piece: bytes) -> None:
        """Take a piece of its output; called by the channel."""
        self._pieces.append(piece)

    def end(self, status: int | None) -> None:
        """Take its end, None if the line broke; called by the channel."""
        self._seconds = time.monotonic() - self._start
        self._status = status
        self._ended.set()


class Channel:
    """The line to one agent.

    Args:
        line: connected socket, the other end of the guest's port. Closed by `close`.
    """

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._line.settimeout(None)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, Running] = {}
        self._broken = False
        self._reader = threading.Thread(target=self._read, name="zvm channel", daemon=True)
        self._reader.start()

    def ping(self, limit: float) -> float:
        """Return the seconds that the agent itself took to answer.

        Raises:
            Silent: more than `limit`.
        """
        return self._begin("ping", b"ping %d\n").wait(limit).seconds

    def start(self, command: str) -> Running:
        """Start a shell command."""
        data = command.encode()
        return self._begin(command, b"run %d " + b"%d\n" % len(data) + data.replace(b"%", b"%%"))

    def run(self, command: str, limit: float) -> Done:
        """Run a shell command to its end; one that takes too long is killed.

        Raises:
            Silent: it did not end within `limit` seconds.
        """
        running = self.start(command)
        try:
            return running.wait(limit)
        except Silent:
            with contextlib.suppress(OSError):
                running.kill()
            raise

    def send(self, data: bytes) -> None:
        """Send a message whole."""
        with self._lock:
            self._line.sendall(data)

    def close(self) -> None:
        """Hang up; what still waits is told that the guest is gone."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)
        self._reader.join(SEND_LIMIT_S)
        self._line.close()

    def _begin(self, command: str, message: bytes) -> Running:
        number = next(self._numbers)
        running = Running(self, number, command)
        self._waiting[number] = running
        if self._broken:
            running.end(None)
        try:
            self.send(message % number)
        except OSError:
            running.end(None)
        return running

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._line.makefile("rb") as stream:
            while self._message(stream):
                pass
        self._broken = True
        for running in list(self._waiting.values()):
            running.end(None)

    def _message(self, stream: BinaryIO) -> bool:
        line = stream.readline()
        if not line:
            return False
        word, number, value = line.split()
        running = self._waiting.get(int(number))
        if word == b"out":
            piece = stream.read(int(value))
            if running:
                running.heard(piece)
        elif running:
            self._waiting.pop(int(number), None)
            running.end(int(value))
        return True
