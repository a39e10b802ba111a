# SPDX-License-Identifier: GPL-2.0-or-later
"""A shell with job control on a terminal of its own, typed at as a person types."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import time
from typing import Self

CTRL_C, CTRL_S, CTRL_Z, CTRL_BACKSLASH = b"\x03", b"\x13", b"\x1a", b"\x1c"


class Terminal:
    """A pseudoterminal and the interactive shell whose controlling terminal it is;
    a context manager.

    Attributes:
        text: what has appeared so far.
        line: the side of the programs.
        shell: the process.
    """

    def __init__(self) -> None:
        self.text = ""
        self._screen, self.line = pty.openpty()
        os.set_blocking(self._screen, False)
        self.shell = subprocess.Popen(
            ["setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"],
            stdin=self.line,
            stdout=self.line,
            stderr=self.line,
            env={**os.environ, "TERM": "dumb", "PS1": "$ ", "HISTFILE": ""},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.shell.kill()
        self.shell.wait(10)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._screen, keys)

    def enter(self, command: str) -> None:
        """Type a command line."""
        self.press(command.encode() + b"\n")

    def read(self) -> str:
        """Take what has appeared; return all of it."""
        with contextlib.suppress(OSError):  # there is no more, or it was hung up
            while data := os.read(self._screen, 65536):
                self.text += data.decode(errors="replace")
        return self.text

    def wait_for(self, text: str, *, limit: float = 30.0) -> None:
        """Wait until a text has appeared."""
        end = time.monotonic() + limit
        while text not in self.read():
            assert time.monotonic() < end, f"{text!r} does not appear in:\n{self.text}"
            time.sleep(0.02)

    def fill(self, *, room: int) -> None:
        """Fill the line to the screen, which is not read from then on, but for some bytes."""
        line = os.open(os.ttyname(self.line), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        written = 0
        try:
            for piece in (b"x" * 512, b"x"):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        written += os.write(line, piece)
        finally:
            os.close(line)
        os.read(self._screen, room)
        assert written > room

    def hang_up(self) -> None:
        """Have the terminal vanish, as when a connection breaks."""
        for descriptor in (self.line, self._screen):
            with contextlib.suppress(OSError):
                os.close(descriptor)
