# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of an exception out of a handler: an errno, a count, and a log record now and then."""

from __future__ import annotations

import errno
import functools
import logging
import time

import trio

from zswapd.errors import ZswapdError

log = logging.getLogger(__name__)

FAILURE_LOG_SECONDS = 1.0
"""At most one failure in this time is logged with its traceback; all are counted."""


class Failures:
    """Turns exceptions into errnos, counts them, and logs one a second.

    The log record is made in the next turn of the event loop: formatting a traceback needs memory, and an
    exception may come from the page path, where none may be asked for.

    Attributes:
        internal_errors: exceptions that are not `ZswapdError`, hence bugs; their requests got EIO.
        failed_requests: `ZswapdError`s, such as a page that does not match its checksum.
    """

    def __init__(self) -> None:
        self.internal_errors = 0
        self.failed_requests = 0
        self._next_log = 0.0
        self._suppressed = 0

    def errno_of(self, handler: str, error: Exception) -> int:
        """Count the exception that left `handler` and return the errno for its request."""
        is_internal = not isinstance(error, ZswapdError)
        if is_internal:
            self.internal_errors += 1
        else:
            self.failed_requests += 1
        now = time.monotonic()
        if now < self._next_log:
            self._suppressed += 1
        else:
            self._next_log = now + FAILURE_LOG_SECONDS
            report = functools.partial(self._report, handler, error, self._suppressed, is_internal=is_internal)
            self._suppressed = 0
            try:
                trio.lowlevel.current_trio_token().run_sync_soon(report)
            except RuntimeError:  # no event loop runs in this thread
                report()
        return error.errno_ if isinstance(error, ZswapdError) else errno.EIO

    @staticmethod
    def _report(handler: str, error: Exception, suppressed: int, *, is_internal: bool) -> None:
        before = f" ({suppressed} more since the last one reported)" if suppressed else ""
        if is_internal:
            log.error("internal error in %s, answered with EIO%s", handler, before, exc_info=error)
        else:
            log.error("%s failed%s: %s", handler, before, error)
