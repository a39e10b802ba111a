# SPDX-License-Identifier: GPL-2.0-or-later
"""Swapoff as the daemon does it before it ends.

In another thread, while it serves the very pages that come back.

Apart from the other modules, because it needs trio, whose import would slow zswapctl down.
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
"""Within which whoever has opened a file before that was refused has attached it.

Others are not waited for.
"""
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
    """Swap off from all files, or from none if that does not fit into memory.

    And again from those that came on meanwhile.

    It may take minutes, and the caller has files that cannot be opened any more: so what is
    attached at the end is what was being attached at the beginning. Everything that could wait for
    the daemon itself happens in a thread or in its child process. Cannot be cancelled: swapoff ends
    when it ends.

    Args:
        files: the backing files, whether swapped on or not.
        pool_bytes: memory that the pool would give back; 0 without discard.
        say: told what is going on, in the daemon's thread; Notifier.status for example.
        progressed: called in the daemon's thread when less is left than ever before, and only then:
            whoever waits may give more time for that, and none to a swapoff that stands still.
        is_opened: says whether somebody has a file open, a swapon that began before this for
            example.
        identities: what the files are, see `detach`.
        run: calls a function in a thread; one that is there already does not wait for memory to
            begin.

    Raises:
        HeadroomError: it does not fit; the daemon has to go on.
        SwapDeviceError: a file is in use for something else, or swapoff failed; likewise.
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
