# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard output and standard error that never end a command with a traceback.

- Encoding: a character that the locale's character set lacks is written in ASCII: `...` for an
  ellipsis, `u` for the micro sign, `?` for a character without a similar one. Bytes of file names
  that are not characters are written unchanged.
- O_NONBLOCK: a write waits until the descriptor is writable. Another process may have set the flag,
  because it belongs to the open file description.
- Standard output that cannot be written raises `OutputError` once. Later output is dropped. The
  class is different from the errors of the work, such as a broken connection to the daemon.
- Standard error that cannot be written is dropped. A write to it waits for PATIENCE_S at most, so
  that a swapoff does not stop because its progress cannot be shown.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import select
import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing import TextIO

PATIENCE_S = 1.0
"""Longest time in seconds that a write to standard error waits."""
_PLAIN = {
    "\u2026": "...",
    "\u2013": "-",
    "\u2014": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2192": "->",
    "\u00b5": "u",
    "\u00d7": "x",
    "\u2265": ">=",
    "\u2264": "<=",
}
_ESCAPED_BYTES = range(0xDC80, 0xDD00)
"""Python's surrogates for bytes of file names that are not characters."""


class OutputError(OSError):
    """Standard output cannot be written."""


def _in_ascii(character: str) -> str:
    plain = _PLAIN.get(character)
    if plain is None:
        import unicodedata  # takes 1 ms, and few commands need it

        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or "?"


def plain(text: str) -> str:
    """Return a text in ASCII. Each other character is replaced with a similar one."""
    return "".join(one if one.isascii() else _in_ascii(one) for one in text)


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return the replacement of one character that an encoding lacks, and the next position."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if ord(character) in _ESCAPED_BYTES:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return _in_ascii(character), error.start + 1


codecs.register_error("zswapd.plain", _replace)


def encodable(text: str, encoding: str) -> str:
    """Return a text in which the characters that an encoding lacks are replaced."""
    return text.encode(encoding, "zswapd.plain").decode(encoding, "replace")


def has_unicode(stream: TextIO | None) -> bool:
    """Return whether a stream can encode all characters."""
    return codecs.lookup(getattr(stream, "encoding", None) or "ascii").name.startswith("utf")


class _Descriptor(io.FileIO):
    """A standard file that is written until it has taken all data or has failed.

    Args:
        descriptor: its number; it stays open.
        is_for_work: True if a failed write is an error of the command; otherwise it is ignored.
    """

    def __init__(self, descriptor: int, *, is_for_work: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_for_work = is_for_work
        self.is_broken = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        size = len(memoryview(data).cast("B"))
        try:
            while not self.is_broken:
                written = super().write(data)
                if written is not None:
                    return written
                self._wait()
        except OSError as error:
            self.is_broken = True
            if self._is_for_work:
                raise OutputError(error.errno, error.strerror) from error
        return size

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        if not poll.poll(None if self._is_for_work else PATIENCE_S * 1000):
            self.is_broken = True


def prepare() -> None:
    """Replace sys.stdout and sys.stderr with the files of this module. A repeat has no effect."""
    for name in ("stdout", "stderr"):
        stream, own = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is own and isinstance(stream, io.TextIOWrapper):  # not closed, not a test's file
            made = _prepared(stream, is_for_work=name == "stdout")
            setattr(sys, name, made)
            setattr(sys, f"__{name}__", made)


def drop() -> None:
    """Write no more to standard output, and drop its buffer."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, _Descriptor):
        raw.is_broken = True


def _prepared(stream: io.TextIOWrapper, *, is_for_work: bool) -> io.TextIOWrapper:
    with contextlib.suppress(OSError):
        stream.flush()
    if isinstance(getattr(stream.buffer, "raw", None), _Descriptor):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(
            cast("io.RawIOBase", _Descriptor(stream.fileno(), is_for_work=is_for_work))
        ),
        encoding=stream.encoding,
        errors="zswapd.plain",
        line_buffering=stream.line_buffering or not is_for_work,
        write_through=stream.write_through,
    )
