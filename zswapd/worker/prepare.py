# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process takes before it serves, while it may still wait for memory.

Modules, protections, heaps, threads, buffers.

What only some settings need is not taken without them. The supervisor imports it (`load`) before it
forks anybody, since an import later would want memory and the disk; a worker prepares itself
(`prepare`), as a spare in good time.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """What a process needs beforehand that is to serve.

    Attributes:
        protections: what `service.protect` reached.
        offload: a thread for what blocks; it is protected like the one that made it.
        psi_thread: likewise, for what may block long.
        swapoff_thread: likewise, for calls that wait for this very process. It never touches the
            arena, so it may outlive the process (supervisor/reaper.py).
        exporter: likewise, for metrics; None if they are switched off.
        lanes: threads of cache volumes, likewise.
        disk: threads and buffers for the disk behind the pool, None without one.
        has_small_heaps: the heaps do for swap alone.
        is_cold: programs and libraries are not known to be in memory (system/code.py).
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


def load(config: Config) -> None:
    """Import what only some settings need, once for all workers.

    Importing takes memory, and the disk.

    Args:
        config: the settings; these do not change while workers follow each other.
    """
    if config.metrics.listen:
        import zswapd.metrics.exporter  # noqa: F401


def _exporter(config: Config) -> Exporter | None:
    """Return the thread that serves metrics, None if they are switched off."""
    host, _, port = config.metrics.listen.rpartition(":")
    if not port:
        return None
    from zswapd.metrics.exporter import Exporter

    return Exporter(host.strip("[]"), int(port), config.metrics.users.split())


def prepare(config: Config, *, is_first: bool, is_cold: bool = False) -> Prepared:
    """Protect this process, which was forked to serve.

    And take all the memory that beginning to needs.

    Args:
        config: the settings to begin with.
        is_first: nobody has served yet, so there is time to grow the heaps in full where slow files
            will be read.
        is_cold: programs and libraries may be in swap, and nobody serves it: they have to wait
            until this process does.
    """
    is_small = not is_first or not (config.cache.volumes or config.backing.path)
    protections = system.protect(
        lock_memory=config.service.lock_memory,
        io_flusher=config.service.io_flusher,
        oom_score_adj=config.service.oom_score_adj,
        scheduling=config.service.scheduling,
        is_forked=True,
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
