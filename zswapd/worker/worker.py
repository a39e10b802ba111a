# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker: the asynchronous shell around the core, and the tasks of the process that serves.

The supervisor has mounted, made the arena, and listens on the control socket. It forks the worker,
and the first worker starts like every later one (worker/assembly.py makes its parts). The order is:
protections, before a thread exists or memory is mapped; the core, rebuilt from the arena; a
self-test; the tasks. The worker is ready when it answers requests.

All tasks run in one thread. What blocks in them runs in other threads.

- serve: FUSE requests. Only this task is on the page path.
- refill and housekeeping: worker/upkeep.py.
- shrinking: gives the cache's memory back when the system needs it (worker/shrink.py).
- control: the control socket (the commands are in worker/commands.py).
- beat: signs of life, before the worker serves too.
- tick: saves the state for a successor in the shared state.
- signals: SIGUSR1 means stop *if the data can go back into memory*. SIGUSR2 means leave at once
  for a successor. SIGURG means what `zswapctl upgrade` does. These three count only from the
  supervisor, or from a supervisor that takes over an orphan. SIGTERM and SIGINT count only without
  a supervisor.

To stop, the worker swaps off all its swap files, in a thread, while it serves pages. If the data
does not fit into memory, or another process uses a file, the worker logs that and goes on. A swap
device that ended would take the memory of its users with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from zswapd import system
from zswapd.control.listener import supervisor_of
from zswapd.core import crashpoints
from zswapd.errors import ControlError
from zswapd.fuse.failures import way_of
from zswapd.handover.state import HookWord, Phase, Word
from zswapd.host import installation
from zswapd.system.signals import SI_USER, SignalFile
from zswapd.volumes.mounted import configured

if TYPE_CHECKING:
    from zswapd.system.signals import Received
    from zswapd.worker.client_files import ClientFiles
    from zswapd.worker.parts import Parts
    from zswapd.worker.successor import StateSaver
    from zswapd.worker.upgrade import Upgrade

log = logging.getLogger(__name__)

LEFT = 75
"""Exit code of a worker that made room for a successor."""
BROKEN = 70
"""Exit code of a worker with inconsistent books (`InvariantError.exit_code`)."""
TICK_S = 0.5
"""Time between two signs of life, s."""
# A worker of an older version ignores SIGURG.
_STOP, _LEAVE, RELOAD = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG)
_ORDERS = frozenset({_STOP, _LEAVE, RELOAD})
"""Signals that count only from a supervisor."""
_STOPS = frozenset({_STOP, signal.SIGTERM, signal.SIGINT})
_SIGNALS = frozenset({*_ORDERS, *_STOPS})


class Worker:
    """The tasks of one process that serves.

    Args:
        parts: the parts of this worker.
        saver: saves the state for a successor.
        upgrade: replaces this worker on request.
        files: the swap files, which may come and go.
    """

    def __init__(
        self, parts: Parts, saver: StateSaver, upgrade: Upgrade, files: ClientFiles
    ) -> None:
        self.parts = parts
        self._files = files
        self._saver = saver
        self._upgrade = upgrade
        self._phase = Phase.STARTING
        self._end: int | None = None
        parts.session.operations.failures.when_broken = self._give_up

    # Start and end.

    async def run(self) -> int:
        """Serve until told to end; return the exit code.

        Raises:
            MountError: the session can be neither served nor taken over.
        """
        parts = self.parts
        parts.core.self_test()
        if crashpoints.arm_from_environment(os.environ, parts.state.words[Word.STARTED]):
            log.warning("a crash point is armed: this worker will fail on purpose")
        with parts.session:
            system.freeze_garbage_collector()
            with contextlib.closing(SignalFile(_SIGNALS)) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat)
                    if parts.volumes:  # before a request for a volume comes
                        await nursery.start(parts.volumes.run, configured(parts.settings.current))
                    nursery.start_soon(parts.merging.run)  # unreadable pages may be known already
                    await nursery.start(self._serve, nursery.cancel_scope)
                    nursery.start_soon(parts.upkeep.refill)
                    nursery.start_soon(parts.upkeep.recompress)
                    if parts.disk:
                        nursery.start_soon(parts.disk.run, parts.core)
                    nursery.start_soon(parts.upkeep.keep_house, self._set_priority)
                    nursery.start_soon(parts.emptying.run)
                    nursery.start_soon(self._tick)
                    if parts.shrinking:
                        nursery.start_soon(parts.shrinking.run)
                        nursery.start_soon(
                            partial(parts.psi_thread.run, parts.pressure.arm, abandon=True)
                        )
                    nursery.start_soon(parts.cost.run, parts.psi_thread)
                    nursery.start_soon(self._handle_signals, signals, nursery)
                    await nursery.start(self._saver.server.serve)
                    if parts.exporter:
                        parts.exporter.start(self._saver.snapshot)
                    self._say_ready()
                    nursery.start_soon(self._files.add_configured)
                    self._set_priority()
                    if parts.is_cold:
                        nursery.start_soon(self._warm_up)
            self._saver.save_state()
        return self._end or 0

    async def _serve(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve requests until the session ends.

        If another process has unmounted, no file is left to serve, and the daemon ends.
        """
        await self.parts.session.serve(task_status=task_status)
        if self._end is None:
            self._enter(Phase.STOPPING)
            self._end = 0
        scope.cancel()

    def _say_ready(self) -> None:
        parts = self.parts
        number = parts.state.words[Word.STARTED]
        names = (
            ", ".join(str(parts.session.mountpoint / name) for name in parts.core.devices)
            or "the cache alone"
        )
        if number > 1:
            self._saver.takeover_s = time.monotonic() - parts.begun
            pages = parts.core.statistics(ages_sampled=False).zv.curr_pages
            log.info(
                "worker %d serves %s, %d pages, after %.0f ms",
                number,
                names,
                pages,
                self._saver.takeover_s * 1000,
            )
        else:
            for item in parts.protections:
                if not item.on:
                    log.warning(
                        "protection %s is off: %s%s",
                        item.name,
                        item.detail,
                        f" ({item.hint})" if item.hint else "",
                    )
            log.info(
                "ready: serving %s%s",
                names,
                f"; {installation.of_daemon().call('swapon')} switches it on"
                if parts.core.devices
                else "",
            )
        self._enter(Phase.SERVING)
        parts.parent.call()

    def _set_priority(self) -> None:
        """Leave real-time scheduling, which the start needs, except where the settings want it."""
        scheduling = self.parts.settings.current.service.scheduling
        if scheduling == "nice":
            self.parts.session.set_scarce(system.scarce_bytes())
        elif scheduling != "rr":
            system.set_normal()

    async def _warm_up(self) -> None:
        """Load programs and libraries into memory; they may be in swap that this worker serves."""
        await self.parts.swapoff_thread.run(system.read_code, abandon=True)
        system.populate_code()

    async def _handle_signals(self, signals: SignalFile, nursery: trio.Nursery) -> None:
        while self._end is None:
            await trio.lowlevel.wait_readable(signals.descriptor)
            for received in signals.read():
                if self._end is None:
                    await self._act_on(received, nursery)
        nursery.cancel_scope.cancel()

    async def _act_on(self, received: Received, nursery: trio.Nursery) -> None:
        """Obey a signal, if its sender may send it."""
        number = received.number
        if not self._counts(received):
            log.warning(
                "%s from process %d is ignored",
                received.name,
                received.sender,
                extra={"rate_limit": 60},
            )
        elif number == RELOAD:
            nursery.start_soon(self._upgrade.reload)
        elif number == _LEAVE:
            self._end = LEFT
            self.parts.session.terminate()
        elif await self._stop(received.name):
            self._end = 0
            self.parts.session.terminate()

    def _counts(self, received: Received) -> bool:
        """Say whether a signal is to be obeyed.

        An orphan obeys the next supervisor, which already has the lock (orphan.py).
        """
        if received.number not in _ORDERS:
            return not self.parts.parent.is_alive()
        if received.code != SI_USER:
            return False
        if self.parts.parent.is_alive():
            return received.sender == self.parts.parent.pid
        with contextlib.suppress(ControlError):
            return received.sender == supervisor_of(self.parts.settings.current.control.socket)
        return False

    def _give_up(self, handler: str, error: Exception) -> None:
        """End this process at once, because the core may be inconsistent; a successor takes over.

        Return if there is no supervisor, and so no successor.
        """
        if not self.parts.parent.is_alive():
            return
        self.parts.state.words[Word.BROKEN] += 1
        log.critical("internal error in %s, a successor takes over: %s", handler, way_of(error))
        os._exit(BROKEN)

    async def _stop(self, cause: str) -> bool:
        """Swap off; return whether the daemon may end."""
        if not await self.parts.shutdown.attempt(
            "told by the supervisor" if self.parts.parent.is_alive() else cause
        ):
            return False
        self._enter(Phase.STOPPING)
        return True

    def _enter(self, phase: Phase) -> None:
        """Write the phase of this process into the shared state."""
        self._phase = phase
        self.parts.state.words[Word.PHASE] = phase

    async def _beat(self) -> None:
        while True:
            self.parts.parent.heartbeat()
            self.parts.state.words[Word.PHASE] = self._phase  # repairs a bit that has flipped
            await trio.sleep(TICK_S)

    async def _tick(self) -> None:
        while True:
            for ages in self.parts.core.all_ages:
                ages.look()
            if self.parts.disk:
                self.parts.disk.look()
            if not self._saver.save_if_used():
                # The hook does not see when a coroutine has answered. Without this, a later death
                # would be blamed on that old request.
                self.parts.state.hook_words[HookWord.ACTIVE] = 0
            await trio.sleep(TICK_S)
