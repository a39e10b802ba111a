# SPDX-License-Identifier: GPL-2.0-or-later
"""Progress messages of long commands: a client gives up after 30 s without a message."""

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
"""Time between two messages, s."""


async def run_with_progress(
    report: Report, news: Callable[[], object], work: Callable[[], Awaitable[T]]
) -> T:
    """Run `work`, and report its progress every PROGRESS_S; return its result.

    The work goes on when the client has left.

    Args:
        report: sends a message.
        news: returns the message.
        work: the work. Its exceptions are raised here.
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
    """Discard a message: the report of a command without a client."""
