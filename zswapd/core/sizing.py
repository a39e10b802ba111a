# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes of the core's memory from the settings, and the arena of that size.

The arena's address space is the sum of these. Address space costs nothing until it is populated.

- all swap files, filled with incompressible pages;
- a quarter of that for zspages that are not full;
- four times the reserve;
- half of the machine's memory, if there is an ephemeral half.

A supervisor uses these functions to make the arena and the areas that outlive a worker.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from zswapd.config.shapes import differences
from zswapd.core.allocators.arena import Arena, head_frames
from zswapd.core.block.device import lost_bytes
from zswapd.core.block.slotmap import slot_map_bytes, witness_bytes
from zswapd.core.pam.zv import BODY_MASK
from zswapd.errors import ArenaError
from zswapd.host.installation import restart_daemon

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config


def make_arena(config: Config) -> Arena:
    """Return a new arena for the settings.

    Raises:
        ArenaError: the kernel refuses the shared memory.
    """
    return Arena(
        arena_frames(config),
        config.context.page_size,
        kind=config.memory.arena,
        label=label(config),
    )


def adopt_arena(
    config: Config, fd: int, copy: Mapping[str, Any] | None, made: Mapping[str, int] | None = None
) -> Arena:
    """Return the arena in an inherited file, if it was made for these settings.

    Args:
        config: the settings.
        fd: the file. The caller keeps it.
        copy: contents of the arena's superblock, if the shared state has a copy.
        made: see `label`.

    Raises:
        ArenaError: it was made for other settings. Nothing was changed.
    """
    fd = os.dup(fd)
    try:
        arena = Arena.adopt(fd, copy)
    except ArenaError:
        os.close(fd)
        raise
    page_size, wanted = config.context.page_size, label(config, made)
    if arena.page_size == page_size and arena.label == wanted:
        return arena
    theirs = {**parsed_label(arena.label.decode(errors="replace")), "page_size": arena.page_size}
    found = "; ".join(
        differences(theirs, {**parsed_label(wanted.decode()), "page_size": page_size})
    )
    arena.close()
    raise ArenaError(
        f"the inherited arena is for other settings: {found}",
        hint=f"restore the old values, or swap off to change them: {restart_daemon()}",
    )


def arena_frames(config: Config) -> int:
    """Return the frames of a new arena: the most that the pool may need, as far as handles reach.

    The handle of a raw page's body has 40 bits, so an arena has at most 1 TiB. Swap files may be
    larger. Stores that find no frame are then refused.
    """
    page_size = config.context.page_size
    pages = sum(config.swap_files().values()) // page_size
    wanted = pages + pages // 4 + 4 * reserve_frames(config) + cache_frames(config)
    most = (BODY_MASK + 1) // page_size
    return min(wanted, most - head_frames(most, page_size))


def reserve_frames(config: Config) -> int:
    """Return the frames of the reserve.

    They are at most the pages of swap or, without swap, the frames of the cache.
    """
    pages = sum(config.swap_files().values()) // config.context.page_size
    return min(config.memory.reserve // config.context.page_size, pages or cache_frames(config))


def cache_frames(config: Config) -> int:
    """Return the largest number of frames of the ephemeral half, whatever its limit.

    The result is 0 if there is no ephemeral half.
    """
    return (
        config.context.memory_total // config.context.page_size // 2
        if config.cache.limit is not None
        else 0
    )


def lost_bitmap_bytes(config: Config) -> dict[str, int]:
    """Return the length of the bitmap of lost pages in bytes, by device."""
    return {
        name: lost_bytes(size, config.context.page_size)
        for name, size in config.swap_files().items()
    }


def slot_map_sizes(config: Config) -> dict[str, int]:
    """Return the length of the slot map in bytes, by device."""
    return {
        name: slot_map_bytes(size, config.context.page_size)
        for name, size in config.swap_files().items()
    }


def witness_sizes(config: Config) -> dict[str, int]:
    """Return the length of the witness bits beside the slot map in bytes, by device."""
    return {
        name: witness_bytes(size, config.context.page_size)
        for name, size in config.swap_files().items()
    }


def slots_needed(config: Config) -> int:
    """Return the number of slots of a backing: one for each page of each device."""
    return sum(config.swap_files().values()) // config.context.page_size


def label(config: Config, made: Mapping[str, int] | None = None) -> bytes:
    """Return the settings that a successor must share, as the arena's label.

    Headers contain swap types and offsets, and the frame table contains size classes. The ephemeral
    half is not in the label, since a successor finds no ephemeral page.

    Args:
        config: the settings.
        made: bytes of each swap file at the start of the daemon, by name, if files have come or
            gone since; None for the files of the settings.
    """
    geometry: dict[str, Any] = {
        "files": list((config.swap_files() if made is None else made).items()),
        "max_zspage_frames": config.pool.max_zspage_frames,
    }
    if config.pool.allocator != "zsmalloc":  # older programs do not have this key
        geometry["allocator"] = config.pool.allocator
    return json.dumps(geometry, separators=(",", ":")).encode()


def parsed_label(text: str) -> dict[str, Any]:
    """Return a label as a shape (config/shapes.py); a label that is not one is shown unchanged."""
    try:
        shape: dict[str, Any] = json.loads(text)
        return {"allocator": "zsmalloc", **shape, "files": dict(shape["files"])}
    except (ValueError, TypeError, KeyError):
        return {"label": text}
