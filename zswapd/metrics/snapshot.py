# SPDX-License-Identifier: GPL-2.0-or-later
"""The statistics of a worker at one moment.

A snapshot is the only source of `stats`, the metrics and the files below `stats/`. It takes about
90 µs, independent of the size of the pool. It costs nothing on the page path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zswapd import counters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.control.server import ControlStatistics
    from zswapd.core.core import CoreStatistics
    from zswapd.core.reclaim.pressure import PressureStatistics
    from zswapd.core.reclaim.shrinker import ShrinkerStatistics
    from zswapd.fuse.session import SessionStatistics
    from zswapd.volumes.statistics import VolumeStatistics


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """The worker that serves, and the workers before it.

    Attributes:
        version: version of the program.
        number: number of the worker, 1 for the first.
        deaths: workers before it that ended without being told to.
        broken: workers before it that ended themselves after an internal error on the page path.
        takeover_seconds: time that it needed to rebuild the index and serve, 0 for the first.
        supervised: True if the supervisor would start another worker after it.
        poisoned_requests: requests answered with EIO because they killed one worker after
            another.
        uptime_seconds: time since the first worker started.
        protections: True for each protection that is on, by name.
    """

    version: str
    number: int
    deaths: int
    broken: int
    takeover_seconds: float
    supervised: bool
    poisoned_requests: int
    uptime_seconds: float
    protections: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class CostStatistics:
    """The memory that the daemon takes, in bytes; worker/cost.py says how it is found.

    Attributes:
        supervisor_bytes: private memory of the supervisor, with its ballast.
        worker_bytes: private memory of the worker, without the index.
        spare_bytes: private memory of the spare.
        code_bytes: programs and libraries, once for all processes.
        index_bytes: the index of the stored pages.
        state_bytes: the shared state, which outlives a worker.
        ready_bytes: the reserve, other free frames, and the frame table.
        beside_pool_bytes: all of these together.
        effective_ratio: size of the pages that are stored and cached, divided by all memory of the
            daemon, with the pool and the cache; 0 without pages.
    """

    supervisor_bytes: int
    worker_bytes: int
    spare_bytes: int
    code_bytes: int
    index_bytes: int
    state_bytes: int
    ready_bytes: int
    beside_pool_bytes: int
    effective_ratio: float


@dataclass(frozen=True, slots=True)
class ClientFilesStatistics:
    """Counts of commands that change the swap files.

    Attributes:
        added, removed, resized: files that came, went, or changed their size.
        refused: commands that were refused, for example because the file was in use.
    """

    added: int
    removed: int
    resized: int
    refused: int


counters.declare(ClientFilesStatistics, cumulative="added removed resized refused")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The statistics of all parts of a worker.

    Cumulative counters count from the first worker on. The shrinker is None without a cache.
    """

    core: CoreStatistics
    fuse: SessionStatistics
    control: ControlStatistics
    pressure: PressureStatistics
    volumes: tuple[VolumeStatistics, ...]
    shrinker: ShrinkerStatistics | None
    worker: WorkerStatistics
    cost: CostStatistics
    files: ClientFilesStatistics
