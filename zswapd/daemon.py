# SPDX-License-Identifier: GPL-2.0-or-later
"""The asynchronous shell around the core: composition root, background tasks, signals, the order of coming up and going down.

Coming up: protections before any thread exists and before memory is mapped; the core with its reserve; a self-test; the control
socket's lock; the mount; then the tasks. Ready means that the files can be opened.

Tasks, all in one thread, each doing its blocking part elsewhere:

- serve: FUSE requests (the page path; nothing else here is on it);
- refill: populates frames and index nodes when a reserve runs low, ahead of demand;
- housekeeping: gives surplus frames back, compacts, collects garbage, only while no requests come;
- control: the socket; watchdog: systemd's ping;
- signals: SIGTERM and SIGINT stop the daemon *if its data can go back into memory*.

Going down: swapoff of everything that is swapped on from our files, in a thread, while pages are being served; only then the
mount goes. If that cannot fit, or somebody else uses a file, the daemon says so and goes on: a swap device that ends takes
its users' memory with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import trio

from zswapd import log as log_setup
from zswapd import reports, service
from zswapd.assembly import Core
from zswapd.config import changed, describe
from zswapd.control.server import Server
from zswapd.errors import ArenaError, SwapDeviceError
from zswapd.fuse.inodes import Directory
from zswapd.fuse.operations import Operations
from zswapd.fuse.session import Session
from zswapd.reclaim.pressure import spare_pages
from zswapd.swapdevice.draining import drain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zswapd.allocators.pageframes import Job
    from zswapd.config import Config
    from zswapd.control.protocol import StatusReport

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REFILL_FRAMES_BYTES = 8 << 20
"""Memory that one refill job populates: some milliseconds of zeroing in another thread."""
RETRY_S = 0.25
"""Pause after a refill that found no memory."""
IDLE_S = 1.0
"""Housekeeping looks once in this time, and works only if no request came since the last look."""


class Daemon:
    """One running zswapd.

    Args:
        config: the settings to begin with.
        protections: what `service.protect` reached.
    """

    def __init__(self, config: Config, protections: Sequence[service.Protection]) -> None:
        self.config = config
        self.protections = tuple(protections)
        self.core = Core(config)
        directory = Directory()
        for device in self.core.devices.values():
            directory.add_block_file(device)
        self.session = Session(
            Operations(directory, page_size=config.context.page_size),
            config.fuse.mountpoint,
            hook=config.fuse.hook,
            poll_us=config.fuse.poll_us,
            budget_us=config.fuse.budget_us,
        )
        self.server = Server(config.control.socket, self._handlers())
        self.notifier = service.Notifier()
        self._started = time.monotonic()
        self._stopping = False
        self._refill_wanted = trio.Event()
        self.core.frames.when_low = self._wake_refill
        self.core.nodes.when_low = self._wake_refill

    # Coming up and going down.

    async def run(self) -> None:
        """Serve until a signal stops the daemon, with nothing swapped on any more.

        Raises:
            MountError, PermissionsError: the files cannot be mounted; nothing is left behind.
            ControlError: another daemon has the control socket.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.core.close)
            self.core.self_test()
            stack.enter_context(self.server)
            stack.enter_context(self.session)
            service.freeze_garbage_collector()
            with trio.open_signal_receiver(*_STOP_SIGNALS) as signals:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.session.serve)
                    nursery.start_soon(self._refill)
                    nursery.start_soon(self._housekeeping)
                    nursery.start_soon(self._watchdog)
                    await nursery.start(self.server.serve)
                    self._say_ready()
                    async for number in signals:
                        if await self._stop(signal.Signals(number).name):
                            break
                    nursery.cancel_scope.cancel()

    def _say_ready(self) -> None:
        names = ", ".join(str(self.config.fuse.mountpoint / name) for name in self.core.devices)
        for item in self.protections:
            if not item.on:
                log.warning("protection %s is off: %s%s", item.name, item.detail, f" ({item.hint})" if item.hint else "")
        self.notifier.ready(f"serving {names}")
        log.info("ready: serving %s; `zswapctl swapon` switches it on", names)

    async def _stop(self, cause: str) -> bool:
        """Take back everything that is swapped out to our files; return whether the daemon may end."""
        self._stopping = True
        self.notifier.status("stopping: swapping off")
        log.info("%s: stopping", cause)
        try:
            frames = self.core.frames.statistics()
            # Without discard nobody tells us which slots swapoff has emptied: the pool gives nothing back until the end.
            pool_bytes = frames.used_frames * frames.page_size if self.session.hook_active else 0
            files = [self.config.fuse.mountpoint / name for name in self.core.devices]
            await drain(files, pool_bytes=pool_bytes, say=self.notifier.status)
        except SwapDeviceError as error:
            self._stopping = False
            log.error(  # noqa: TRY400 - a reason, not a bug
                "not stopping, the data has nowhere to go: %s", error
            )
            self.notifier.status(f"still serving, cannot stop: {error.message}")
            return False
        self.notifier.stopping("unmounting")
        return True

    # Background tasks.

    def _wake_refill(self) -> None:
        """Called from the page path when a reserve runs low."""
        self._refill_wanted.set()

    async def _refill(self) -> None:
        while True:
            await self._refill_wanted.wait()
            self._refill_wanted = trio.Event()
            while self.core.frames.wants_refill() or self.core.nodes.wants_refill():
                try:
                    await self._refill_nodes()
                    await self._refill_frames()
                except ArenaError as error:
                    log.warning("the reserve cannot be refilled: %s", error, extra={"rate_limit": 10})
                    await trio.sleep(RETRY_S)

    async def _refill_nodes(self) -> None:
        nodes = self.core.nodes
        if nodes.wants_refill():
            nodes.commit(await trio.to_thread.run_sync(nodes.refill, nodes.begin_refill()))

    async def _refill_frames(self) -> None:
        frames = self.core.frames
        job = frames.begin_refill(REFILL_FRAMES_BYTES // frames.page_size)
        if not job.runs:
            return
        try:
            await trio.to_thread.run_sync(self._work, job, frames.table.long_frames < frames.reserve_target // 4)
        finally:
            frames.commit(job)

    def _work(self, job: Job, urgent: bool) -> None:  # noqa: FBT001 - positional through to_thread
        """Do a job, in another thread; memory below the kernel's watermarks is taken only in need."""
        if not urgent and spare_pages() * self.config.context.page_size < REFILL_FRAMES_BYTES:
            raise ArenaError("the system's free memory is at its watermarks", hint="the reserve is filled when there is more")
        job.work(self.core.arena)

    async def _housekeeping(self) -> None:
        core = self.core
        seen = -1
        garbage_due = False
        while True:  # by the clock: there is no event for "nothing happens"
            await trio.sleep(IDLE_S)
            requests = self._requests()
            idle, seen = requests == seen, requests
            garbage_due = garbage_due or not idle
            if core.frames.wants_trim():
                await self._trim()
            if not idle:
                continue
            while core.wants_compaction() and core.compact_step() and self._requests() == seen:
                await trio.lowlevel.checkpoint()
            if garbage_due:
                service.collect_garbage()
                garbage_due = False

    def _requests(self) -> int:
        """Return a number that changes with every page that is read, written or discarded."""
        front = self.core.frontswap.statistics()
        return front.succ_stores + front.failed_stores + front.loads + front.failed_loads + front.invalidates

    async def _trim(self) -> None:
        frames = self.core.frames
        while (job := frames.begin_trim(REFILL_FRAMES_BYTES // frames.page_size)).runs:
            try:
                await trio.to_thread.run_sync(job.work, self.core.arena)
            finally:
                frames.commit(job)

    async def _watchdog(self) -> None:
        while True:
            self.notifier.watchdog()
            await trio.sleep(self.notifier.watchdog_interval or math.inf)

    # Control commands.

    def _handlers(self) -> dict[str, Any]:
        return {
            "status": self._status,
            "stats": self._stats,
            "get": lambda keys=(): describe(self.config, list(keys)),
            "set": self._set,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "compact": self._compact,
        }

    def _status(self) -> StatusReport:
        statistics = self.core.statistics()
        frozen = statistics.frontswap.frozen
        return {
            "version": reports.version(),
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "state": "stopping" if self._stopping else "frozen" if frozen else "serving",
            "mountpoint": str(self.config.fuse.mountpoint),
            "page_size": self.config.context.page_size,
            "discard": self.session.hook_active,
            "pool": reports.pool_report(statistics, self.config.pool.compressor),
            "files": [
                {"name": device.name, "size": device.size, "stored_pages": device.stored_pages} for device in statistics.devices
            ],
            "protections": reports.protection_reports(service.refreshed(self.protections)),
            "advice": reports.protection_reports(service.advise()),
        }

    def _stats(self) -> dict[str, Any]:
        return {
            "core": reports.plain(self.core.statistics()),
            "fuse": reports.plain(self.session.statistics()),
            "control": reports.plain(self.server.statistics()),
        }

    def _set(self, settings: dict[str, object]) -> dict[str, Any]:
        """Change settings, all or none."""
        config = changed(self.config, settings, source="zswapctl set")
        self.config = config
        self.core.apply(config)
        self.session.set_poll_us(config.fuse.poll_us)
        log_setup.set_level(config.log.level)
        return describe(config, list(settings))

    def _freeze(self) -> dict[str, Any]:
        self.core.frontswap.freeze()
        return {"frozen": True}

    def _thaw(self) -> dict[str, Any]:
        self.core.frontswap.thaw()
        return {"frozen": False}

    async def _compact(self) -> dict[str, Any]:
        before = self.core.frames.used_frames
        while self.core.compact_step():
            await trio.lowlevel.checkpoint()
        return {"frames_before": before, "frames_after": self.core.frames.used_frames}


def run(config: Config) -> int:
    """Run the daemon until a signal stops it; return the exit code.

    Args:
        config: the settings to begin with.

    Raises:
        ZswapdError: it cannot come up; nothing is left behind.
    """
    # Until the receiver is there, and again after it: a second SIGTERM must not end the process before it has unmounted.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    protections = service.protect(
        lock_memory=config.service.lock_memory,
        io_flusher=config.service.io_flusher,
        oom_score_adj=config.service.oom_score_adj,
    )
    trio.run(Daemon(config, protections).run)
    return 0
