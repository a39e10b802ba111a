# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon tells about itself: snapshots of the parts, turned into the control protocol's reports. No decisions here."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any

from zswapd import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zswapd.control.protocol import CacheReport, LimitReport, PoolReport, ProtectionReport
    from zswapd.core.core import CoreStatistics
    from zswapd.host.cgroups import Room
    from zswapd.system import Protection
    from zswapd.volumes.statistics import VolumeStatistics


def version() -> str:
    """Return zswapd's version."""
    return __version__


def pool_report(core: CoreStatistics, compressor: str) -> PoolReport:
    """Return what the files hold and what that costs, in pages and bytes."""
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
    """Return what all cache volumes hold and what that costs."""
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
    """Return the limit of a memory cgroup that leaves least."""
    return None if room is None else {"limit_bytes": room.limit, "left_bytes": max(room.left, 0), "file": room.file}


def protection_reports(protections: Iterable[Protection]) -> list[ProtectionReport]:
    """Return protections, or pieces of advice, as the protocol has them."""
    return [{"name": item.name, "on": item.on, "detail": item.detail, "hint": item.hint} for item in protections]


def plain(value: object) -> Any:
    """Return snapshots, and tuples and mappings of them, as what JSON can say; field names become keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name.lower()
    return value if isinstance(value, int | float | str | bool | None) else str(value)
