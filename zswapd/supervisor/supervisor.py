# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor: makes or takes over the resources, forks a worker.

And the next one when that ends, in whatever way.

    supervisor   one thread, no event loop, memory locked; has every module imported, since importing under memory pressure
    needs memory
      ├ worker   worker/worker.py: serves pages; forked, so that it starts with all of that in place
      └ spare    the next worker, with its memory in hand (spare.py)

It sleeps until a signal comes: all of them are blocked (system/signals.py), and a signal is how a
worker says "look at the words of the shared state". A signal that is not named here changes
nothing.

    SIGCHLD           a worker has ended
    SIGUSR1           a worker has changed its phase, or wants an upgrade
    SIGHUP            to the worker as SIGURG: read the settings again, which is to upgrade; nothing if
                      it tells that the terminal is gone
    SIGTERM, SIGINT   to the worker as SIGUSR1: swap off, then end. It says by its exit that it did, by a word that it goes on;
                      then so do we, and the next worker is not told, unless a service manager waits
                      for the end

Ends of a worker:
- exit 0 in phase STOPPING: nothing is swapped on any more; unmount, give all back, end as well;
- exit LEFT: it made room on request; the next one follows at once;
- before the first worker has ever served: a mistake in the configuration or the system; undo
  everything, pass its exit code on;
- anything else is a death: the next one follows, and takes over. At the third death at the same
  request, that request is answered with EIO unseen. Workers that die before they serve are followed
  more slowly; for ever once one of them has served, since giving up would lose the data.

A worker that has given no sign of life for `service.hang_timeout` (watchdog.py) gets SIGABRT (its
stack goes to the log) and then SIGKILL, while it takes over as while it serves.

Sources: the prefork servers' master process; FUSE_NOTIFY_RESEND (Linux 6.9).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, NoReturn, ParamSpec

from zswapd import log as log_setup
from zswapd import system
from zswapd.core.reclaim.pressure import Pressure
from zswapd.errors import PermissionsError, ZswapdError
from zswapd.handover.resources import NAMES, STORED
from zswapd.handover.state import UPGRADE_WANTED, HookWord, Phase, Word
from zswapd.supervisor import orphan, unresponsive
from zswapd.supervisor.acquire import find_resources
from zswapd.supervisor.arena_lock import ArenaLock
from zswapd.supervisor.ballast import Ballast
from zswapd.supervisor.fork import fork, settle_objects
from zswapd.supervisor.inheritance import become_installed, find_inherited, stored_name
from zswapd.supervisor.reaper import Reaper, born_ticks, end_by, exit_status_if_dead
from zswapd.supervisor.settings import choose
from zswapd.supervisor.spare import Spare
from zswapd.supervisor.stop import StopRequest
from zswapd.supervisor.watchdog import Watchdog
from zswapd.system.signals import CATCHABLE, SignalFile, is_hangup
from zswapd.worker import prepare as prepare_module
from zswapd.worker.main import run_worker
from zswapd.worker.worker import BROKEN, LEFT, RELOAD

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.config import Config
    from zswapd.handover.resources import Resources
    from zswapd.system.signals import Received

    Guard = Callable[[Callable[[], int]], int]

P = ParamSpec("P")

log = logging.getLogger(__name__)

SILENT_S = 1.5
"""A worker without a sign of life for so long, of which it gives two a second, may have stopped."""
LOOK_S = 0.5
"""Longest time between two looks at the worker."""
STARTING_LOOK_S = 0.02
"""The same while only the spare is missing to be ready."""
ABORT_S = 1.0
"""What a hanging worker gets to write its stack before it is killed."""
POISON_DEATHS = 3
"""Deaths at one request after which it is answered with EIO."""
UPGRADE_S = 300.0
"""What the installed program may take until it serves.

As far as the service manager's watchdog goes.
"""
SPARE_S = 1.0
"""Time that a worker serves before the next spare is made."""
PATIENCE_S = 2.0
"""Time from the first worker's start in which we are ready only with a spare."""
SPARE_AGAIN_S = 10.0
"""Time before another is made for one that died."""
AGAIN_S = 2.0
"""Time until a service manager may try again what has failed with nothing to serve.

It does so at once.
"""
SLOW_S = (0.0, 0.0, 0.1, 0.5, 1.0)
"""Pauses before the next worker, by the number of workers in a row that died before they served."""

_STOPS = (signal.SIGTERM, signal.SIGINT)
_QUIET = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGCONT, signal.SIGWINCH)
"""Signals of which the log says nothing: two that wake the supervisor, and two of any terminal."""


class Supervisor:
    """One supervisor and its resources.

    Args:
        config: the settings.
        resources: what workers serve.
        guarded: runs a worker, and turns what a person should read into text on stderr and an exit
            code.
        worker: process id of a worker that serves it already, 0 if there is none.
        is_cold: programs and libraries are not known to be in memory (system/code.py).

    Attributes:
        has_served: a page may have been stored, by this supervisor's workers or earlier ones.
    """

    def __init__(
        self,
        config: Config,
        resources: Resources,
        *,
        guarded: Guard,
        worker: int = 0,
        is_cold: bool = False,
    ) -> None:
        self._config = config
        self._guarded = guarded
        self._resources = resources
        self._words = resources.state.words
        self._hook = resources.state.hook_words
        self._worker = worker
        self._is_cold = is_cold
        self.has_served = not resources.is_new
        self._early_deaths = 0
        self._suspect, self._suspect_deaths = 0, 0
        self._reaper = Reaper()
        self._arena_lock = ArenaLock(resources.arena, resources.state.geometry.get("arena"))
        self._ballast = Ballast(Pressure())
        self._spare: Spare | None = None
        self._spare_due = 0.0
        self._notifier = system.Notifier()
        self._stop_request = StopRequest(self._words, is_awaited=self._notifier.is_heard)
        self._watchdog = Watchdog(config.service.hang_timeout, sum(config.swap_files().values()))
        self._ticked = self._forked = time.monotonic()
        self._aborted: float | None = None
        self._is_ready = False

    def run(self) -> int:
        """Supervise until a worker ends for good; return the exit code."""
        with contextlib.closing(SignalFile(CATCHABLE)) as signals:
            if self._worker:
                log.info("worker %d makes room for the new program", self._worker)
                orphan.retire(self._worker)
            self._store_descriptors()
            self._number_files()
            self._next_worker()
            while True:
                self._tick()
                for received in signals.wait(self._patience()):
                    self._handle_signal(received)
                # After any signal: one SIGCHLD may stand for several deaths.
                with contextlib.suppress(ChildProcessError):
                    status = self._end_of_worker()
                    if status is not None and (code := self._worker_ended(status)) is not None:
                        self._drop_spare(wait=True)
                        return code

    def abandon(self) -> bool:
        """After an error: end what was begun, unless it may have been used.

        Return whether it was ended.

        What may have been used is served on by the worker, from which the next start takes over.
        """
        if self.has_served or self._words[Word.PHASE] != Phase.STARTING:
            return False
        self._drop_spare(wait=True)
        if self._worker:
            self._send(signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._worker, 0)
        return True

    def _handle_signal(self, received: Received) -> None:
        if received.number in _STOPS:
            self._stop(received.name)
        elif received.number == signal.SIGHUP and not is_hangup(received):
            self._send(RELOAD)
        elif received.number not in _QUIET:
            log.info(
                "%s is ignored: SIGTERM and SIGINT end the daemon",
                received.name,
                extra={"rate_limit": 1},
            )

    def _end_of_worker(self) -> int | None:
        """Return the wait status of the worker, None while it lives."""
        self._reaper.reap()
        pid, status = os.waitpid(self._worker, os.WNOHANG)
        if pid:
            return status
        left = exit_status_if_dead(self._worker)
        if left is not None:
            log.warning("worker %d is dead but for threads that wait for a disk", self._worker)
            self._reaper.add(self._worker)
        return left

    def _patience(self) -> float:
        if self._spare is not None and not self._is_ready:
            return STARTING_LOOK_S
        interval = self._notifier.watchdog_interval
        return min(LOOK_S, interval) if interval else LOOK_S

    def _store_descriptors(self) -> None:
        descriptors = self._resources.descriptors()
        for name in STORED:
            if name in descriptors:
                self._notifier.store(stored_name(name), descriptors[name])

    def _number_files(self) -> None:
        """Say which our files are, for one that has to copy them out of a worker that does not answer (unresponsive.py)."""
        descriptors = self._resources.descriptors()
        self._words[Word.FILES_CHECK] = 0
        for place, name in enumerate(NAMES):
            self._words[Word.FILE_FUSE + place] = descriptors.get(name, -1) + 1
        self._resources.state.seal_words(Word.FILES_CHECK)

    # The worker.

    def _next_worker(self) -> None:
        self._words[Word.PHASE] = Phase.STARTING
        self._words[Word.STARTED] += 1
        self._hook[HookWord.ACTIVE] = 0
        self._words[Word.BEGUN] = time.monotonic_ns()
        is_forked = self._spare is None or not self._spare.promote()
        if self._spare is not None and not is_forked:
            self._worker, self._spare = self._spare.pid, None
        else:
            self._drop_spare(wait=False)
            self._worker = self._fork()
        self._spare_due = 0.0
        self._stop_request.forget_worker()
        self._aborted = None
        self._forked = self._ticked = time.monotonic()
        self._watchdog.begin(
            self._forked,
            self._signs(),
            is_forked=is_forked,
            is_building=not self.has_served,
            early_deaths=self._early_deaths,
        )

    def _fork(self) -> int:
        pid = fork(self._fork_failed, has_time=not self.has_served)
        if not pid:
            system.become_servant()
            is_first = self._words[Word.STARTED] == 1
            self._become_worker(
                lambda: prepare_module.prepare(
                    self._config, is_first=is_first, is_cold=self._is_cold
                )
            )
        return pid

    def _fork_failed(self) -> None:
        """While no worker can be forked.

        Nothing else needs the ballast, and whoever watches over us is not to give up.
        """
        self._ballast.close()
        self._notifier.watchdog()

    def _become_worker(self, prepare: Callable[[], prepare_module.Prepared]) -> NoReturn:
        """Serve, in the child; never return into the parent's code."""
        code = 1
        self._ballast.close()  # a copy of it is nobody's
        system.set_process_name(unresponsive.WORKER_NAME)
        self._words[Word.WORKER_CHECK] = 0
        self._words[Word.WORKER], self._words[Word.WORKER_BORN] = (
            os.getpid(),
            born_ticks(os.getpid()),
        )
        self._resources.state.seal_words(Word.WORKER_CHECK)
        try:
            config, resources = self._config, self._resources
            code = self._guarded(lambda: run_worker(config, prepare(), resources))
        except BaseException:
            log.exception("worker %d ends", os.getpid())
        finally:
            os._exit(code)

    def _keep_spare(self, now: float) -> None:
        """Have a spare worker, once the present one has served for a while; called while it serves."""
        if self._spare is None:
            self._spare_due = self._spare_due or now + (SPARE_S if self._is_ready else 0.0)
            if (
                not self._config.service.spare
                or self._stop_request.is_under_way()
                or now < self._spare_due
            ):
                return
            settle_objects()
            with contextlib.suppress(OSError), system.ordinary_children():
                self._spare = Spare(
                    self._prepare_spare, lambda prepared: self._become_worker(lambda: prepared)
                )
        elif self._spare.has_ended():
            log.warning("the spare worker %d has died; there will be another", self._spare.pid)
            self._spare = None
            self._spare_due = now + SPARE_AGAIN_S

    def _prepare_spare(self) -> prepare_module.Prepared:
        system.become_servant()
        self._ballast.close()
        system.set_idle_priority()
        system.set_process_name(unresponsive.SPARE_NAME)
        return prepare_module.prepare(self._config, is_first=False)

    def _drop_spare(self, *, wait: bool) -> None:
        if self._spare is not None:
            if not self._spare.end(wait=wait):
                self._reaper.add(self._spare.pid)
            self._spare = None

    def _worker_ended(self, status: int) -> int | None:
        """Draw the conclusions from a worker's end.

        Return an exit code if it was the end for us as well.
        """
        _attempt(
            self._arena_lock.lock
        )  # first of all: what the dead one had locked is not locked any more
        code = os.waitstatus_to_exitcode(status)
        phase = self._words[Word.PHASE]
        if code == 0 and phase == Phase.STOPPING:
            self._notifier.stopping("unmounting")
            self._forget_descriptors()
            return 0
        # Whoever was served may have stored something, ready or not.
        self.has_served = self.has_served or phase == Phase.SERVING
        if not self.has_served and code > 0:
            self._forget_descriptors()
            return code
        if code != LEFT:
            self._log_death(code)
        self._early_deaths = self._early_deaths + 1 if phase == Phase.STARTING else 0
        if not self.has_served and (
            self._stop_request.is_wanted or self._early_deaths >= len(SLOW_S)
        ):
            log.error("no worker has come to serve: giving up; nothing was stored")
            self._forget_descriptors()
            return 1
        time.sleep(SLOW_S[min(self._early_deaths, len(SLOW_S) - 1)])
        self._next_worker()
        return None

    def _log_death(self, code: int) -> None:
        self._words[Word.DEATHS] += 1
        cause = "an internal error" if code == BROKEN else end_by(code)
        active = self._hook[HookWord.ACTIVE]
        at = f", while it answered request {active} ({self._describe_request()})" if active else ""
        log.error("worker %d died: %s%s; the next one takes over", self._worker, cause, at)
        self._suspect_deaths = self._suspect_deaths + 1 if active and active == self._suspect else 1
        self._suspect = active
        if active and self._suspect_deaths >= POISON_DEATHS:
            log.error(
                "request %d (%s) has killed %d workers: it will be answered with EIO",
                active,
                self._describe_request(),
                self._suspect_deaths,
            )
            self._hook[HookWord.POISON] = active

    def _describe_request(self) -> str:
        kinds = {15: "READ", 16: "WRITE", 43: "FALLOCATE"}
        opcode = self._hook[HookWord.OPCODE]
        if opcode not in kinds:
            return f"FUSE operation {opcode}"
        return f"{kinds[opcode]} at offset {self._hook[HookWord.OFFSET]:#x}"

    # Looking after it.

    def _tick(self) -> None:
        now = time.monotonic()
        self._watchdog.ignore(max(now - self._ticked - 2 * LOOK_S, 0.0))
        self._ticked = now
        self._notifier.watchdog()
        _attempt(self._arena_lock.lock)
        phase = self._words[Word.PHASE]
        if phase == Phase.SERVING:
            _attempt(self._look_after, now)
        _attempt(self._end_if_it_hangs, now, phase)

    def _look_after(self, now: float) -> None:
        """Do what is to be done while a worker serves."""
        if (
            self._watchdog.silence(now, self._signs()) < SILENT_S
        ):  # whom nobody serves, no memory helps
            self._ballast.look(self._hook[HookWord.REQUESTS])
        self._keep_spare(now)
        self._say_ready(now)
        self._is_cold = self._is_cold and not system.populate_code()
        if self._stop_request.is_due(now):
            self._send(signal.SIGUSR1)
        if self._words[Word.UPGRADE] == UPGRADE_WANTED:
            self._words[Word.UPGRADE] = 0
            self._upgrade()

    def _say_ready(self, now: float) -> None:
        """Say it once, and before the first page comes have what its death would take.

        Making a spare takes processor time.
        """
        if not self._is_ready and (
            self._spare is None or self._spare.is_ready or now - self._forked > PATIENCE_S
        ):
            self._is_ready = self.has_served = True
            if self._notifier.watchdog_interval:
                self._notifier.set_watchdog(2 * self._notifier.watchdog_interval)
            self._notifier.ready(f"serving {self._config.fuse.mountpoint}")

    def _signs(self) -> tuple[int, ...]:
        return self._words[Word.TICKS], self._hook[HookWord.REQUESTS]

    def _end_if_it_hangs(self, now: float, phase: int) -> None:
        if not self._watchdog.has_expired(now, self._signs(), serves=phase != Phase.STARTING):
            return
        if self._aborted is None:
            silence = self._watchdog.silence(now, self._signs())
            log.error("worker %d has stood still for %.0f s: ending it", self._worker, silence)
            self._send(signal.SIGABRT)
            self._aborted = now
        elif now - self._aborted >= ABORT_S:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._worker, number)

    def _stop(self, cause: str) -> None:
        log.info("%s: telling the worker to swap off and end", cause)
        self._stop_request.want()

    def _forget_descriptors(self) -> None:
        for name in STORED:
            self._notifier.unstore(stored_name(name))

    def _upgrade(self) -> None:
        """Become the installed program, which takes the resources and the running worker over.

        Returns only if that fails.
        """
        self._drop_spare(wait=True)
        if self._notifier.watchdog_interval:
            # Its own time comes back with its first words: loading a program from disk takes long
            # where memory is short.
            self._notifier.set_watchdog(UPGRADE_S)
        log.info("the installed program takes over")
        become_installed(self._resources, self._worker)
        if self._notifier.watchdog_interval:  # it has not come to that
            self._notifier.set_watchdog(2 * self._notifier.watchdog_interval)


def _attempt(step: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Do something that workers are better off with.

    Without it, one is served all the same as long as we are here.
    """
    try:
        step(*args, **kwargs)
    except Exception:
        log.exception("the supervisor goes on after an error", extra={"rate_limit": 60})


def _lift_limits(*, is_needed: bool) -> None:
    """Lift the limits that would end the daemon in time, and do not begin under one that stays.

    Args:
        is_needed: pages wait to be served, under any limit.
    """
    seconds = system.lift_limits()
    if seconds is not None and not is_needed:
        raise PermissionsError(
            f"the kernel would end zswapd after {seconds} s of processor time (RLIMIT_CPU)",
            hint="start it without the limit: ulimit -t unlimited",
        )


def run(configure: Callable[[], Config], guarded: Guard) -> int:
    """Supervise workers until nothing is swapped on any more and SIGTERM has come.

    Return the exit code.

    Args:
        configure: reads the settings, and raises ConfigError.
        guarded: see `Supervisor`.

    Raises:
        ZswapdError: it cannot come up. As after any other exception before a worker has served,
            nothing is left behind, and a worker that served goes on.
    """
    system.block_signals()
    left = find_inherited()
    _lift_limits(is_needed=left is not None)
    config = choose(configure, left)
    log_setup.set_level(config.log.level)
    prepare_module.load(config)
    system.protect(
        populates_code=False,  # it may be in the swap that nobody serves
        lock_memory=config.service.lock_memory,
        io_flusher=config.service.io_flusher,
        oom_score_adj=config.service.oom_score_adj,
        scheduling=config.service.scheduling,
        libc_heap=0,
        python_heap=0,
    )
    system.set_realtime()
    try:
        resources, worker = find_resources(config, left)
    except ZswapdError:
        if left is None and system.Notifier().is_heard:
            signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, AGAIN_S)
        raise
    with contextlib.ExitStack() as undo:
        if resources.is_new:
            undo.callback(resources.close)
        is_cold = config.service.lock_memory and not system.populate_code(waits=resources.is_new)
        supervisor = Supervisor(config, resources, guarded=guarded, worker=worker, is_cold=is_cold)
        try:
            code = supervisor.run()
        except BaseException:
            if not supervisor.abandon():
                undo.pop_all()
            raise
        undo.pop_all()
    resources.close()
    return code
