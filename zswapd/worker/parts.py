# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of one worker. Commands, upgrade and saved state take these, and not the worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zswapd.control.listener import Listener
    from zswapd.core.core import Core
    from zswapd.core.reclaim.pressure import Pressure
    from zswapd.fuse.inodes import Directory
    from zswapd.fuse.session import Session
    from zswapd.handover.state import SharedState
    from zswapd.metrics.exporter import Exporter
    from zswapd.system import Protection
    from zswapd.system.offload import Offload
    from zswapd.volumes.manager import Volumes
    from zswapd.worker.cost import Cost
    from zswapd.worker.disk import BackedPool
    from zswapd.worker.emptying import Emptying
    from zswapd.worker.merging import Merging
    from zswapd.worker.parent import Parent
    from zswapd.worker.settings import Settings
    from zswapd.worker.shrink import Shrinking
    from zswapd.worker.stop import Shutdown
    from zswapd.worker.upkeep import Upkeep


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of one worker.

    Attributes:
        settings: the settings that count now.
        parent: the supervisor.
        cost: samples the memory of all processes of the daemon.
        state: the shared state, which outlives this worker.
        listener: the control socket, which outlives this worker.
        core: stores pages.
        session: serves FUSE requests.
        directory: the directory of the mount.
        volumes: the cache volumes; None if cache.limit is not set.
        disk: the disk behind the pool; None without a backing.
        pressure: tells how short the system's memory is.
        upkeep: refills reserves and keeps house.
        shrinking: shrinks the cache; None without a cache.
        shutdown: swaps off before the end.
        emptying: discards the pages that swapoff leaves.
        merging: switches request merging off while a page cannot be read.
        exporter: the thread that serves metrics; None if metrics are switched off.
        psi_thread: the thread that arms the kernel's PSI trigger.
        swapoff_thread: the threads for swapoff, and for other calls that wait for this process.
        protections: the protections of this process.
        begun: monotonic time at which the supervisor began to make this worker, s.
        born: monotonic time at which the first worker began, s.
        is_cold: programs and libraries may be in swap (system/code.py).
    """

    settings: Settings
    parent: Parent
    cost: Cost
    state: SharedState
    listener: Listener
    core: Core
    session: Session
    directory: Directory
    volumes: Volumes | None
    disk: BackedPool | None
    pressure: Pressure
    upkeep: Upkeep
    shrinking: Shrinking | None
    shutdown: Shutdown
    emptying: Emptying
    merging: Merging
    exporter: Exporter | None
    psi_thread: Offload
    swapoff_thread: Offload
    protections: tuple[Protection, ...]
    begun: float
    born: float
    is_cold: bool
