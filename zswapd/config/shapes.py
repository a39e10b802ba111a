# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings that cannot change while something is stored, for messages that two differ.

What a daemon says of itself (handover/geometry.py) and what an arena's label says (core/core.py)
have the settings' values by names of their own: sizes in bytes, files in one table. Here they get
the names and the form that they have in a config file.
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
"""Settings by the names that daemons use among themselves, where these differ."""
_ENCRYPTED = " (encrypted)"


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return a clause for each setting that differs; none if two shapes agree.

    Args:
        theirs: the shape of what is stored.
        ours: the shape that the settings ask for.
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
    """Yield the settings of a shape by full name, each as it stands in a config file."""
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
    """Return a value as TOML has it, however long it is.

    A path that is cut short cannot be copied.
    """
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else shown(value)


def _size(size: object) -> str:
    """Return a size in the largest unit of which it is a whole number."""
    if not isinstance(size, int):
        return str(size)
    unit = next((unit for unit in reversed(UNITS) if size and size % UNITS[unit] == 0), "")
    return f"{size // UNITS[unit]}{unit}" if unit else str(size)
