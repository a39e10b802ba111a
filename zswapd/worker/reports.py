# SPDX-License-Identifier: GPL-2.0-or-later
"""The reports of the control protocol, made from snapshots of the worker's parts."""

from __future__ import annotations

import dataclasses
import enum
import os
import time
from typing import TYPE_CHECKING, Any

from zswapd import __version__, system
from zswapd.handover.state import HookWord, Word

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zswapd.control.protocol import (
        CacheReport,
        FileReport,
        LimitReport,
        PoolReport,
        ProtectionReport,
        StatusReport,
    )
    from zswapd.core.core import CoreStatistics
    from zswapd.host.cgroups import Room
    from zswapd.system import Protection
    from zswapd.volumes.statistics import VolumeStatistics
    from zswapd.worker.parts import Parts


def status_report(parts: Parts, *, takeover_s: float) -> StatusReport:
    """Return the report that `zswapctl status` shows.

    Args:
        parts: the parts of the worker.
        takeover_s: duration of its takeover, s.
    """
    config, statistics, words = (
        parts.settings.current,
        parts.core.statistics(ages_sampled=False),
        parts.state.words,
    )
    frozen = statistics.frontswap.frozen
    return {
        "version": __version__,
        "pid": os.getppid() if parts.parent.is_alive() else os.getpid(),
        "worker": {
            "pid": os.getpid(),
            "number": words[Word.STARTED],
            "deaths": words[Word.DEATHS],
            "takeover_s": round(takeover_s, 6),
            "supervised": parts.parent.is_alive(),
            "poisoned_requests": parts.state.hook_words[HookWord.POISONED],
        },
        "uptime_s": round(time.monotonic() - parts.born, 3),
        "state": "stopping" if parts.shutdown.is_under_way else "frozen" if frozen else "serving",
        "mountpoint": str(parts.session.mountpoint),
        "page_size": config.context.page_size,
        "discard": True,
        "pool": pool_report(statistics, config.pool.compressor),
        "cost": plain(parts.cost.statistics(statistics)),
        "backing": parts.disk.report(config, statistics) if parts.disk else None,
        "cache": cache_report(statistics, parts.volumes.statistics() if parts.volumes else ()),
        "files": file_reports(statistics),
        "memory_limit": limit_report(parts.pressure.limits.room()),
        "protections": protection_reports(system.refreshed(parts.protections)),
        "advice": protection_reports(system.advise()),
    }


def file_reports(core: CoreStatistics) -> list[FileReport]:
    """Return what each swap file has in the pool and on the disk, and how it was read."""
    disk_pages = {device.name: device.bd_count for device in core.backed}
    return [
        {
            "name": device.name,
            "size": device.size,
            "stored_pages": device.stored_pages,
            "object_bytes": device.object_bytes,
            "disk_pages": disk_pages.get(device.name, 0),
            "hits": device.hits,
            "disk_reads": device.disk_reads,
            "limit_bytes": device.limit_bytes,
            "limit_hits": device.limit_hits,
            "weight": device.weight,
        }
        for device in core.devices
    ]


def pool_report(core: CoreStatistics, compressor: str) -> PoolReport:
    """Return the stored pages of the swap files, and the memory that they take."""
    frames = core.frames
    used = frames.used_frames - frames.ephemeral_frames
    return {
        "compressor": compressor,
        "stored_pages": core.zv.curr_pages,
        "same_filled_pages": core.zv.curr_same_filled,
        "incompressible_pages": core.zv.curr_incompressible,
        "compressed_bytes": core.zv.curr_object_bytes,
        "frames": used,
        "ratio": round(core.zv.curr_pages / used, 4) if used else None,
        "reserve_bytes": frames.free_frames * frames.page_size,
        "limit_bytes": frames.limit_frames * frames.page_size,
        "refused": dict(core.frontswap.rejects),
    }


def cache_report(core: CoreStatistics, volumes: Sequence[VolumeStatistics]) -> CacheReport | None:
    """Return the cached pages of all volumes, and their memory; None without a cache."""
    if core.cache is None:
        return None
    hits = sum(volume.hits for volume in volumes)
    reads = hits + sum(volume.misses for volume in volumes)
    return {
        "volumes": len(volumes),
        "pages": core.cache.cleancache.pages,
        "frames": core.cache.frames,
        "limit_bytes": core.cache.limit_frames * core.frames.page_size,
        "hit_ratio": hits / reads if reads else None,
        "frozen": core.cache.cleancache.frozen,
    }


def limit_report(room: Room | None) -> LimitReport | None:
    """Return the memory limit that leaves the least room; None without a limit."""
    return (
        None
        if room is None
        else {"limit_bytes": room.limit, "left_bytes": max(room.left, 0), "file": room.file}
    )


def protection_reports(protections: Iterable[Protection]) -> list[ProtectionReport]:
    """Return protections, or pieces of advice, in the form of the protocol."""
    return [
        {"name": item.name, "on": item.on, "detail": item.detail, "hint": item.hint}
        for item in protections
    ]


def plain(value: object) -> Any:
    """Return snapshots, and tuples and mappings of them, as JSON values; field names are keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value if isinstance(value, int | float | str | bool | None) else str(value)
