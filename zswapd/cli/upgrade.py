# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl upgrade`: the installed program replaces the running one, while swap is on.

First the daemon lets the installed program check that it can take over. Then its supervisor execs
that program, and a new worker takes over. This command waits until the new worker answers. All
requests wait in their queues during the takeover.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypedDict, cast

from zswapd.control.client import Client
from zswapd.errors import HandoverError, ZswapdError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zswapd.control.protocol import StatusReport

CHECK_S = 90.0
"""Longest wait in seconds for the check of the installed program."""
TAKEOVER_S = 120.0
"""Longest wait in seconds for the takeover."""
_PAUSE_S = 0.05


class UpgradeReport(TypedDict):
    """The result of an upgrade."""

    old_version: str
    version: str
    worker: int
    """Process id of the new worker."""
    seconds: float
    """Time from the request to the new worker's first answer, including the check."""


def upgrade(socket: Path, progress: Callable[[object], None]) -> UpgradeReport:
    """Request an upgrade and wait for its end.

    Args:
        socket: the control socket.
        progress: called with each report of progress.

    Raises:
        HandoverError: the installed program cannot take over or has not; the running one goes on.
    """
    begin = time.monotonic()
    with Client(socket, timeout=CHECK_S) as client:
        before = cast("dict[str, object]", client.call("upgrade", progress=progress))
    began = time.monotonic()
    end = time.monotonic() + TAKEOVER_S
    while time.monotonic() < end:
        time.sleep(_PAUSE_S)
        progress({"seconds_of_taking_over": int(time.monotonic() - began)})
        try:
            with Client(socket, timeout=TAKEOVER_S) as client:
                status = cast("StatusReport", client.call("status"))
        except ZswapdError:
            continue  # the old worker ended before it answered
        if status["worker"]["pid"] != before["worker"]:
            return {
                "old_version": str(before["version"]),
                "version": status["version"],
                "worker": status["worker"]["pid"],
                "seconds": round(time.monotonic() - begin, 3),
            }
    raise HandoverError(
        "the upgrade has failed; the old program goes on", hint="see the daemon's log"
    )
