# SPDX-License-Identifier: GPL-2.0-or-later
"""The swapoff that the daemon runs before it ends.

It runs in another thread, while the daemon serves the pages that swapoff reads. It is separate from
the other modules because it imports trio, which would delay the start of zswapctl.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from zswapd.swapdevice.swapoff import detach
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from zswapd.swapdevice.state import Identity

    Run = Callable[[Callable[[], list[str]]], Awaitable[list[str]]]

log = logging.getLogger(__name__)

OPENED_S = 2.0
"""Longest wait in seconds for a program that opened a file earlier to attach it."""
_LOOK_S = 0.05


async def drain(
    files: Sequence[Path],
    *,
    pool_bytes: int,
    say: Callable[[str], object],
    progressed: Callable[[], object],
    is_opened: Callable[[], bool] = lambda: False,
    identities: Mapping[Path, Identity] | None = None,
    run: Run = trio.to_thread.run_sync,
) -> None:
    """Swap off from all files, or from none if the pages do not fit into memory.

    Repeat this for files that a program attaches meanwhile. The caller has made the files refuse
    further opens, so only programs that opened a file earlier can attach it. Swapoff may take
    minutes. All calls that can wait for the daemon run in a thread or in its child process. It
    cannot be cancelled.

    Args:
        files: the backing files, swapped on or not.
        pool_bytes: memory in bytes that the pool gives back; 0 without discard.
        say: called with a text of the progress in the daemon's thread, such as Notifier.status.
        progressed: called in the daemon's thread each time that fewer bytes are left than before.
            The caller can extend a time limit then, and not for a swapoff that stands still.
        is_opened: returns whether a program has a file open, such as an earlier swapon.
        identities: the identities of the files, see `detach`.
        run: runs a function in a thread. A thread that exists does not wait for memory to start.

    Raises:
        HeadroomError: the pages do not fit into memory; the daemon must go on.
        SwapDeviceError: a file has another use, or swapoff failed; the daemon must go on.
    """
    least: dict[str, int] = {}
    token = trio.lowlevel.current_trio_token()

    def report(device: str, left: int, total: int) -> None:
        text = f"swapping off {device}: {format_size(left)} of {format_size(total)} left"
        log.info("%s", text, extra={"rate_limit": 5})
        trio.from_thread.run_sync(say, text, trio_token=token)
        if left < least.setdefault(device, left):
            least[device] = left
            trio.from_thread.run_sync(progressed, trio_token=token)

    end = time.monotonic() + OPENED_S
    while True:
        job = partial(detach, *files, pool_bytes=pool_bytes, progress=report, identities=identities)
        devices = await run(job)
        for device in devices:
            log.info("swapped off and detached: %s", device)
        if not devices:
            if not is_opened() or time.monotonic() >= end:
                return
            await trio.sleep(_LOOK_S)
