# SPDX-License-Identifier: GPL-2.0-or-later
"""A shell with job control on a pseudoterminal, into which a test types."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import termios
import time
from typing import Self

CTRL_C, CTRL_Z, CTRL_BACKSLASH = b"\x03", b"\x1a", b"\x1c"


class Terminal:
    """A context manager with a pseudoterminal, which controls an interactive shell.

    Attributes:
        text: the output so far.
        line: the programs' side of the terminal.
        shell: the process of the shell.
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
        """Type a text."""
        os.write(self._screen, keys)

    def stop(self) -> None:
        """Stop the output, as Ctrl-S does; the key itself takes effect some time later."""
        termios.tcflow(self.line, termios.TCOOFF)

    def enter(self, command: str) -> None:
        """Type a command line."""
        self.press(command.encode() + b"\n")

    def read(self) -> str:
        """Read the new output; return all output so far."""
        with contextlib.suppress(OSError):  # there is no more output, or the terminal was closed
            while data := os.read(self._screen, 65536):
                self.text += data.decode(errors="replace")
        return self.text

    def wait_for(self, text: str, *, limit: float = 30.0) -> None:
        """Wait until the output contains a text."""
        end = time.monotonic() + limit
        while text not in self.read():
            assert time.monotonic() < end, f"{text!r} does not appear in:\n{self.text}"
            time.sleep(0.02)

    def fill(self, *, room: int) -> None:
        """Fill the output buffer until only `room` bytes of it are free, or a few more."""
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
        """Close the terminal, as a broken connection does."""
        for descriptor in (self.line, self._screen):
            with contextlib.suppress(OSError):
                os.close(descriptor)
