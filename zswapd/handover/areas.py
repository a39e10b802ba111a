# SPDX-License-Identifier: GPL-2.0-or-later
"""Areas of the shared state: memory beside the arena that outlives a worker, by name.

The settings say which areas there are, and how large each is. A supervisor makes them with the
shared state; every worker finds them by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zswapd.core.backing.store import KEY_BYTES
from zswapd.core.backing.transfers import CLAIMS
from zswapd.core.sizing import lost_bitmap_bytes, slot_map_sizes, witness_sizes
from zswapd.handover.key import COPY_BYTES, KEY, KEY_COPY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config

BACKING_CLAIMS: Final = "backing.claims"
"""Slots that a worker writes to, so that its successor keeps away from them."""
SLOTS: Final = "slots:"
"""Begins the name of a swap file's slot map."""
WITNESS: Final = "held:"
"""Begins the name of a swap file's witness bits, one for each word of the slot map."""
_MARKS: Final = "tried:"
"""Begins the name of a swap file's marks of recompression."""
_LOST_COPY: Final = "lost:"
"""Begins the name of a swap file's second bitmap of lost pages."""


def all_areas(config: Config) -> dict[str, int]:
    """Return the size of every area except the bitmaps of lost pages, bytes by name."""
    return {**lost_copies(config), **backing_areas(config), **marks_areas(config)}


def lost_copies(config: Config) -> dict[str, int]:
    """Return the size of each swap file's second bitmap of lost pages, bytes by name."""
    return {_LOST_COPY + name: size for name, size in lost_bitmap_bytes(config).items()}


def lost_copies_in(areas: Mapping[str, memoryview]) -> dict[str, memoryview]:
    """Return the second bitmap of each swap file that has one; older programs make none."""
    return {
        name.removeprefix(_LOST_COPY): area
        for name, area in areas.items()
        if name.startswith(_LOST_COPY)
    }


def backing_areas(config: Config) -> dict[str, int]:
    """Return the size of each area that a backing takes, bytes by name; {} without a backing."""
    if not config.backing.path:
        return {}
    maps = {SLOTS + name: size for name, size in slot_map_sizes(config).items()}
    witnesses = {WITNESS + name: size for name, size in witness_sizes(config).items()}
    return {KEY: KEY_BYTES, BACKING_CLAIMS: 8 * CLAIMS, **maps, **witnesses, KEY_COPY: COPY_BYTES}


def marks_areas(config: Config) -> dict[str, int]:
    """Return the size of each swap file's marks, bytes by name; {} if recompression is off.

    If recompression is switched on at run time, a worker adds the marks to the shared state. Where
    the shared state is a memfd, the worker keeps the marks to itself, and its successor tries all
    pages again.
    """
    return marks_bytes(config) if config.pool.recompress_age else {}


def marks_bytes(config: Config) -> dict[str, int]:
    """Return the size of each swap file's marks, one byte a page, by name of the area."""
    return {
        _MARKS + name: size // config.context.page_size
        for name, size in config.swap_files().items()
    }


def marks_in(areas: Mapping[str, memoryview]) -> dict[str, memoryview]:
    """Return the marks of each swap file that has some in these areas."""
    return {
        name.removeprefix(_MARKS): area for name, area in areas.items() if name.startswith(_MARKS)
    }


def marks_of(extension: memoryview, config: Config) -> dict[str, memoryview]:
    """Return the marks of each swap file in memory that was added to the shared state.

    They stand one behind the other; {} if no memory was added.
    """
    marks: dict[str, memoryview] = {}
    place = 0
    for name, size in marks_bytes(config).items() if extension else ():
        marks[name.removeprefix(_MARKS)] = extension[place : place + size]
        place += size
    return marks
