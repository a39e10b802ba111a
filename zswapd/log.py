# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging: to stderr, or with its fields to journald if journald reads stderr; it never blocks.

Modules use the standard library (`log = logging.getLogger(__name__)`, %-style arguments); `setup`
is called once by the command line. A record may have two attributes, through `extra`:

- `rate_limit`: seconds in which at most one record of this logger with this message template is
  written; the next record that passes says how many were held back;
- `log_once`: if True, a record with the same template and arguments is written only once.

A StreamHandler is not used, because a daemon that serves swap must not wait for the reader of its
stderr. A reader that hangs (a stopped terminal, a full pipe, a journald that waits for swap-in)
would hang the page path, and so the machine. So a line is written only if the descriptor takes it
at once. Other lines are dropped and counted, and the count is written when lines are taken again.
Invariant: `emit` neither blocks nor raises.

The journal gets these fields beside message and priority: LOGGER, ZSWAPD_TEMPLATE (the message
without its values), CODE_FILE, CODE_LINE, CODE_FUNC. A datagram that is too long for the journal
goes to stderr instead.

Source: systemd's native journal protocol.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
"""The values of `log.level`."""

_SYSLOG_PRIORITY = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
JOURNAL = Path("/run/systemd/journal/socket")
"""Where journald takes datagrams."""
_WRITE_SIZE = (
    4096  # a pipe that polls writable has room for a page, a terminal and a socket for more
)
_REMEMBERED = 1024  # templates and messages that the filter keeps in mind; the oldest are forgotten


@dataclass(frozen=True, slots=True)
class LogStatistics:
    """Counts of log records."""

    written: int
    dropped: int
    """Records that were not written, because a write to stderr would have blocked."""
    held_back: int
    """Records that were not written, because of `rate_limit` or `log_once`."""


class SystemdFormatter(logging.Formatter):
    """`<N>message`: N is the syslog priority for journald, and each line of a traceback has it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines, each with its priority."""
        prefix = f"<{_SYSLOG_PRIORITY.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class TerminalFormatter(logging.Formatter):
    """`12:34:56 zswapd: message`, with the name of the level if it is not info."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{clock} zswapd: {level}{super().format(record)}"


class RepetitionFilter(logging.Filter):
    """A filter that holds back records with `rate_limit` or `log_once`.

    Args:
        clock: returns seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.held_back = 0
        self._clock = clock
        self._seen: OrderedDict[tuple[object, ...], None] = OrderedDict()
        # (logger, template) → end of the time limit, and the number of records held back
        self._limited: OrderedDict[tuple[str, object], tuple[float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record may pass.

        A record that passes after others were held back gets their count appended.
        """
        if getattr(record, "log_once", False) and self._seen_before(record):
            self.held_back += 1
            return False
        seconds = getattr(record, "rate_limit", None)
        return seconds is None or self._within_limit(record, float(seconds))

    def _seen_before(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.getMessage())
        seen = key in self._seen
        self._seen[key] = None
        _forget_oldest(self._seen)
        return seen

    def _within_limit(self, record: logging.LogRecord, seconds: float) -> bool:
        key = (record.name, record.msg)
        now = self._clock()
        until, count = self._limited.get(key, (now, 0))
        if now < until:
            self._limited[key] = (until, count + 1)
            self.held_back += 1
            return False
        self._limited[key] = (now + seconds, 0)
        _forget_oldest(self._limited)
        if count:
            record.msg = f"{record.getMessage()} (and {count} more like it)"
            record.args = ()
        return True


class UnblockingHandler(logging.Handler):
    """A handler that writes to a descriptor as long as that takes data at once.

    Args:
        descriptor: the descriptor; it stays open when the handler closes.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.written = 0
        self.dropped = 0
        self._descriptor = descriptor
        self._unreported = 0
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or drop it."""
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001 - a record that cannot be formatted must not end the daemon
            text = (
                f"log record from {record.pathname}:{record.lineno} cannot be formatted: {error!r}"
            )
        if self._unreported and self._write(
            f"zswapd: {self._unreported} log lines were dropped: stderr was full\n"
        ):
            self._unreported = 0
        self._count(is_written=self._write(text + "\n"))

    def _count(self, *, is_written: bool) -> None:
        if is_written:
            self.written += 1
        else:
            self.dropped += 1
            self._unreported += 1

    def _write(self, text: str) -> bool:
        data = memoryview(text.encode(errors="backslashreplace"))
        while data:
            try:
                if not any(events & select.POLLOUT for _, events in self._poll.poll(0)):
                    return False
                data = data[os.write(self._descriptor, data[:_WRITE_SIZE]) :]
            except OSError:
                return False
        return True


class JournalHandler(UnblockingHandler):
    """A handler that sends records with their fields to journald, as long as it takes them at once.

    Args:
        descriptor: gets the records that journald cannot take.
        path: journald's socket.
    """

    def __init__(self, descriptor: int, path: Path = JOURNAL) -> None:
        super().__init__(descriptor)
        self._path = str(path)
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, or drop it.

        Write it to stderr if journald is not there or the record is too long.
        """
        try:
            data = _datagram(record)
            # The path is looked up each time, because a restarted journald has a new socket.
            if self._unreported:
                dropped = f"{self._unreported} records were dropped: the journal was full"
                self._socket.sendto(
                    _datagram(logging.makeLogRecord({"msg": dropped, "levelno": logging.WARNING})),
                    self._path,
                )
                self._unreported = 0
            self._socket.sendto(data, self._path)
        except BlockingIOError:
            self._count(is_written=False)
        except Exception:  # noqa: BLE001 - after any failure, stderr gets the record
            super().emit(record)
        else:
            self._count(is_written=True)

    def close(self) -> None:
        """Close the socket, not the descriptor."""
        self._socket.close()
        super().close()


def _datagram(record: logging.LogRecord) -> bytes:
    """Return a record as journald takes it: KEY, the value's length, the value."""
    fields = {
        "MESSAGE": logging.Formatter().format(record),
        "PRIORITY": _SYSLOG_PRIORITY.get(record.levelno, 6),
        "SYSLOG_IDENTIFIER": "zswapd",
        "LOGGER": record.name,
        "ZSWAPD_TEMPLATE": record.msg,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName,
    }
    parts = []
    for name, field in fields.items():
        value = str(field).encode(errors="backslashreplace")
        parts.append(b"%s\n%s%s\n" % (name.encode(), len(value).to_bytes(8, "little"), value))
    return b"".join(parts)


_filter = RepetitionFilter()
_handler: UnblockingHandler | None = None


def setup(
    level: str,
    *,
    descriptor: int = 2,
    environ: Mapping[str, str] = os.environ,
    journal: Path = JOURNAL,
) -> None:
    """Send the program's log to stderr, in place of any earlier set-up.

    Args:
        level: least severity to write, a key of LEVELS.
        descriptor: the descriptor of stderr.
        environ: the environment, in which systemd says whether journald reads stderr.
        journal: journald's socket.
    """
    global _handler, _filter
    logging.raiseExceptions = False
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
        _handler.close()
    is_journal = _is_journal(descriptor, environ)
    has_socket = is_journal and journal.is_socket()
    _handler, _filter = (
        JournalHandler(descriptor, journal) if has_socket else UnblockingHandler(descriptor),
        RepetitionFilter(),
    )
    _handler.setFormatter(SystemdFormatter() if is_journal else TerminalFormatter())
    _handler.addFilter(_filter)
    root.addHandler(_handler)
    set_level(level)


def set_level(level: str) -> None:
    """Change the least severity that is written, a key of LEVELS."""
    logging.getLogger().setLevel(LEVELS[level])


def statistics() -> LogStatistics:
    """Return the counts of records since `setup`."""
    return LogStatistics(
        written=_handler.written if _handler else 0,
        dropped=_handler.dropped if _handler else 0,
        held_back=_filter.held_back,
    )


def _is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Return whether the descriptor is the stream that systemd connected to the journal.

    Children inherit JOURNAL_STREAM even if their stderr goes elsewhere, so its device and inode
    have to match.
    """
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def _forget_oldest(memory: OrderedDict[Any, Any]) -> None:
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
