# SPDX-License-Identifier: GPL-2.0-or-later
"""The marks of recompression in the shared state: which areas there are, and where each one's marks are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config

_MARKS = "tried:"
"""Begins the name of a swap file's marks in the shared state."""


def areas(config: Config) -> dict[str, int]:
    """Return the memory that has to outlive a worker, by name: a byte a page.

    {} as long as recompression is off.

    If it is switched on later, or commanded, a worker adds that memory to the shared state; it
    keeps it to itself where that is a memfd, and its successor tries pages again.
    """
    return marks_bytes(config) if config.pool.recompress_age else {}


def marks_bytes(config: Config) -> dict[str, int]:
    """Return what the marks of each swap file take, as areas."""
    return {_MARKS + name: size // config.context.page_size for name, size in config.swap_files().items()}


def marks_in(areas: Mapping[str, memoryview]) -> dict[str, memoryview]:
    """Return the marks of each swap file that has some in these areas."""
    return {name.removeprefix(_MARKS): area for name, area in areas.items() if name.startswith(_MARKS)}


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
