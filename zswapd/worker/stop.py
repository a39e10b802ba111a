# SPDX-License-Identifier: GPL-2.0-or-later
"""The stop of a worker: it swaps off all its files first, and goes on serving if that fails.

Every failure is a reason to go on, an error of zswapd included. A worker that died of the error
would be followed by one that is told to stop too, and dies of the same error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zswapd import system
from zswapd.errors import SwapDeviceError
from zswapd.fuse.failures import way_of
from zswapd.handover.state import Word
from zswapd.swapdevice.drain import drain
from zswapd.worker.emptying import identities

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.core import Core
    from zswapd.fuse.inodes import Directory
    from zswapd.fuse.session import Session
    from zswapd.handover.state import SharedState
    from zswapd.system.offload import Offload

log = logging.getLogger(__name__)


class Shutdown:
    """The stop of one worker.

    Args:
        core: stores the pages.
        session: serves the files.
        directory: the directory of the mount.
        state: the shared state, which counts refused stops.
        swapoff_thread: runs swapoff.
        call_supervisor: makes the supervisor read the words of the shared state.

    Attributes:
        is_under_way: a stop is being tried. No program can swap on meanwhile.
    """

    def __init__(
        self,
        core: Core,
        session: Session,
        directory: Directory,
        state: SharedState,
        swapoff_thread: Offload,
        call_supervisor: Callable[[], None],
    ) -> None:
        self.is_under_way = False
        self._core = core
        self._session = session
        self._directory = directory
        self._words = state.words
        self._swapoff_thread = swapoff_thread
        self._call_supervisor = call_supervisor

    async def attempt(self, cause: str) -> bool:
        """Swap off all files of this worker; return whether the worker may end.

        Args:
            cause: the cause of the stop, for the log.
        """
        self.is_under_way = self._session.operations.is_closing = True
        notifier = system.Notifier()
        notifier.status("stopping: swapping off")
        log.info("%s: stopping", cause)
        before = self._failed_reads()
        try:
            await self._drain(notifier)
        except SwapDeviceError as error:
            return self._go_on(notifier, f"the data has nowhere to go: {error}", error.message)
        except Exception as error:  # noqa: BLE001 - any failure is a reason to go on
            return self._go_on(notifier, f"swapoff cannot be tried: {way_of(error)}", str(error))
        finally:
            notifier.close()
        if failed := self._failed_reads() - before:
            log.error(
                "swapped off, but %d reads met damaged or lost pages: a program with one of these"
                " pages is killed when it uses the page",
                failed,
            )
        return True

    def _failed_reads(self) -> int:
        return sum(device.statistics().failed_reads for device in self._core.devices.values())

    async def _drain(self, notifier: system.Notifier) -> None:
        session = self._session
        frames = self._core.frames.statistics()
        pool_frames = frames.used_frames - frames.ephemeral_frames
        pool_bytes = pool_frames * frames.page_size
        await drain(
            [session.mountpoint / name for name in self._core.devices],
            pool_bytes=pool_bytes,
            say=notifier.status,
            progressed=notifier.more_time,
            is_opened=session.operations.writers.is_any_open,
            identities=identities(session, self._directory),
            run=self._swapoff_thread.run,
        )

    def _go_on(self, notifier: system.Notifier, why: str, message: str) -> bool:
        """Go on serving: log the reason, and tell supervisor and service manager; return False."""
        self.is_under_way = self._session.operations.is_closing = False
        self._words[Word.STOPS_REFUSED] += 1
        self._call_supervisor()
        log.error("not stopping, %s", why)
        notifier.status(f"still serving, cannot stop: {message}")
        return False
