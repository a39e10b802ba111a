# SPDX-License-Identifier: GPL-2.0-or-later
"""A stage for tests with real swap: daemons, cgroups and workloads, removed in the right order.

Only the workload is in a memory cgroup, never the daemon, and every step has a time limit. At the
end of a test, failed or not, the order prevents hangs. The stage kills the workload, which frees
its swapped-out pages, and removes the cgroup. Then it runs swapoff and detaches the loop device.
The daemon ends last, because all the others wait for it. The stage prints each daemon's log:
pytest shows it with a failure, and a traceback in it fails the test.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import MIB
from tools.bench.harness.workload import Workload, WorkloadOptions

WORKLOAD_LIMIT_S = 100


def wait_for(condition: Callable[[], object], what: str, limit: float = 20.0) -> None:
    """Wait until `condition` holds; fail with `what` after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def next_worker(daemon: Daemon, old: int) -> dict[str, Any]:
    """Wait until another worker than `old` answers; return its report."""
    wait_for(lambda: daemon.worker_pid() != old, "no new worker")
    worker: dict[str, Any] = daemon.ask("status")["worker"]
    assert worker["pid"] != old
    return worker


class Stage:
    """The running daemons, cgroups and workloads of one test.

    Args:
        directory: the directory for mountpoints, sockets and logs.
        undo: the stack of clean-ups, run in reverse order.
    """

    def __init__(self, directory: Path, undo: contextlib.ExitStack) -> None:
        self._directory = directory
        self._undo = undo
        self._cgroups = 0

    def daemon(self, size: str = "1G", arguments: Sequence[str] = (), **settings: str) -> Daemon:
        """Start a daemon whose swap goes before any other of the machine.

        Args:
            size: the size of its swap file.
            arguments: further arguments for `zswapd run`.
            settings: settings as section__key=value.
        """
        named = {name.replace("__", "."): value for name, value in settings.items()}
        named.setdefault("swap.priority", str(system.HIGHEST_PRIORITY))
        daemon = Daemon(size=size, settings=named, arguments=arguments, parent=self._directory)
        self._undo.callback(
            lambda: print(log.read_text(errors="replace")) if log.exists() else None
        )
        log = self._directory / f"{daemon.directory.name}.log"

        def stop() -> None:
            with contextlib.suppress(OSError):
                log.write_text(daemon.log_text())
            daemon.stop()

        self._undo.callback(stop)
        daemon.start()
        return daemon

    def cgroup(self, mib: int) -> MemoryCgroup:
        """Make a memory cgroup of `mib` MiB."""
        self._cgroups += 1
        return self._undo.enter_context(MemoryCgroup(f"test{self._cgroups}", mib * MIB))

    def workload(self, cgroup: MemoryCgroup, mib: int, *phases: str, rewrites: int = 0) -> Workload:
        """Start a workload with `mib` MiB of data in `cgroup`.

        It runs while the test iterates over its phases.
        """
        options = WorkloadOptions(
            mib, phases=phases, rewrites=rewrites, time_limit=WORKLOAD_LIMIT_S
        )
        return self._undo.enter_context(Workload(options, cgroup.path))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """Provide a stage, and clear it after the test."""
    with contextlib.ExitStack() as undo:
        yield Stage(tmp_path, undo)


@contextlib.contextmanager
def load(
    stage: Stage, *, mib: int = 128, memory: int = 48, cgroup: MemoryCgroup | None = None
) -> Iterator[Callable[[], int]]:
    """Run a workload over and over in the background.

    Yields a function that ends it and returns the number of pages that differed.

    The memory cgroup is `cgroup`, or a new one of `memory` MiB.
    """
    phases = ("fill", *("verify", "rewrite") * 500)
    workload = stage.workload(cgroup or stage.cgroup(memory), mib, *phases)
    running = workload.phases()
    assert next(running).mismatches == 0
    ended = threading.Event()
    failures: list[str] = []

    def run() -> None:
        try:
            for phase in running:
                if ended.is_set() and phase.name == "verify":
                    return
        except system.HarnessError as error:
            failures.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()

    def finish() -> int:
        ended.set()
        thread.join(100)
        assert not thread.is_alive()
        assert failures == []
        return workload.mismatches

    try:
        yield finish
    finally:
        ended.set()
        workload.kill()
        thread.join(20)
