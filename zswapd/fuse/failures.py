# SPDX-License-Identifier: GPL-2.0-or-later
"""The conversion of a handler's exception to an errno, a count and a rate-limited log record.

A bug or a MemoryError in the synchronous core stops a change of lists and counts in the middle. A
process that went on with them could free a page of another owner, or lose one. Therefore the
process ends itself, as SIGKILL would. Its successor rebuilds everything from the arena and answers
the request (docs/coherency.md: the arena is whole after a death). A request that has killed three
workers gets EIO.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from typing import TYPE_CHECKING

import trio

from zswapd.errors import InvariantError, ZswapdError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

FAILURE_LOG_SECONDS = 1.0
"""Time in seconds in which at most one failure is logged; all failures are counted."""


def is_internal(error: BaseException) -> bool:
    """Return whether an exception is a bug or an unexpected lack of memory.

    All ZswapdErrors but InvariantError are expected failures.
    """
    return not isinstance(error, ZswapdError) or isinstance(error, InvariantError)


def way_of(error: BaseException) -> str:
    """Return an exception and its call stack in one line, innermost frame first.

    This reads no source file.
    """
    places = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {error} ({' < '.join(reversed(places))})"


class Failures:
    """The failures of handlers: converted to errnos, counted, and logged once a second.

    The next turn of the event loop makes the log record, because a traceback needs memory. The
    exception may come from the page path, which must not allocate memory.

    Attributes:
        internal_errors: exceptions that are bugs (`is_internal`); their requests got EIO.
        failed_requests: other `ZswapdError`s, such as a page that does not match its checksum.
        when_broken: called with (handler, error) if an exception left the core in the middle of a
            change. It ends the process if a successor can take over. If it returns, the request
            gets EIO.
    """

    def __init__(self) -> None:
        self.internal_errors = 0
        self.failed_requests = 0
        self.when_broken: Callable[[str, Exception], None] | None = None
        self._next_log = 0.0
        self._suppressed = 0

    def of_the_core(self, handler: str, error: Exception) -> int:
        """Return the errno for an exception that went through the synchronous core.

        It may not return: see `when_broken`.
        """
        if self.when_broken is not None and is_internal(error):
            self.when_broken(handler, error)
        return self.errno_of(handler, error)

    def errno_of(self, handler: str, error: Exception) -> int:
        """Count an exception of `handler` and return the errno for its request."""
        internal = is_internal(error)
        if internal:
            self.internal_errors += 1
        else:
            self.failed_requests += 1
        now = time.monotonic()
        if now < self._next_log:
            self._suppressed += 1
        else:
            self._next_log = now + FAILURE_LOG_SECONDS
            report = functools.partial(
                self._report, handler, error, self._suppressed, internal=internal
            )
            self._suppressed = 0
            try:
                trio.lowlevel.current_trio_token().run_sync_soon(report)
            except RuntimeError:  # no event loop runs in this thread
                report()
        return error.errno_ if isinstance(error, ZswapdError) else errno.EIO

    @staticmethod
    def _report(handler: str, error: Exception, suppressed: int, *, internal: bool) -> None:
        before = f" ({suppressed} more since the last report)" if suppressed else ""
        if internal:
            log.error("internal error in %s, answered with EIO%s", handler, before, exc_info=error)
        else:
            log.error("%s failed%s: %s", handler, before, error)
