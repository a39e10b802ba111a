# SPDX-License-Identifier: GPL-2.0-or-later
"""The standard files 0, 1 and 2 at the start of a process.

Both programs call `complete` before they do anything else. The daemon also calls `never_wait`. A
terminal after Ctrl-S and a pipe with a stopped reader take no data, and a process that serves pages
must not wait for a reader.

`never_wait` opens terminals and pipes again, by /proc/self/fd. The reason: O_NONBLOCK belongs to
the open file description, and the daemon shares the inherited one with its shell. poll(2) alone is
not enough. It reports a terminal as writable that has room for one byte, and write(2) then waits
until there is room for the rest.

Limit: a socket cannot be opened again and is not changed. The log calls poll(2) before it writes.
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
    """A file that writes the data that its descriptor takes at once, and drops the rest.

    Args:
        descriptor: the descriptor; it stays open when this file is closed.
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
        """Write or drop data; return its length in bytes."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, data)
        return memoryview(data).nbytes


def complete() -> None:
    """Open /dev/null in place of each standard file that is closed.

    Otherwise the next files that the process opens get the numbers 0 to 2, and printed text goes
    into them.
    """
    for number, (name, mode) in enumerate(zip(_NAMES, _MODES, strict=True)):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number)
        if getattr(sys, name) is None:
            setattr(sys, name, _text_file(number, mode))


def never_wait() -> None:
    """Replace standard output and standard error, so that no write to them waits or fails."""
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
    """Return a text file for a descriptor. Python has None if it was closed at the start."""
    file = open(number, mode, errors="backslashreplace", closefd=False)  # noqa: SIM115 - for good
    assert isinstance(file, io.TextIOWrapper)
    return file


def _open_anew(number: int) -> None:
    """Give a terminal or a pipe its own open file description, with O_NONBLOCK."""
    if not (os.isatty(number) or stat.S_ISFIFO(os.fstat(number).st_mode)):
        return
    found = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    os.dup2(found, number)
    os.close(found)
