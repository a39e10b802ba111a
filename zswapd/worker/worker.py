# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker: the asynchronous shell around the core, and the composition root of the process that serves pages.

It is forked by the supervisor, which has mounted, made the arena, and listens on the control socket; a worker builds itself
around what it is given, the first one like every later one. Coming up: protections, before any thread exists and before
memory is mapped; the core, rebuilt from the arena; a self-test; then the tasks. Ready means that requests are answered.

Tasks, all in one thread, each doing its blocking part elsewhere:

- serve: FUSE requests (the page path; nothing else here is on it);
- refill and housekeeping: worker/upkeep.py;
- shrinking: the cache's memory goes back when others need it;
- control: the socket (worker/commands.py has the commands);
- beat and tick: signs of life, also before it serves; what a successor has to know, into the shared state;
- signals: SIGUSR1 means stop *if the data can go back into memory*, SIGUSR2 means make room for a
  successor now, SIGURG what `zswapctl upgrade` does; each counts only from the supervisor, or from
  one that takes over from an orphan. SIGTERM and SIGINT are obeyed only without a supervisor.

Stopping: swapoff of everything that is swapped on from our files, in a thread, while pages are being served. If that cannot
fit, or somebody else uses a file, the worker says so and goes on: a swap device that ends takes its users' memory with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from zswapd import counters, system
from zswapd.config import to_document, with_changes
from zswapd.control.listener import supervisor_of
from zswapd.control.server import Server
from zswapd.core import crashpoints, recompressing
from zswapd.core.core import Core, Inherited, lost_copies_in, store_codecs
from zswapd.core.reclaim.pressure import Pressure
from zswapd.core.reclaim.shrinker import Shrinker
from zswapd.errors import ControlError
from zswapd.fuse import lowlevel
from zswapd.fuse.failures import way_of
from zswapd.fuse.inodes import Directory
from zswapd.fuse.operations import Operations
from zswapd.fuse.session import MemoryMinder, Session
from zswapd.handover.state import UPGRADE_WANTED, HookWord, Phase, Word
from zswapd.host import installation
from zswapd.metrics.snapshot import Snapshot, WorkerStatistics
from zswapd.system.signals import SI_USER, SignalFile
from zswapd.volumes.commands import CacheCommands
from zswapd.volumes.mounted import configured, make_volumes
from zswapd.worker import reports
from zswapd.worker.commands import SET_BY, Commands
from zswapd.worker.disk import BackedPool
from zswapd.worker.emptying import identities, make_emptying
from zswapd.worker.files import add_files
from zswapd.worker.merging import Merging
from zswapd.worker.shrink import Shrinking
from zswapd.worker.stop import Stopping
from zswapd.worker.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config
    from zswapd.control.listener import Listener
    from zswapd.fuse.mount import Mount
    from zswapd.handover.state import SharedState
    from zswapd.system.signals import Received
    from zswapd.worker.prepare import Prepared

log = logging.getLogger(__name__)

LEFT = 75
"""Exit code of a worker that made room for a successor."""
BROKEN = 70
"""Exit code of one whose books are not to be relied on any more (`InvariantError.exit_code`)."""
TICK_S = 0.5
"""Time between two signs of life."""
FRESH_S = 0.02
"""Age of statistics that are told again, however often somebody asks: taking and noting them stops the event loop."""
_STOP, _LEAVE, RELOAD = signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG  # a worker that does not know the last ignores it
_ORDERS = frozenset({_STOP, _LEAVE, RELOAD})
"""Signals that count only from a supervisor."""
_STOPS = frozenset({_STOP, signal.SIGTERM, signal.SIGINT})
_SIGNALS = frozenset({*_ORDERS, *_STOPS})


class Worker:
    """One process that serves.

    Args:
        config: the settings to begin with.
        prepared: what this process has in hand.
        mount: the mount, made by the supervisor.
        listener: the control socket, likewise.
        state: what goes from worker to worker.
        arena: the arena's descriptor.
        backing: that of the disk behind the pool, -1 for none.

    Raises:
        ArenaError: the arena is none that this program and configuration can read.
    """

    _phase = Phase.STARTING

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        *,
        mount: Mount,
        listener: Listener,
        state: SharedState,
        arena: int,
        backing: int,
    ) -> None:
        self._supervisor, self.state = os.getppid(), state
        _refresh(state)
        self._begun = state.words[Word.BEGUN] / 1e9 or time.monotonic()  # an older supervisor does not say
        self._live()
        crashpoints.arm_from_environment(os.environ, state.words[Word.STARTED], is_takeover=True)
        left = state.load()
        self.configured = config
        self.config, self.changes = with_changes(config, left.get("settings", {}), source=SET_BY)
        self._carried = to_document(config)
        # The next supervisor's, which is yet to come.
        self.checked = left.get("checked") if state.words[Word.UPGRADE] == UPGRADE_WANTED else None
        self.protections = prepared.protections
        state.note_codecs(store_codecs(self.config))
        self.backed = BackedPool(self.config, state, backing, prepared.disk) if prepared.disk else None
        self.core = self._make_core(arena, left)
        self._recall(left)
        self.born = float(left.get("born", self._begun))
        self.pressure = Pressure()
        bases = (left.get(name, {}) for name in ("session", "control", "pressure", "shrinker"))
        self._session_base, self._control_base, self._pressure_base, self._shrinker_base = bases
        self._ceiling = int(left.get("ceiling", 1 << 62))
        directory = Directory(born_ns=int(left.get("born_ns", time.time_ns())))
        for device in self.core.devices.values():
            directory.add_block_file(device)
        self._directory = directory
        is_adopted = state.words[Word.STARTED] > 1 or state.hook_words[HookWord.INIT_SIZE] > 0
        self.session = self._make_session(mount, is_adopted=is_adopted)
        cache = self.core.cache.cleancache if self.core.cache else None
        self.volumes = make_volumes(self.config, cache, directory, prepared.lanes, left) if cache else None
        if cache and left.get("cache_frozen"):
            cache.freeze()
        self.session.operations.failures.when_broken = self._give_up
        self._commands = commands = Commands(self, listener)
        volume_commands = CacheCommands(self.volumes, cache, self.remember)
        self.server = Server(listener, {**commands.handlers(), **volume_commands.handlers()})
        self.takeover_s, self._remembered = 0.0, -1
        self._end: int | None = None
        self._exporter, self._watcher, self.attendant = prepared.exporter, prepared.watcher, prepared.attendant
        self.stopping = self._make_stopping()
        handles = left if is_adopted else None
        transfers = self.backed.transfers if self.backed else None
        self.emptying = make_emptying(self.session, directory, self.core.devices, self.attendant, transfers, handles)
        self.merging = self._make_merging(left.get("merging", {}))
        self.session.operations.writers.when_changed = self.remember
        self._is_cold = prepared.is_cold
        self.upkeep = self._make_upkeep(prepared)
        self.shrinking = self._make_shrinking()
        self._told: tuple[Snapshot, float] | None = None  # and when
        add_files(directory, self.statistics(ages_sampled=False), self.tell, lambda: self.config, commands.change)

    def _make_core(self, arena: int, left: Mapping[str, Any]) -> Core:
        """Return the core that is rebuilt from the arena, which may be empty."""
        marks = recompressing.marks_in(self.state.areas) or recompressing.marks_of(self.state.extension, self.configured)
        inherited = Inherited(
            arena,
            self.state.lost(),
            marks,
            left.get("core", {}),
            self._live,
            self._add_marks,
            lost_copies_in(self.state.areas),
            self.state.geometry.get("arena"),
        )
        return Core(self.config, inherited=inherited, backing=self.backed.backing if self.backed else None)

    def _make_stopping(self) -> Stopping:
        """Return what swaps off before the end."""
        return Stopping(
            self.core,
            self.session,
            self._directory,
            self.state,
            attendant=self.attendant,
            call_supervisor=self.call_supervisor,
        )

    def _make_session(self, mount: Mount, *, is_adopted: bool) -> Session:
        """Return the session that serves the block files of the directory."""
        directory, config = self._directory, self.config
        page_size = config.context.page_size
        return Session(
            self.backed.operations(directory, page_size)
            if self.backed
            else Operations(directory, page_size=page_size, takes_part=lowlevel.takes_part if lowlevel else lambda: False),
            mount,
            hook=config.fuse.hook,
            poll_us=config.fuse.poll_us,
            budget_us=config.fuse.budget_us,
            shared=self.state.hook,
            adopt=is_adopted,
            resend=not os.environ.get("ZSWAPD_NO_RESEND"),  # for tests, as ZSWAPD_CRASH is
        )

    def _make_merging(self, left: Mapping[str, Any]) -> Merging:
        """Return what keeps requests to the swap devices apart while a page cannot be read."""
        return Merging(
            list(self.core.devices.values()),
            [self.session.mountpoint / name for name in self.core.devices],
            identities=partial(identities, self.session, self._directory),
            attendant=self.attendant,
            is_prompt=self.backed.transfers.is_prompt if self.backed else lambda: True,
            remember=self.remember,
            left=left,
        )

    def _make_upkeep(self, prepared: Prepared) -> Upkeep:
        """Return the tasks that refill and tidy up."""
        return Upkeep(
            self.core,
            prepared.offload,
            yields=self.config.service.scheduling != "normal",
            has_small_heaps=prepared.has_small_heaps,
            needs_large_heaps=self._has_slow_files,
            limits=self.pressure.limits,
        )

    def _add_marks(self) -> Mapping[str, memoryview]:
        """Make marks of recompression, for later workers too, in a thread for what blocks."""
        size = sum(recompressing.marks_bytes(self.configured).values())
        return recompressing.marks_of(self.state.extend(size), self.configured)

    def _recall(self, left: Mapping[str, Any]) -> None:
        """Have the core go on with what a predecessor has left."""
        if self.core.writeback:
            self.core.writeback.recall(left.get("writeback", {}))
        self.core.ages.recall(left.get("store_ages", ()))
        if left.get("frozen"):
            self.core.frontswap.freeze()

    def _has_slow_files(self) -> bool:
        """Say whether requests may wait for a disk."""
        return bool(self.backed or (self.volumes and self.volumes.volumes()))

    def _make_shrinking(self) -> Shrinking | None:
        """Return what shrinks the cache, if there is one."""
        core = self.core
        if core.cache is None:
            return None
        frames, context = core.frames, self.config.context
        shrinker = Shrinker(
            core.cache.eviction,
            lambda: frames.ephemeral_frames,
            total_frames=context.memory_total // context.page_size,
            limit_frames=core.cache.eviction.limit_frames,
        )
        shrinker.recall(self._ceiling)
        return Shrinking(self.pressure, shrinker, partial(self.upkeep.trim, all_of_it=True))

    # Coming up and going down.

    async def run(self) -> int:
        """Serve until told to end; return the exit code.

        Raises:
            MountError: the session cannot be served, or not taken over.
        """
        self.core.self_test()
        if crashpoints.arm_from_environment(os.environ, self.state.words[Word.STARTED]):
            log.warning("a crash point is armed: this worker will fail on purpose")
        with self.session:
            system.freeze_garbage_collector()
            with contextlib.closing(SignalFile(_SIGNALS)) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat)
                    if self.volumes:  # before anybody asks for one
                        await nursery.start(self.volumes.run, configured(self.config))
                    nursery.start_soon(self.merging.run)  # unreadable pages may be known already
                    await nursery.start(self._serve, nursery.cancel_scope)
                    nursery.start_soon(self.upkeep.refill)
                    nursery.start_soon(self.upkeep.recompress)
                    if self.backed:
                        nursery.start_soon(self.backed.run, self.core)
                    nursery.start_soon(self.upkeep.keep_house, self._settle)
                    nursery.start_soon(self.emptying.run)
                    nursery.start_soon(self._tick)
                    if self.shrinking:
                        nursery.start_soon(self.shrinking.run)
                        nursery.start_soon(partial(self._watcher.run, self.pressure.arm, abandon=True))
                    nursery.start_soon(self._obey, signals, nursery)
                    await nursery.start(self.server.serve)
                    if self._exporter:
                        self._exporter.start(self.tell)
                    self._say_ready()
                    self._settle()
                    if self._is_cold:
                        nursery.start_soon(self._warm_up)
            self.remember()
        return self._end or 0

    async def _serve(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve requests; when somebody else has unmounted, there is nothing left to serve, and all ends."""
        await self.session.serve(task_status=task_status)
        if self._end is None:
            self._enter(Phase.STOPPING)
            self._end = 0
        scope.cancel()

    def _say_ready(self) -> None:
        number = self.state.words[Word.STARTED]
        names = ", ".join(str(self.session.mountpoint / name) for name in self.core.devices) or "the cache alone"
        if number > 1:
            self.takeover_s = time.monotonic() - self._begun
            pages = self.core.statistics(ages_sampled=False).zv.curr_pages
            log.info("worker %d serves %s, %d pages, after %.0f ms", number, names, pages, self.takeover_s * 1000)
        else:
            for item in self.protections:
                if not item.on:
                    log.warning("protection %s is off: %s%s", item.name, item.detail, f" ({item.hint})" if item.hint else "")
            log.info(
                "ready: serving %s%s",
                names,
                f"; {installation.of_daemon().call('swapon')} switches it on" if self.core.devices else "",
            )
        self._enter(Phase.SERVING)
        self.call_supervisor()

    def _settle(self) -> None:
        """Be a real-time thread, as this one was until now, only while that is needed."""
        scheduling = self.config.service.scheduling
        if scheduling == "nice" and self.session.hook_active:
            self.session.set_scarce(system.scarce_bytes())
        elif scheduling != "rr":
            system.stand_back()

    async def _warm_up(self) -> None:
        """Have programs and libraries in memory, though they may be in the swap that is served only now."""
        await self.attendant.run(system.read_code, abandon=True)
        system.populate_code()

    def has_supervisor(self) -> bool:
        """Say whether the process that forked this one lives: then it is still its parent."""
        return os.getppid() == self._supervisor

    def call_supervisor(self) -> None:
        """Have the supervisor look at the words of the shared state."""
        if self.has_supervisor():
            with contextlib.suppress(ProcessLookupError):  # it has just died
                os.kill(self._supervisor, signal.SIGUSR1)

    async def _obey(self, signals: SignalFile, nursery: trio.Nursery) -> None:
        while self._end is None:
            await trio.lowlevel.wait_readable(signals.descriptor)
            for received in signals.read():
                if self._end is None:
                    await self._act_on(received, nursery)
        nursery.cancel_scope.cancel()

    async def _act_on(self, received: Received, nursery: trio.Nursery) -> None:
        """Do what a signal asks for, if its sender may."""
        number = received.number
        if not self._counts(received):
            log.warning("%s from process %d is ignored", received.name, received.sender, extra={"rate_limit": 60})
        elif number == RELOAD:
            nursery.start_soon(self._commands.reload)
        elif number == _LEAVE:
            self._end = LEFT
            self.session.terminate()
        elif await self._stop(received.name):
            self._end = 0
            self.session.terminate()

    def _counts(self, received: Received) -> bool:
        """Say whether a signal is to be obeyed.

        An orphan's orders come from the next supervisor, which has the lock by then (orphan.py).
        """
        if received.number not in _ORDERS:
            return not self.has_supervisor()
        if received.code != SI_USER:
            return False
        if self.has_supervisor():
            return received.sender == self._supervisor
        with contextlib.suppress(ControlError):
            return received.sender == supervisor_of(self.config.control.socket)
        return False

    def _give_up(self, handler: str, error: Exception) -> None:
        """End at once, with the core in the middle of something, and leave all to a successor; return if there is none."""
        if not (self.session.hook_active and self.has_supervisor()):
            return
        self.state.words[Word.BROKEN] += 1
        log.critical("internal error in %s, a successor takes over: %s", handler, way_of(error))
        os._exit(BROKEN)

    async def _stop(self, cause: str) -> bool:
        """Take back what is swapped out; return whether the daemon may end."""
        if not await self.stopping.attempt("told to" if self.has_supervisor() else cause):
            return False
        self._enter(Phase.STOPPING)
        return True

    # What a successor has to know.

    def tell(self, *, ages_sampled: bool = False) -> Snapshot:
        """Return statistics that somebody outside will see, at most FRESH_S old: no successor's counters will be less.

        Args:
            ages_sampled: see `Core.statistics`; what is told is of now then.
        """
        now = time.monotonic()
        told = self._told
        if told is None or ages_sampled or now - told[1] >= FRESH_S:
            self._told = told = self.statistics(ages_sampled=ages_sampled), now
            self.remember(told[0])
        return told[0]

    def remember(self, now: Snapshot | None = None) -> None:
        """Put into the shared state what is not in the arena.

        Args:
            now: the statistics, if they have just been taken.
        """
        now = now or self.statistics(ages_sampled=False)
        self.state.save(
            {
                "configured": self._carried,
                "checked": self.checked,
                "settings": self.changes,
                "frozen": self.core.frontswap.frozen,
                "writeback": self.core.writeback.remember() if self.core.writeback else {},
                "writers": self.session.operations.writers.remember(),
                "swapped_on": self.emptying.remember(),
                "store_ages": self.core.ages.remember(),
                "born": self.born,
                "born_ns": self._directory.born_ns,
                "core": counters.cumulative(now.core),
                "session": counters.cumulative(now.fuse),
                "control": counters.cumulative(now.control),
                "pressure": counters.cumulative(now.pressure),
                "merging": self.merging.remembered(),
                "cache_frozen": bool(self.core.cache and self.core.cache.cleancache.frozen),
                "volumes": self.volumes.remember() if self.volumes else {},
                "volume_counters": {volume.name: counters.cumulative(volume) for volume in now.volumes},
                "shrinker": counters.cumulative(now.shrinker) if now.shrinker else {},
                **({"ceiling": now.shrinker.ceiling_frames} if now.shrinker else {}),
            }
        )

    def statistics(self, *, ages_sampled: bool) -> Snapshot:
        """Return the statistics of all parts, those of earlier workers included.

        Args:
            ages_sampled: see `Core.statistics`.
        """
        words = self.state.words
        return Snapshot(
            core=self.core.statistics(ages_sampled=ages_sampled),
            fuse=counters.added(self.session.statistics(), self._session_base),
            control=counters.added(self.server.statistics(), self._control_base),
            pressure=counters.added(self.pressure.statistics(), self._pressure_base),
            volumes=self.volumes.statistics() if self.volumes else (),
            shrinker=counters.added(self.shrinking.shrinker.statistics(), self._shrinker_base) if self.shrinking else None,
            worker=WorkerStatistics(
                version=reports.version(),
                number=words[Word.STARTED],
                deaths=words[Word.DEATHS],
                broken=words[Word.BROKEN],
                takeover_seconds=self.takeover_s,
                supervised=self.has_supervisor(),
                poisoned_requests=self.state.hook_words[HookWord.POISONED],
                uptime_seconds=time.monotonic() - self.born,
                protections={item.name: item.on for item in self.protections},
            ),
        )

    def _enter(self, phase: Phase) -> None:
        """Say what this process is at."""
        self._phase = phase
        self.state.words[Word.PHASE] = phase

    def _live(self) -> None:
        """Give a sign of life."""
        self.state.words[Word.TICKS] += 1

    async def _beat(self) -> None:
        while True:  # by the clock: it is one
            self._live()
            self.state.words[Word.PHASE] = self._phase  # should a bit of it have changed
            await trio.sleep(TICK_S)

    async def _tick(self) -> None:
        while True:
            for ages in self.core.all_ages:
                ages.look()
            if self.backed:
                self.backed.look()
            requests = self.state.hook_words[HookWord.REQUESTS]
            if requests != self._remembered:
                self._remembered = requests
                self.remember()
            else:
                # The hook does not see when a coroutine has answered; nobody is to be blamed for a request of long ago.
                self.state.hook_words[HookWord.ACTIVE] = 0
            await trio.sleep(TICK_S)


def _refresh(state: SharedState) -> None:
    """Put other memory in place of poisoned pages of the shared state, before it is used."""
    if renewed := state.refresh():
        log.error("%d pages of the shared state had an uncorrectable error: other memory is in their place", renewed)


def run_worker(
    config: Config,
    prepared: Prepared,
    mount: Mount,
    listener: Listener,
    state: SharedState,
    arena: int,
    backing: int,
) -> int:
    """Serve in this process, which was forked for it; return the exit code.

    Args:
        config: the settings to begin with.
        prepared: what `preparing.prepare` has returned.
        mount: see `Worker`, as for the others.
        listener: the control socket.
        state: what goes from worker to worker.
        arena: the arena's descriptor.
        backing: that of the disk behind the pool.

    Raises:
        ZswapdError: it cannot come up.
    """
    system.ignore_signals()
    faulthandler.enable()
    worker = Worker(config, prepared, mount=mount, listener=listener, state=state, arena=arena, backing=backing)
    code = trio.run(worker.run, instruments=[MemoryMinder()])
    if code == 0 and not worker.has_supervisor():  # nobody else is there to clear up
        mount.unmount()
        listener.close()
    return code
