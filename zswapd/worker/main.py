# SPDX-License-Identifier: GPL-2.0-or-later
"""The main program of a worker: it builds the parts, serves, and returns the exit code."""

from __future__ import annotations

import faulthandler
import sys
from typing import TYPE_CHECKING, Final

import trio

from zswapd import system
from zswapd.control.server import Server
from zswapd.fuse import require_hook
from zswapd.fuse.session import MemoryMonitor
from zswapd.volumes.commands import CacheCommands
from zswapd.worker.assembly import add_setting_files, build
from zswapd.worker.commands import Commands
from zswapd.worker.upgrade import Upgrade
from zswapd.worker.worker import Worker

if TYPE_CHECKING:
    from zswapd.config import Config
    from zswapd.handover.resources import Resources
    from zswapd.worker.prepare import Prepared

SWITCH_S: Final = 0.0005
"""Time, s, after which a thread lets another one have the GIL (5 ms by default).

A refill takes the GIL several times for each 2 MiB, and each time may wait this long for the page
path. With 5 ms, it falls behind a fast fill, whose writes then wait. In the other direction, the
page path waits this long for a thread that makes the text of a scrape.
"""


def run_worker(config: Config, prepared: Prepared, resources: Resources) -> int:
    """Serve in this process, which was forked for it; return the exit code.

    Args:
        config: the settings to begin with.
        prepared: the result of `prepare.prepare`.
        resources: the resources that outlive this worker.

    Raises:
        ZswapdError: the worker cannot start.
    """
    system.ignore_signals()
    faulthandler.enable()
    sys.setswitchinterval(SWITCH_S)
    worker = make_worker(config, prepared, resources)
    code = trio.run(worker.run, instruments=[MemoryMonitor()])
    if code == 0 and not worker.parts.parent.is_alive():  # no other process is there to clear up
        resources.mount.unmount()
        resources.listener.close()
    return code


def make_worker(config: Config, prepared: Prepared, resources: Resources) -> Worker:
    """Return a worker with its parts, its commands and its files.

    Args:
        config: the settings to begin with.
        prepared: the protections, threads and buffers of this process.
        resources: the resources that outlive this worker.

    Raises:
        ArenaError: this program or these settings cannot read the arena.
        MountError: the hook cannot be used.
    """
    require_hook()
    parts, saver, files = build(config, prepared, resources)
    upgrade = Upgrade(parts, saver)
    cache = parts.core.cache.cleancache if parts.core.cache else None
    handlers = {
        **Commands(parts, saver, upgrade).handlers(),
        **files.handlers(),
        **CacheCommands(parts.volumes, cache, saver.save_state).handlers(),
    }
    saver.files = files
    saver.server = Server(resources.listener, handlers)
    add_setting_files(parts, saver)
    return Worker(parts, saver, upgrade, files)
