# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress of a command that takes long: its client gives up after 30 s without a message."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Report = Callable[[object], Awaitable[None]]
    """Sends a message to the client (control/server.py)."""

T = TypeVar("T")

PROGRESS_S = 0.5
"""Time between two messages."""


async def run_with_progress(
    report: Report, news: Callable[[], object], work: Callable[[], Awaitable[T]]
) -> T:
    """Do some work, and report its progress every PROGRESS_S.

    The work goes on when the client has left.

    Args:
        report: sends a message.
        news: returns the message.
        work: its result is returned, and its exceptions are raised.
    """

    async def report_until_cancelled() -> None:
        with contextlib.suppress(
            trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError
        ):
            while True:
                await trio.sleep(PROGRESS_S)
                await report(news())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report_until_cancelled)
        done = await outcome.acapture(work)
        nursery.cancel_scope.cancel()
    return done.unwrap()


async def discard_progress(_news: object) -> None:
    """Be the report of a command that no client has given."""
