# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages about settings that must not change while pages are stored.

A *shape* is a table of the values of these settings. A daemon reports its shape to a successor
(handover/geometry.py), and an arena has one in its label (core/core.py). A shape has its own names,
has sizes in bytes, and has all files in one table. The messages have the names and the form of a
config file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from zswapd.config.kinds import shown
from zswapd.config.sizes import UNITS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_SETTINGS = {
    "mountpoint": "fuse.mountpoint",
    "page_size": "page size",
    "allocator": "pool.allocator",
    "max_zspage_frames": "pool.max_zspage_frames",
}
"""Full names of settings by their names in a shape, if these differ."""
_ENCRYPTED = " (encrypted)"


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return a clause for each setting that differs between two shapes.

    Args:
        theirs: the shape of the stored pages.
        ours: the shape of the present settings.
    """
    old, new = dict(_written(theirs)), dict(_written(ours))
    clauses = [
        f"{name} is {old.get(name, 'not set')}, the settings say {new.get(name, 'nothing')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if clauses:
        return clauses
    was, wanted = (list(shape.get("files", {})) for shape in (theirs, ours))
    if was != wanted:
        clauses = [f"order of swap files is {', '.join(was)}, the settings say {', '.join(wanted)}"]
    return clauses


def _written(shape: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the full name and the value of each setting, in the form of a config file."""
    for name, value in shape.items():
        if name == "files" and isinstance(value, dict):
            for file, size in value.items():
                yield ("swap.size" if file == "swap" else f"swap.files.{file}"), f'"{_size(size)}"'
        elif name == "backing" and isinstance(value, str):
            yield "backing.path", _plain(value.removesuffix(_ENCRYPTED))
            yield "backing.encrypt", shown(value.endswith(_ENCRYPTED))
        else:
            yield _SETTINGS.get(name, name), _plain(value)


def _plain(value: object) -> str:
    """Return a value in the form of TOML. It is not shortened: the user may copy a path."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else shown(value)


def _size(size: object) -> str:
    """Return a size in the largest unit that gives a whole number."""
    if not isinstance(size, int):
        return str(size)
    unit = next((unit for unit in reversed(UNITS) if size and size % UNITS[unit] == 0), "")
    return f"{size // UNITS[unit]}{unit}" if unit else str(size)
