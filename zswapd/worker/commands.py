# SPDX-License-Identifier: GPL-2.0-or-later
"""The control commands: what zswapctl asks of a running worker. Each handler is the whole of its command.

A new command is a row in control/protocol.py (COMMANDS), a method and a line in `handlers` here, and a command in
cli/zswapctl.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import outcome
import trio

from zswapd import log as log_setup
from zswapd import system
from zswapd.config import changed, describe
from zswapd.config.document import LONGEST_DOCUMENT
from zswapd.control.server import WithDescriptors
from zswapd.core import compress
from zswapd.core.allocators.arena import LAYOUT_VERSION as ARENA_LAYOUT
from zswapd.core.block.state import batches
from zswapd.core.core import store_codecs
from zswapd.core.reclaim.recompress import STRONGER
from zswapd.errors import BackingError, ConfigError, ControlError, HandoverError, ZswapdError
from zswapd.handover import costs
from zswapd.handover.state import UPGRADE_WANTED, HookWord, Word
from zswapd.host import installation
from zswapd.host.hints import no_swap_file
from zswapd.host.installation import restart_daemon
from zswapd.system import spawn
from zswapd.volumes import mounted
from zswapd.worker import reports

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from zswapd.config import Config
    from zswapd.control.listener import Listener
    from zswapd.control.protocol import StatusReport
    from zswapd.core.block.state import PageState
    from zswapd.worker.worker import Worker

    Report = Callable[[object], Awaitable[None]]
    """Sends a piece of progress (control/server.py)."""

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECK_S = 60.0
"""How long the installed program may take to say that it can take over."""
SET_BY = "zswapctl set"
"""The origin of what was changed at run time."""
_ALL = 1 << 62
_HINT = "zswapd: hint: "
"""How the installed program's hint begins (cli/failures.py)."""
PROGRESS_S = 0.5
"""Time between two pieces of news from a command that takes long; clients lose their patience after 30 s without."""


class Commands:
    """Handlers over one worker.

    Args:
        worker: which knows everything that is asked for.
        listener: the control socket, whose descriptors are handed on.
    """

    def __init__(self, worker: Worker, listener: Listener) -> None:
        self._worker = worker
        self._listener = listener

    def handlers(self) -> dict[str, Any]:
        """Return the handlers by command."""
        return {
            "status": self._status,
            "stats": self._stats,
            "get": lambda keys=(): describe(self._worker.config, list(keys)),
            "set": self.change,
            "reset": self._reset,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "compact": self._compact,
            "pages": self._pages,
            "writeback": self._writeback,
            "recompress": self._recompress,
            "shrink": self._shrink,
            "upgrade": self._upgrade,
            "inherit": self._inherit,
        }

    def _status(self) -> StatusReport:
        worker = self._worker
        config, statistics, words = worker.config, worker.core.statistics(ages_sampled=False), worker.state.words
        frozen = statistics.frontswap.frozen
        return {
            "version": reports.version(),
            "pid": os.getppid() if worker.has_supervisor() else os.getpid(),
            "worker": {
                "pid": os.getpid(),
                "number": words[Word.STARTED],
                "deaths": words[Word.DEATHS],
                "takeover_s": round(worker.takeover_s, 6),
                "supervised": worker.has_supervisor(),
                "poisoned_requests": worker.state.hook_words[HookWord.POISONED],
            },
            "uptime_s": round(time.monotonic() - worker.born, 3),
            "state": "stopping" if worker.stopping.is_under_way else "frozen" if frozen else "serving",
            "mountpoint": str(worker.session.mountpoint),
            "page_size": config.context.page_size,
            "discard": worker.session.hook_active,
            "pool": reports.pool_report(statistics, config.pool.compressor),
            "backing": worker.backed.report(config, statistics) if worker.backed else None,
            "cache": reports.cache_report(statistics, worker.volumes.statistics() if worker.volumes else ()),
            "files": [
                {"name": device.name, "size": device.size, "stored_pages": device.stored_pages} for device in statistics.devices
            ],
            "memory_limit": reports.limit_report(worker.pressure.limits.room()),
            "protections": reports.protection_reports(system.refreshed(worker.protections)),
            "advice": reports.protection_reports(system.advise()),
        }

    def _stats(self) -> dict[str, Any]:
        return cast("dict[str, Any]", reports.plain(self._worker.tell(ages_sampled=True)))

    def change(self, settings: dict[str, object]) -> dict[str, Any]:
        """Change settings, all or none, and return them.

        Raises:
            ConfigError: one of them is refused.
        """
        self._apply({**self._worker.changes, **settings}, changed(self._worker.config, settings, source=SET_BY))
        return describe(self._worker.config, list(settings))

    def _reset(self, keys: Sequence[str] = ()) -> dict[str, Any]:
        """Give settings that were changed their configured values again, all of them if none is named; return them.

        Raises:
            ConfigError: a name is unknown, or what the settings would be together is refused.
        """
        worker = self._worker
        names = list(describe(worker.config, keys)) if keys else list(worker.changes)
        left = {name: value for name, value in worker.changes.items() if name not in names}
        self._apply(left, changed(worker.configured, left, source=SET_BY))
        return describe(worker.config, names) if names else {}

    def _apply(self, changes: dict[str, object], config: Config) -> None:
        """Let a Config that is right count from now on, and for successors what in it was changed."""
        worker = self._worker
        if (config.cache.limit is None) != (worker.config.cache.limit is None):
            raise ConfigError(
                "cache.limit cannot switch the cache on or off while the daemon runs",
                hint=f"set it in the config file, then {restart_daemon()}",
            )
        costs.check_change(worker.config, config, marked=worker.core.recompression.is_prepared)
        worker.config = config
        worker.changes = changes
        worker.state.note_codecs(store_codecs(config))
        worker.core.apply(config)
        if worker.volumes:
            mounted.apply(worker.volumes, config)
        if worker.shrinking and worker.core.cache:
            worker.shrinking.shrinker.limit_frames = worker.core.cache.eviction.limit_frames
        worker.session.set_poll_us(config.fuse.poll_us)
        if worker.backed:
            worker.backed.set_poll_us(config.fuse.poll_us)
        log_setup.set_level(config.log.level)
        worker.remember()

    def _freeze(self) -> dict[str, Any]:
        self._worker.core.frontswap.freeze()
        self._worker.remember()
        return {"frozen": True}

    def _thaw(self) -> dict[str, Any]:
        self._worker.core.frontswap.thaw()
        self._worker.remember()
        return {"frozen": False}

    async def _compact(self, report: Report) -> dict[str, Any]:
        core = self._worker.core
        before = core.frames.used_frames
        told = time.monotonic()
        while core.compact_step():
            await trio.lowlevel.checkpoint()
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                await report({"frames_freed": before - core.frames.used_frames})
        return {"frames_before": before, "frames_after": core.frames.used_frames}

    async def _pages(self, report: Report, file: str | None = None) -> dict[str, Any]:
        """Tell of every page that has data, in pieces: requests are served between two of them, and nothing is kept."""
        core = self._worker.core
        if file is not None and file not in core.devices:
            raise no_swap_file(file, list(core.devices))
        codecs = {codec: compressor.name for codec, compressor in compress.by_codec().items()}
        counts: dict[str, int] = {}
        told = time.monotonic()
        for name in [file] if file is not None else core.devices:
            device = core.devices[name]
            for rows in batches(device, device.size // core.frames.page_size):
                if rows or time.monotonic() - told >= PROGRESS_S:
                    told = time.monotonic()
                    await report({"file": name, "pages": [self._page_row(codecs, *row) for row in rows]})
                else:
                    await trio.lowlevel.checkpoint()
                for _number, state in rows:
                    counts[state.state] = counts.get(state.state, 0) + 1
        return {"pages": counts}

    def _page_row(self, codecs: Mapping[int, str], number: int, state: PageState) -> tuple[object, ...]:
        """Return [page, state, codec or None, bytes, seconds since its last use or None]."""
        writeback = self._worker.core.writeback
        age = int(writeback.age_s(state.epoch)) if writeback and state.epoch else None
        return number, state.state, codecs.get(state.codec), state.size, age

    async def _shrink(self, report: Report, frames: int) -> dict[str, Any]:
        """Take memory from the cache and give it back to the system."""
        worker = self._worker
        if worker.shrinking is None:
            raise ControlError(
                "there is no cache that could shrink", hint=f"set cache.limit in the config file, then {restart_daemon()}"
            )
        shrinking, before = worker.shrinking, worker.core.frames.ephemeral_frames
        given_back = await _with_news(
            report,
            lambda: {"frames_freed": max(before - worker.core.frames.ephemeral_frames, 0)},
            lambda: shrinking.shrink(frames),
        )
        return {"frames": given_back, "left": worker.core.frames.ephemeral_frames, "page_size": worker.core.frames.page_size}

    async def _writeback(
        self, report: Report, *, pages: int = _ALL, idle: bool = False, incompressible: bool = False, unused: int = 0
    ) -> dict[str, Any]:
        """Send pages to the disk, the oldest first, and wait until they are there; or only mark all of them as unused."""
        writeback = self._worker.core.writeback
        if writeback is None:
            raise BackingError(
                "there is no disk behind the pool", hint=f"set backing.path in the config file, then {restart_daemon()}"
            )
        if idle:
            if pages != _ALL or incompressible or unused:
                raise ControlError("pages are marked as unused all together", hint="send some with a second command")
            writeback.mark_idle()
            return {"marked": True}
        before = self._written_back()
        writeback.command(pages, incompressible=incompressible, unused_s=unused)
        told = time.monotonic()
        while writeback.commanded or writeback.in_flight:
            if trouble := self._worker.backed.transfers.trouble if self._worker.backed else "":
                writeback.command(0)
                raise BackingError(
                    f"the disk behind the pool takes nothing: {trouble}", hint="`dmesg` may have the kernel's reason"
                )
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                await report({"written_back": self._written_back() - before})
            await trio.sleep(0.01)
        return {"written_back": self._written_back() - before}

    def _written_back(self) -> int:
        """Return the number of pages that have left the pool for the disk."""
        return sum(item.written_back_pages for item in self._worker.core.statistics(ages_sampled=False).backed)

    async def _recompress(self, report: Report) -> dict[str, Any]:
        """Compress all pages again with a stronger codec, at the rate that is set, and wait until that is done."""
        worker, core = self._worker, self._worker.core
        if not core.recompression.is_prepared:
            costs.check_marks(worker.config, "recompression")
        worker.state.note_codecs([STRONGER])
        before, tried = core.zv.statistics(), core.recompression.statistics()
        core.recompression.command()
        told = time.monotonic()
        while core.recompression.is_running:
            await trio.sleep(0.05)
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                await report({"tried": core.recompression.statistics().tried - tried.tried})
        after, now = core.zv.statistics(), core.recompression.statistics()
        return {
            "recompressed": after.recompressed - before.recompressed,
            "saved_bytes": after.recompress_saved_bytes - before.recompress_saved_bytes,
            "in_vain": now.in_vain - tried.in_vain,
        }

    async def _upgrade(self, report: Report) -> dict[str, Any]:
        """Have the installed program checked, then take over; the answer comes before it does."""
        worker = self._worker
        if not worker.has_supervisor():
            raise HandoverError(
                "there is no supervisor that could be replaced",
                hint=f"{installation.of_daemon().start()} starts one, which takes over",
            )
        self._refuse_without_hook()
        identity = {
            "arena_layout": ARENA_LAYOUT,
            "arena_label": worker.core.arena.label.decode(),
            "state_layout": worker.state.layout,
            "geometry": worker.state.geometry,
            "memory_total": worker.configured.context.memory_total,
        }
        command = [sys.executable, *sys.orig_argv[1:], "--upgrade-check", json.dumps(identity)]
        began = trio.current_time()
        check = await _with_news(
            report,
            lambda: {"seconds_of_checking_the_installed_program": int(trio.current_time() - began)},
            partial(self._check, command),
        )
        if check.code != 0:
            reason, hint = _reason_in(check.err)
            reason = reason or f"exit code {check.code}"
            hint = f"{hint}; the running one goes on" if hint else "the running one goes on"
            raise HandoverError(f"the installed program cannot take over: {reason}", hint=hint)
        worker.checked = _settings_in(check.out)
        worker.remember()
        worker.state.words[Word.UPGRADE] = UPGRADE_WANTED
        worker.call_supervisor()
        return {"version": reports.version(), "worker": os.getpid(), "number": worker.state.words[Word.STARTED]}

    async def _check(self, command: list[str]) -> spawn.Finished:
        hint = "the running one goes on"
        try:
            return await self._worker.attendant.run(partial(spawn.run, command, limit=CHECK_S), abandon=True)
        except TimeoutError as error:
            raise HandoverError(f"the installed program did not answer within {CHECK_S:g} s", hint=hint) from error
        except OSError as error:  # being replaced just now, or no memory for a process
            raise HandoverError(f"the installed program cannot be started: {error.strerror}", hint=hint) from error

    def _refuse_without_hook(self) -> None:
        """Keep a session that cannot be taken over with the one who serves it."""
        if not self._worker.session.hook_active:
            reason = self._worker.session.hook_problem
            raise HandoverError(
                f"this session cannot be taken over, since the FUSE hook is not in use: {reason}",
                hint=f"to do without: {restart_daemon()}",
            )

    async def reload(self) -> None:
        """Upgrade, as a signal asks for it: to read the settings again is part of that. What is refused goes to the log."""
        try:
            await self._upgrade(_to_nobody)
        except ZswapdError as error:
            log.error("not reloaded: %s", error)  # noqa: TRY400 - a reason, not a bug

    def _inherit(self) -> WithDescriptors:
        """Hand the open files to a new supervisor, if the old one is dead."""
        worker = self._worker
        if worker.has_supervisor():
            raise ControlError("this worker has a supervisor", hint="use `zswapctl upgrade`")
        self._refuse_without_hook()
        listening, lock = self._listener.descriptors()
        backing = (worker.backed.fd,) if worker.backed else ()
        files = (worker.session.descriptor, worker.core.arena.fd, worker.state.fd, listening, lock, *backing)
        return WithDescriptors(os.getpid(), files)


async def _with_news(report: Report, news: Callable[[], object], work: Callable[[], Awaitable[T]]) -> T:
    """Do what takes long, and tell of it every PROGRESS_S; it goes on if there is nobody left to be told.

    Args:
        report: tells the client.
        news: what to tell.
        work: what to do; what it raises is raised.
    """

    async def tell() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            while True:
                await trio.sleep(PROGRESS_S)
                await report(news())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        done = await outcome.acapture(work)
        nursery.cancel_scope.cancel()
    return done.unwrap()


async def _to_nobody(_news: object) -> None:
    """Be the report of a command that no client has given."""


def _reason_in(output: bytes) -> tuple[str, str]:
    """Return the line that says why a check has failed, and its hint.

    It is the first line, or the last one of a traceback; empty if there is none.
    """
    lines = output.decode(errors="replace").strip().splitlines()
    if not lines:
        return "", ""
    hint = next((line.removeprefix(_HINT) for line in lines if line.startswith(_HINT)), "")
    return lines[-1 if lines[0].startswith("Traceback") else 0].removeprefix("zswapd: error: "), hint


def _settings_in(output: bytes) -> object:
    """Return what a check has printed; None from a program that is too old to print anything, or that prints too much."""
    try:
        return json.loads(output) if len(output) <= LONGEST_DOCUMENT + 1 else None
    except ValueError:
        return None
