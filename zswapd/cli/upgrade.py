# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl upgrade`: the installed program takes the place of the running one, while swap is on.

The daemon has the installed program checked before anything happens; then its supervisor becomes
that program, and a new worker takes over. This command waits until the new worker answers:
requests, and this one among them, wait in their queues meanwhile.
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
"""Patience with the check of the installed program."""
TAKEOVER_S = 120.0
"""Patience with the takeover."""
_PAUSE_S = 0.05


class UpgradeReport(TypedDict):
    """What has become of an upgrade."""

    old_version: str
    version: str
    worker: int
    """Process id of the new worker."""
    seconds: float
    """From the request to the new worker's first answer, the check included."""


def upgrade(socket: Path, progress: Callable[[object], None]) -> UpgradeReport:
    """Ask for an upgrade and wait for it.

    Args:
        socket: the control socket.
        progress: called with news on the way.

    Raises:
        HandoverError: the installed program cannot take over, or has not; the running one goes on.
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
            continue  # the old worker left in the middle of our question
        if status["worker"]["pid"] != before["worker"]:
            return {
                "old_version": str(before["version"]),
                "version": status["version"],
                "worker": status["worker"]["pid"],
                "seconds": round(time.monotonic() - begin, 3),
            }
    raise HandoverError(
        "the upgrade has not happened", hint="the daemon's log says why; what was running goes on"
    )
