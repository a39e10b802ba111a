# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's end of the line to the agent (agent.c has the protocol).

It runs commands in the guest, each with a time limit.

One thread reads the line, and each caller waits for its own command with its own limit. So several
commands run at once: a test can ask "does the machine answer?" while a workload runs. A caller
whose limit passes gets `Silent`, and every wait has a limit.
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


class Silent(HarnessError):  # noqa: N818 - a machine is silent
    """The machine, or a command in it, did not answer in time."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended.

    Attributes:
        command: the shell command.
        status: its exit code, or minus the signal that ended it.
        output: its stdout and stderr.
        seconds: the time from the request to the end, by the host's clock.
    """

    command: str
    status: int
    output: str
    seconds: float

    def check(self) -> Done:
        """Return this object if the command succeeded.

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
        channel: the line to the guest that runs it.
        number: its number in the protocol.
        command: the command, for messages.
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
        """Whether the command has ended."""
        return self._ended.is_set()

    @property
    def output(self) -> str:
        """The command's output so far."""
        return b"".join(self._pieces).decode(errors="replace")

    def kill(self) -> None:
        """Send SIGKILL to the process group of the command."""
        self._channel.send(b"kill %d\n" % self._number)

    def wait(self, limit: float) -> Done:
        """Wait for the end of the command.

        Raises:
            Silent: the command still runs after `limit` seconds, or the guest is gone.
        """
        if not self._ended.wait(limit):
            raise Silent(
                f"in the guest, {self.command!r} has not ended after {limit:.0f} s:\n{self.output}"
            )
        if self._status is None:
            raise Silent(f"the guest ended while {self.command!r} ran:\n{self.output}")
        return Done(self.command, self._status, self.output, self._seconds)

    def heard(self, piece: bytes) -> None:
        """Take a piece of the output; the channel calls this."""
        self._pieces.append(piece)

    def end(self, status: int | None) -> None:
        """Take the status, None if the line broke; the channel calls this."""
        self._seconds = time.monotonic() - self._start
        self._status = status
        self._ended.set()


class Channel:
    """The line to one agent.

    Args:
        line: a connected socket, the other end of the guest's port; `close` closes it.
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
        """Return the seconds that the agent took to answer.

        Raises:
            Silent: the agent took more than `limit` seconds.
        """
        return self._begin("ping", b"ping %d\n").wait(limit).seconds

    def start(self, command: str) -> Running:
        """Start a shell command."""
        data = command.encode()
        return self._begin(command, b"run %d " + b"%d\n" % len(data) + data.replace(b"%", b"%%"))

    def run(self, command: str, limit: float) -> Done:
        """Run a shell command to its end; kill it when it takes too long.

        Raises:
            Silent: the command did not end within `limit` seconds.
        """
        running = self.start(command)
        try:
            return running.wait(limit)
        except Silent:
            with contextlib.suppress(OSError):
                running.kill()
            raise

    def send(self, data: bytes) -> None:
        """Send a whole message."""
        with self._lock:
            self._line.sendall(data)

    def close(self) -> None:
        """Close the line; callers that still wait get the message that the guest ended."""
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
