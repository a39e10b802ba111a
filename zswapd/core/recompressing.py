# SPDX-License-Identifier: GPL-2.0-or-later
"""Recompression as a core has it: put together from its parts, and the settings and shared memory that it takes."""

from __future__ import annotations

import errno
import mmap
from functools import partial
from typing import TYPE_CHECKING

from zswapd.core import compress
from zswapd.core.reclaim.recompress import Recompression
from zswapd.errors import ArenaError
from zswapd.pages import ADDRESS_SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from zswapd.config import Config
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.block.device import Device
    from zswapd.core.pam.zv import Zv
    from zswapd.core.reclaim.writeback import Writeback

STRONGER = "zstd"
"""Codec for pages that nobody has used for long."""
_STEP_BYTES = 1 << 20
_MADV_POPULATE_WRITE = 23


def codecs(config: Config) -> tuple[str, ...]:
    """Return the codecs that pages are kept with from now on."""
    return (config.pool.compressor, *([STRONGER] if config.pool.recompress_age else []))


def make(
    devices: Mapping[str, Device],
    marks: Mapping[str, memoryview],
    zv: Zv,
    frames: PageFrames,
    writeback: Writeback | None,
    more: Callable[[], Mapping[str, memoryview]] | None = None,
) -> Recompression:
    """Return what compresses pages again.

    Args:
        devices: by name.
        marks: what has been tried, by device; one without has its own.
        zv: whose pages these are.
        frames: where copies go.
        writeback: knows ages, if there are any.
        more: makes the marks of all devices, in memory that outlives the process, when they are
            needed and `marks` has none.
    """
    own = {name: mmap.mmap(-1, device.pages, ADDRESS_SPACE) for name, device in devices.items() if name not in marks}
    return Recompression(
        list(devices.values()),
        [marks[name] if name in marks else memoryview(own[name]) for name in devices],
        compress.get(STRONGER),
        newest=lambda: zv.newest,
        epoch_before=writeback.epoch_before if writeback else lambda _seconds: 0,
        has_room=lambda: frames.table.free_frames > frames.reserve_target // 2,
        prepare=partial(_prepare, list(devices), own, more) if own else None,
    )


def _prepare(
    names: Sequence[str], own: Mapping[str, mmap.mmap], more: Callable[[], Mapping[str, memoryview]] | None
) -> Sequence[memoryview] | None:
    """Return marks that outlive the process.

    None stands for the marks of the process itself, which have memory then.
    """
    if more is None:
        _populate(own.values())
        return None
    made = more()
    return [made[name] for name in names]


def _populate(mappings: Iterable[mmap.mmap]) -> None:
    """Take the memory of mappings, a mebibyte at a time.

    Raises:
        ArenaError: there is none.
    """
    for mapping in mappings:
        for place in range(0, len(mapping), _STEP_BYTES):
            try:
                mapping.madvise(_MADV_POPULATE_WRITE, place, min(_STEP_BYTES, len(mapping) - place))
            except OSError as error:
                if error.errno != errno.EINVAL:  # before Linux 5.14 there is no such advice
                    raise ArenaError(f"no memory for the marks of recompression: {error.strerror}") from error


def apply(config: Config, job: Recompression) -> None:
    """Take over the settings."""
    job.age_s, job.rate = config.pool.recompress_age, config.pool.recompress_rate
    job.gain_percent = config.pool.recompress_gain
