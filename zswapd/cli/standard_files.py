# SPDX-License-Identifier: GPL-2.0-or-later
"""The standard files 0, 1 and 2, as a process finds them when it begins.

Both programs call `complete` before they do anything else. The daemon also calls `never_wait`: a
terminal that was stopped with Ctrl-S, or a pipe whose reader is stopped, takes no data, and a
process that serves pages must not wait for its reader.

`never_wait` opens terminals and pipes anew, by /proc/self/fd, because O_NONBLOCK belongs to the
open file description, and the daemon shares with its shell the one that it inherited. poll(2) alone
is not enough: it calls a terminal writable that has room for one byte, and write(2) then waits for
room for the rest.

Limit: a socket cannot be opened anew and stays as it is. The log asks poll(2) before it writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NAMES = ("stdin", "stdout", "stderr")
_MODES = ("r", "w", "w")


class LossyFile(io.RawIOBase):
    """Writes to a descriptor what that takes at once, and drops the rest without an error.

    Args:
        descriptor: stays open when this file closes.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def write(self, data: ReadableBuffer, /) -> int:
        """Write data, or drop it; return its length."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)
        return memoryview(data).nbytes


def complete() -> None:
    """Open /dev/null in place of each standard file that is closed.

    Without it, the next files that the process opens get the numbers 0 to 2, and what is printed
    goes into them.
    """
    for number, (name, mode) in enumerate(zip(_NAMES, _MODES, strict=True)):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
        if getattr(sys, name) is None:
            setattr(sys, name, _text_file(number, mode))


def never_wait() -> None:
    """Have no write to standard output or standard error wait or fail, whatever they are."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        with contextlib.suppress(OSError):
            _open_anew(number)
        raw: Any = LossyFile(number)  # without a buffer, as with `python -u`
        text = io.TextIOWrapper(
            raw, encoding="utf-8", errors="backslashreplace", write_through=True
        )
        setattr(sys, name, text)


def _open_null(number: int) -> None:
    found = os.open(os.devnull, os.O_RDWR)
    if found == number:
        os.set_inheritable(found, True)  # noqa: FBT003 - the system call
        return
    os.dup2(found, number)
    os.close(found)


def _text_file(number: int, mode: str) -> TextIO:
    """Return a text file for a number; Python has None for a file that was closed at its start."""
    file = open(number, mode, errors="backslashreplace", closefd=False)  # noqa: SIM115 - for good
    assert isinstance(file, io.TextIOWrapper)
    return file


def _open_anew(number: int) -> None:
    """Give a terminal or a pipe an open file description of its own, which does not wait."""
    if not (os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode)):
        return
    found = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    os.dup2(found, number)
    os.close(found)
