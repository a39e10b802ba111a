# SPDX-License-Identifier: GPL-2.0-or-later
"""Recompression as a core has it: put together from its parts, and the settings and shared memory that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd import compress
from zswapd.reclaim.recompress import Recompression

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.allocators.pageframes import PageFrames
    from zswapd.block.device import Device
    from zswapd.config import Config
    from zswapd.pam.zv import Zv
    from zswapd.reclaim.writeback import Writeback

STRONGER = "zstd"
"""Codec for pages that nobody has used for long."""
_MARKS = "tried:"
"""Begins the name of a swap file's marks in the shared state."""


def areas(config: Config) -> dict[str, int]:
    """Return the memory that has to outlive a worker, by name: a byte a page."""
    return {_MARKS + name: size // config.context.page_size for name, size in config.swap_files().items()}


def marks_in(areas: Mapping[str, memoryview]) -> dict[str, memoryview]:
    """Return the marks of each swap file that has some; an older program has made none."""
    return {name.removeprefix(_MARKS): area for name, area in areas.items() if name.startswith(_MARKS)}


def codecs(config: Config) -> tuple[str, ...]:
    """Return the codecs that pages are kept with from now on."""
    return (config.pool.compressor, *([STRONGER] if config.pool.recompress_age else []))


def make(
    devices: Mapping[str, Device],
    marks: Mapping[str, memoryview],
    zv: Zv,
    frames: PageFrames,
    writeback: Writeback | None,
) -> Recompression:
    """Return what compresses pages again.

    Args:
        devices: by name.
        marks: what has been tried, by device; one without has its own.
        zv: whose pages these are.
        frames: where copies go.
        writeback: knows ages, if there are any.
    """
    return Recompression(
        list(devices.values()),
        [marks[name] if name in marks else memoryview(bytearray(device.pages)) for name, device in devices.items()],
        compress.get(STRONGER),
        newest=lambda: zv.newest,
        epoch_before=writeback.epoch_before if writeback else lambda _seconds: 0,
        has_room=lambda: frames.table.free_frames > frames.reserve_target // 2,
    )


def apply(config: Config, job: Recompression) -> None:
    """Take over the settings."""
    job.age_s, job.rate = config.pool.recompress_age, config.pool.recompress_rate
    job.gain_percent = config.pool.recompress_gain
