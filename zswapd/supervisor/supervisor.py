# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor: it makes or takes over the resources, and forks one worker after another.

    supervisor   one thread, no event loop, memory locked, every module imported
      ├ worker   worker/worker.py: serves pages
      └ spare    spare.py: the next worker, with its memory already taken

The supervisor imports every module, because an import under memory pressure would need memory.
A forked worker starts with these modules.

The supervisor sleeps until a signal comes. All signals are blocked and read from a descriptor
(system/signals.py). By a signal, a worker asks the supervisor to read the words of the shared
state. A signal that is not named here changes nothing.

    SIGCHLD           A worker has ended.
    SIGUSR1           A worker has changed its phase, or wants an upgrade.
    SIGHUP            The worker gets SIGURG: it reads the settings again, by an upgrade. The signal
                      is ignored if the kernel sends it because the terminal is gone.
    SIGTERM, SIGINT   The worker gets SIGUSR1: it swaps off, then exits. If it refuses, a word of
                      the shared state says so, and the supervisor goes on. The stop is then over,
                      unless a service manager waits for the end (stop.py).

A worker can end in four ways:

- It exits with 0 in phase STOPPING. Nothing is swapped on. The supervisor unmounts, frees all
  resources and exits.
- It exits with LEFT. It made room on request, and the next worker follows at once.
- It exits with an error before any worker has served. The configuration or the system is wrong. The
  supervisor undoes everything and returns the worker's exit code.
- Every other end is a death. The next worker takes over.

At the third death at the same request, the request is answered with EIO without being executed.
After deaths before serving, the supervisor waits longer each time (SLOW_S). It never gives up once
a worker has served, because that would lose the data.

A worker that gives no sign of life for `service.hang_timeout` (watchdog.py) gets SIGABRT, and its
stack goes to the log. Then it gets SIGKILL. This holds during a takeover too.

Sources: the master process of prefork servers; FUSE_NOTIFY_RESEND (Linux 6.9).
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
from zswapd.supervisor import orphan
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
from zswapd.system.scheduling import SPARE_NAME, WORKER_NAME
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
"""Silence, s, after which a worker may have stopped. It gives two signs of life a second."""
LOOK_S = 0.5
"""Longest time between two looks at the worker, s."""
STARTING_LOOK_S = 0.02
"""Longest time between two looks, s, while the daemon waits only for the spare to be ready."""
ABORT_S = 1.0
"""Time, s, in which a hanging worker can write its stack before it is killed."""
POISON_DEATHS = 3
"""Number of deaths at one request after which the request is answered with EIO."""
UPGRADE_S = 300.0
"""Timeout of the service manager's watchdog, s, until the installed program serves."""
SPARE_S = 1.0
"""Time, s, that a worker serves before the next spare is forked."""
PATIENCE_S = 2.0
"""Time, s, after the first worker's start in which the daemon waits for the spare to be ready."""
SPARE_AGAIN_S = 10.0
"""Time, s, before a spare is forked in place of one that died."""
AGAIN_S = 2.0
"""Pause, s, before a start fails that has no pages to serve.

A service manager starts the daemon again at once.
"""
SLOW_S = (0.0, 0.0, 0.1, 0.5, 1.0)
"""Pauses before the next worker, s, by the number of workers in a row that died before serving."""

_STOPS = (signal.SIGTERM, signal.SIGINT)
_QUIET = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGCONT, signal.SIGWINCH)
"""Signals that are not logged: two that wake the supervisor, and two that any terminal sends."""


class Supervisor:
    """One supervisor and its resources.

    Args:
        config: the settings.
        resources: the resources that workers serve.
        guarded: runs a worker, writes errors for the user to stderr, and returns an exit code.
        worker: process id of a worker that already serves the resources; 0 if there is none.
        is_cold: programs and libraries may be out of memory (system/code.py).

    Attributes:
        has_served: a worker of this or an earlier supervisor may have stored a page.
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
        """Supervise workers until one of them stops the daemon; return the exit code."""
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
                # After any signal, because one SIGCHLD may stand for several deaths.
                with contextlib.suppress(ChildProcessError):
                    status = self._end_of_worker()
                    if status is not None and (code := self._worker_ended(status)) is not None:
                        self._drop_spare(wait=True)
                        return code

    def abandon(self) -> bool:
        """End the worker after an error, unless it may have stored a page.

        A worker that may have stored a page goes on serving. The next start takes over from it.

        Returns:
            Whether the worker was ended.
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
        """Return the wait status of the worker; None while it lives."""
        self._reaper.reap()
        pid, status = os.waitpid(self._worker, os.WNOHANG)
        if pid:
            return status
        left = exit_status_if_dead(self._worker)
        if left is not None:
            log.warning("worker %d is dead, except for threads that wait for a disk", self._worker)
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
        """Write the numbers of the open files into the shared state.

        A new supervisor copies the files out of a worker that does not answer (unresponsive.py).
        """
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
        """Free the ballast for the fork, and tell the service manager's watchdog to wait."""
        self._ballast.close()
        self._notifier.watchdog()

    def _become_worker(self, prepare: Callable[[], prepare_module.Prepared]) -> NoReturn:
        """Serve in the child; never return into the parent's code."""
        code = 1
        self._ballast.close()  # the child has no use for its copy
        system.set_process_name(WORKER_NAME)
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
        """Fork a spare once the present worker has served for SPARE_S; called while it serves."""
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
                    self._prepare_spare, lambda prepared: self._become_worker(prepared.owned)
                )
        elif self._spare.has_ended():
            log.warning("the spare worker %d has died; another one follows", self._spare.pid)
            self._spare = None
            self._spare_due = now + SPARE_AGAIN_S

    def _prepare_spare(self) -> prepare_module.Prepared:
        system.become_servant()
        self._ballast.close()
        system.set_idle_priority()
        system.set_process_name(SPARE_NAME)
        # A thread of a dead worker that waits for a file keeps the worker's memory from the spare.
        owns_memory = self._config.may_wait_for_files
        prepared = prepare_module.prepare(self._config, is_first=False, owns_memory=owns_memory)
        self._words[Word.SPARE_SHARED] = system.shared_bytes()
        return prepared

    def _drop_spare(self, *, wait: bool) -> None:
        if self._spare is not None:
            if not self._spare.end(wait=wait):
                self._reaper.add(self._spare.pid)
            self._spare = None

    def _worker_ended(self, status: int) -> int | None:
        """Act on a worker's end; return an exit code if the supervisor ends too."""
        _attempt(self._arena_lock.lock)  # first: the locks of the dead worker are gone
        code = os.waitstatus_to_exitcode(status)
        phase = self._words[Word.PHASE]
        if code == 0 and phase == Phase.STOPPING:
            self._notifier.stopping("unmounting")
            self._forget_descriptors()
            return 0
        # A worker that served may have stored a page, even before the daemon was ready.
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

    # Periodic work.

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
        """Do the periodic work while a worker serves."""
        # A silent worker serves nothing, and more free memory would not change that.
        if self._watchdog.silence(now, self._signs()) < SILENT_S:
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
        """Tell the service manager once that the daemon is ready.

        The spare comes first: then a death at the first page already has its successor. To prepare
        a spare takes processor time, which the swapping program does not miss before it runs.
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
            log.error("worker %d gave no sign of life for %.0f s: ending it", self._worker, silence)
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
        """Become the installed program, which takes over the resources and the running worker.

        Return only if that fails.
        """
        self._drop_spare(wait=True)
        if self._notifier.watchdog_interval:
            # Loading a program from disk takes long where memory is short. The new program sets
            # the timeout back when it is ready.
            self._notifier.set_watchdog(UPGRADE_S)
        log.info("the installed program takes over")
        become_installed(self._resources, self._worker)
        if self._notifier.watchdog_interval:  # the installed program did not start
            self._notifier.set_watchdog(2 * self._notifier.watchdog_interval)


def _attempt(step: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Run a step that workers can do without; log its exception instead of raising it.

    An exception that ended the supervisor would cost more than the missing step.
    """
    try:
        step(*args, **kwargs)
    except Exception:
        log.exception("the supervisor goes on after an error", extra={"rate_limit": 60})


def _lift_limits(*, is_needed: bool) -> None:
    """Lift the limits by which the kernel would end the daemon.

    Args:
        is_needed: pages wait to be served, so a limit that stays is accepted.

    Raises:
        PermissionsError: a limit stays, and no page waits.
    """
    seconds = system.lift_limits()
    if seconds is not None and not is_needed:
        raise PermissionsError(
            f"the kernel would end zswapd after {seconds} s of processor time (RLIMIT_CPU)",
            hint="start it without the limit: ulimit -t unlimited",
        )


def run(configure: Callable[[], Config], guarded: Guard) -> int:
    """Supervise workers until SIGTERM has come and nothing is swapped on; return the exit code.

    After an exception before a worker has served, no file, mount or process is left behind. A
    worker that has served goes on serving.

    Args:
        configure: reads the settings, and raises ConfigError.
        guarded: see `Supervisor`.

    Raises:
        ZswapdError: the daemon cannot start.
    """
    system.block_signals()
    left = find_inherited()
    _lift_limits(is_needed=left is not None)
    config = choose(configure, left)
    log_setup.set_level(config.log.level)
    for line in config.without_effect():
        log.warning(line)
    prepare_module.load(config)
    system.protect(
        populates_code=False,  # the code may be in swap that no worker serves yet
        lock_memory=config.service.lock_memory,
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
