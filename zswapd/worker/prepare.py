# SPDX-License-Identifier: GPL-2.0-or-later
"""Prepare a process to serve, while it may still wait for memory.

A process takes modules, protections, heaps, threads and buffers, as far as the settings need them.
The supervisor imports the modules (`load`) before it forks a worker, because a later import would
need memory and the disk. A worker prepares itself (`prepare`), and a spare does it early.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zswapd import system
from zswapd.system.heap import LIBC_HEAP, PYTHON_HEAP, SMALL_HEAP
from zswapd.system.offload import Offload
from zswapd.volumes.mounted import make_lanes
from zswapd.worker import disk as disk_module

if TYPE_CHECKING:
    from zswapd.config import Config
    from zswapd.metrics.exporter import Exporter
    from zswapd.volumes.source import Lane


@dataclass(frozen=True, slots=True)
class Prepared:
    """The things that a process has made before it serves.

    All threads have the protections of the thread that made them.

    Attributes:
        protections: the protections that were switched on, and those that could not be.
        offload: a thread for blocking work.
        psi_thread: a thread for work that may block long.
        swapoff_thread: threads for calls that wait for this process. They never touch the arena, so
            they may outlive the process (supervisor/reaper.py).
        exporter: the thread that serves metrics; None if metrics are switched off.
        lanes: the threads of cache volumes.
        disk: threads and buffers for the disk behind the pool; None without a backing.
        has_small_heaps: the heaps are large enough for swap only.
        is_cold: programs and libraries may be out of memory (system/code.py).
    """

    protections: tuple[system.Protection, ...]
    offload: Offload
    psi_thread: Offload
    swapoff_thread: Offload
    exporter: Exporter | None
    lanes: tuple[Lane, ...]
    disk: disk_module.DiskThreads | None
    has_small_heaps: bool
    is_cold: bool

    def owned(self) -> Prepared:
        """Take the pages that this process still shares with the supervisor, before it serves."""
        return replace(self, protections=(system.take_own_memory(), *self.protections))


def load(config: Config) -> None:
    """Import the modules that only some settings need, once for all workers.

    Args:
        config: the settings. The ones that are read here do not change between workers.
    """
    if config.metrics.listen:
        import zswapd.metrics.exporter  # noqa: F401


def _exporter(config: Config) -> Exporter | None:
    """Return the thread that serves metrics; None if metrics are switched off."""
    host, _, port = config.metrics.listen.rpartition(":")
    if not port:
        return None
    from zswapd.metrics.exporter import Exporter

    return Exporter(host.strip("[]"), int(port), config.metrics.users.split())


def prepare(
    config: Config, *, is_first: bool, is_cold: bool = False, owns_memory: bool = True
) -> Prepared:
    """Protect this forked process, and take all the memory that its start needs.

    Args:
        config: the settings to begin with.
        is_first: no worker has served yet, so there is time for large heaps, which slow files need.
        is_cold: programs and libraries may be in swap that no process serves. They are read only
            when this process serves.
        owns_memory: copy the pages that are shared with the supervisor now. Else `Prepared.owned`
            is to be called.
    """
    is_small = not is_first or not config.may_wait_for_files
    protections = system.protect(
        lock_memory=config.service.lock_memory,
        oom_score_adj=config.service.oom_score_adj,
        scheduling=config.service.scheduling,
        owns_memory=owns_memory,
        populates_code=not is_cold,
        libc_heap=SMALL_HEAP if is_small else LIBC_HEAP,
        python_heap=SMALL_HEAP if is_small else PYTHON_HEAP,
    )
    system.set_realtime()
    return Prepared(
        protections,
        Offload(),
        Offload("psi"),
        Offload("swapoff", threads=2),
        _exporter(config),
        make_lanes(config),
        disk_module.prepare(config),
        is_small,
        is_cold,
    )
