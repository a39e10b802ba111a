# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of an exception out of a handler: an errno, a count, and a log record now and then.

A bug that shows in the synchronous core, or a MemoryError in there, leaves lists and counts as they
were at that instruction. Whoever went on with them could free a page that is another's, or forget
one. So nobody does: the process gives up, as it would on SIGKILL, and its successor rebuilds
everything from the arena and answers the request that was under way (docs/coherency.md: what a
death leaves is whole). Only at the third death at one request that gets EIO.
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
"""At most one failure in this time is logged with its traceback; all are counted."""


def is_internal(error: BaseException) -> bool:
    """Say whether an exception is a bug, or a lack of memory where none is asked for.

    And no failure that somebody foresaw.
    """
    return not isinstance(error, ZswapdError) or isinstance(error, InvariantError)


def way_of(error: BaseException) -> str:
    """Return an exception and where it came from in one line, innermost first.

    Without reading any source file.
    """
    places = []
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return f"{type(error).__name__}: {error} ({' < '.join(reversed(places))})"


class Failures:
    """Turns exceptions into errnos, counts them, and logs one a second.

    The log record is made in the next turn of the event loop: formatting a traceback needs memory,
    and an
    exception may come from the page path, where none may be asked for.

    Attributes:
        internal_errors: exceptions that are bugs (`is_internal`); their requests got EIO.
        failed_requests: other `ZswapdError`s, such as a page that does not match its checksum.
        when_broken: called with (handler, error) when the core was left in the middle of something.
            Where somebody can take over, it ends the process; if it returns, the request gets EIO.
    """

    def __init__(self) -> None:
        self.internal_errors = 0
        self.failed_requests = 0
        self.when_broken: Callable[[str, Exception], None] | None = None
        self._next_log = 0.0
        self._suppressed = 0

    def of_the_core(self, handler: str, error: Exception) -> int:
        """Do as `errno_of`, for an exception that has gone through the synchronous core.

        Does not return if that is broken.
        """
        if self.when_broken is not None and is_internal(error):
            self.when_broken(handler, error)
        return self.errno_of(handler, error)

    def errno_of(self, handler: str, error: Exception) -> int:
        """Count the exception that left `handler` and return the errno for its request."""
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
        before = f" ({suppressed} more since the last one reported)" if suppressed else ""
        if internal:
            log.error("internal error in %s, answered with EIO%s", handler, before, exc_info=error)
        else:
            log.error("%s failed%s: %s", handler, before, error)
