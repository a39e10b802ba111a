# SPDX-License-Identifier: GPL-2.0-or-later
"""The control commands that zswapctl sends to a running worker.

Each handler does all the work of its command.

A new command takes a row in control/protocol.py (COMMANDS), a method and a line in `handlers` here,
and a command in cli/zswapctl.py.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from zswapd.core import compress
from zswapd.core.reclaim.recompress import STRONGER
from zswapd.errors import BackingError, ControlError
from zswapd.handover import costs
from zswapd.host.hints import no_swap_file
from zswapd.host.installation import restart_daemon
from zswapd.worker import progress, reports
from zswapd.worker.page_states import batches
from zswapd.worker.progress import run_with_progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.control.protocol import StatusReport
    from zswapd.core.block.state import PageState
    from zswapd.core.reclaim.writeback import Writeback
    from zswapd.worker.parts import Parts
    from zswapd.worker.progress import Report
    from zswapd.worker.successor import StateSaver
    from zswapd.worker.upgrade import Upgrade

_ALL: Final = 1 << 62
PAUSE_S: Final = 0.0005
"""Time between two steps of a search for duplicates, in which requests are served."""


class Commands:
    """The handlers of all control commands of one worker.

    Args:
        parts: the parts of the worker.
        saver: takes statistics, and saves the state for a successor.
        upgrade: replaces the worker.
    """

    def __init__(self, parts: Parts, saver: StateSaver, upgrade: Upgrade) -> None:
        self._parts = parts
        self._saver = saver
        self._upgrade = upgrade

    def handlers(self) -> dict[str, Any]:
        """Return the handlers by command."""
        settings = self._parts.settings
        return {
            "status": self._status,
            "stats": self._stats,
            "get": lambda keys=(): settings.describe(keys),
            "set": settings.change,
            "reset": settings.reset,
            "freeze": self._freeze,
            "thaw": self._thaw,
            "compact": self._compact,
            "pages": self._pages,
            "duplicates": self._duplicates,
            "writeback": self._writeback,
            "recompress": self._recompress,
            "shrink": self._shrink,
            "upgrade": self._upgrade.upgrade,
            "inherit": self._upgrade.hand_over,
        }

    def _status(self) -> StatusReport:
        return reports.status_report(self._parts, takeover_s=self._saver.takeover_s)

    def _stats(self) -> dict[str, Any]:
        return cast("dict[str, Any]", reports.plain(self._saver.snapshot(ages_sampled=True)))

    def _freeze(self) -> dict[str, Any]:
        self._parts.core.frontswap.freeze()
        self._saver.save_state()
        return {"frozen": True}

    def _thaw(self) -> dict[str, Any]:
        self._parts.core.frontswap.thaw()
        self._saver.save_state()
        return {"frozen": False}

    async def _compact(self, report: Report) -> dict[str, Any]:
        core = self._parts.core
        before = core.frames.used_frames

        async def compact() -> None:
            while core.compact_step():
                await trio.lowlevel.checkpoint()

        await run_with_progress(
            report, lambda: {"frames_freed": before - core.frames.used_frames}, compact
        )
        return {"frames_before": before, "frames_after": core.frames.used_frames}

    async def _pages(self, report: Report, file: str | None = None) -> dict[str, Any]:
        """Report the state of every page that has data or is lost, batch by batch.

        Requests are served between two batches. No list of all pages is kept.
        """
        core = self._parts.core
        if file is not None and file not in core.devices:
            raise no_swap_file(file, list(core.devices))
        codecs = {codec: compressor.name for codec, compressor in compress.by_codec().items()}
        counts: dict[str, int] = {}
        told = time.monotonic()
        for name in [file] if file is not None else core.devices:
            device = core.devices[name]
            for rows in batches(device, device.size // core.frames.page_size):
                if rows or time.monotonic() - told >= progress.PROGRESS_S:
                    told = time.monotonic()
                    await report(
                        {"file": name, "pages": [self._page_row(codecs, *row) for row in rows]}
                    )
                else:
                    await trio.lowlevel.checkpoint()
                for _number, state in rows:
                    counts[state.state] = counts.get(state.state, 0) + 1
        return {"pages": counts}

    async def _duplicates(self, report: Report, file: str | None = None) -> dict[str, Any]:
        """Estimate how many pages of the pool are equal, 0.5 ms at a time."""
        core = self._parts.core
        if file is not None and file not in core.devices:
            raise no_swap_file(file, list(core.devices))
        chosen = [core.devices[name] for name in ([file] if file is not None else core.devices)]
        search, told = core.duplicate_search(chosen), time.monotonic()
        while not search.is_done:
            search.step()
            if time.monotonic() - told >= progress.PROGRESS_S:
                told = time.monotonic()
                await report({"pages": search.looked})
            await trio.sleep(PAUSE_S)
        return {
            "files": [reports.plain(one) for one in search.result()],
            "sampled_one_in": search.stride,
        }

    def _page_row(
        self, codecs: Mapping[int, str], number: int, state: PageState
    ) -> tuple[object, ...]:
        """Return (page, state, codec or None, bytes, seconds since the last use or None)."""
        writeback = self._parts.core.writeback
        age = int(writeback.age_s(state.epoch)) if writeback and state.epoch else None
        return number, state.state, codecs.get(state.codec), state.size, age

    async def _shrink(self, report: Report, frames: int) -> dict[str, Any]:
        """Evict frames of the cache, and give their memory back to the system."""
        parts = self._parts
        if parts.shrinking is None:
            raise ControlError(
                "there is no cache to shrink",
                hint=f"set cache.limit in the config file, then {restart_daemon()}",
            )
        shrinking, before = parts.shrinking, parts.core.frames.ephemeral_frames
        given_back = await run_with_progress(
            report,
            lambda: {"frames_freed": max(before - parts.core.frames.ephemeral_frames, 0)},
            lambda: shrinking.shrink(frames),
        )
        return {
            "frames": given_back,
            "left": parts.core.frames.ephemeral_frames,
            "page_size": parts.core.frames.page_size,
        }

    async def _writeback(
        self,
        report: Report,
        *,
        pages: int = _ALL,
        idle: bool = False,
        incompressible: bool = False,
        unused: int = 0,
    ) -> dict[str, Any]:
        """Write pages to the disk, the oldest first, and wait until they are written.

        With `idle`, only mark all pages as unused.
        """
        writeback = self._parts.core.writeback
        if writeback is None:
            raise BackingError(
                "there is no disk behind the pool",
                hint=f"set backing.path in the config file, then {restart_daemon()}",
            )
        if idle:
            if pages != _ALL or incompressible or unused:
                raise ControlError(
                    "--mark-idle marks all pages, and takes no other option",
                    hint="write pages with a second command",
                )
            writeback.mark_idle()
            return {"marked": True}
        before = self._written_back()
        writeback.command(pages, incompressible=incompressible, unused_s=unused)

        def written() -> dict[str, Any]:
            return {"written_back": self._written_back() - before}

        await run_with_progress(report, written, partial(self._wait_for_writeback, writeback))
        return written()

    async def _wait_for_writeback(self, writeback: Writeback) -> None:
        """Wait until the pages of a command are written.

        Raises:
            BackingError: the disk takes nothing. The rest of the command is dropped.
        """
        while writeback.commanded or writeback.in_flight:
            if trouble := self._parts.disk.transfers.trouble if self._parts.disk else "":
                writeback.command(0)
                raise BackingError(
                    f"the disk behind the pool takes nothing: {trouble}",
                    hint="`dmesg` may show the kernel's reason",
                )
            await trio.sleep(0.01)

    def _written_back(self) -> int:
        """Return the number of pages that were moved from the pool to the disk."""
        return sum(
            item.written_back_pages
            for item in self._parts.core.statistics(ages_sampled=False).backed
        )

    async def _recompress(self, report: Report) -> dict[str, Any]:
        """Compress all pages again with a stronger codec, at the configured rate; wait for it."""
        parts, core = self._parts, self._parts.core
        if not core.recompression.is_prepared:
            costs.check_marks(parts.settings.current, "recompression")
        parts.state.note_codecs([STRONGER])
        before, tried = core.zv.statistics(), core.recompression.statistics()
        core.recompression.command()

        async def wait() -> None:
            while core.recompression.is_running:
                await trio.sleep(0.05)

        await run_with_progress(
            report, lambda: {"tried": core.recompression.statistics().tried - tried.tried}, wait
        )
        after, now = core.zv.statistics(), core.recompression.statistics()
        return {
            "recompressed": after.recompressed - before.recompressed,
            "saved_bytes": after.recompress_saved_bytes - before.recompress_saved_bytes,
            "in_vain": now.in_vain - tried.in_vain,
        }
