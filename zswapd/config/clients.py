# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings of [swap.files.NAME], which each swap file has for itself.

An entry of swap.files is a size (`NAME = "1G"`), or a table with `size` and further keys. The size
is the setting `swap.files.NAME` in both forms. A further key is `swap.files.NAME:KEY` among the
given values, because a name may have dots and no colon. Users read and write `swap.files.NAME.KEY`.

The file `swap` has its size in swap.size. Its table has the other keys only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd.config.kinds import shown
from zswapd.config.table import CLIENT_SETTINGS, FILES
from zswapd.errors import ConfigError
from zswapd.host.hints import nearest

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

FIRST = "swap"
"""The file whose size is swap.size."""
_MARK = ":"


def split(dest: str) -> tuple[str, str] | None:
    """Return the file and the key of a given value `swap.files.NAME:KEY`; None for others."""
    name, mark, key = dest.removeprefix(f"{FILES}.").partition(_MARK)
    return (name, key) if mark and dest.startswith(f"{FILES}.") else None


def joined(name: str, key: str) -> str:
    """Return the full name of a given value, for the settings of one file."""
    return f"{FILES}.{name}{_MARK}{key}"


def spoken(dest: str) -> str:
    """Return the full name of a given value as users write it."""
    return dest.replace(_MARK, ".") if dest.startswith(f"{FILES}.") else dest


def canonical(dest: str, files: Container[str]) -> str:
    """Return the full name of a given value for a name as users write it.

    `swap.files.a.limit` is the limit of the file `a` if there is one. Otherwise it is a file with
    the name `a.limit`, as in programs that had no such setting.

    Args:
        dest: the name.
        files: the names of all swap files.
    """
    if dest.startswith(f"{FILES}."):
        name, _, key = dest.removeprefix(f"{FILES}.").rpartition(".")
        if key in CLIENT_SETTINGS and name in files:
            return joined(name, key)
    return dest


def names_in(given: Iterable[str]) -> set[str]:
    """Return the names of the files in the full names of given values, and `swap`."""
    sizes = (dest.removeprefix(f"{FILES}.") for dest in given if dest.startswith(f"{FILES}."))
    return {FIRST, *(name for name in sizes if _MARK not in name)}


def entries(name: str, table: Mapping[str, object], origin: object) -> Iterator[tuple[str, object]]:
    """Yield the full name and the value of each key of a table [swap.files.NAME].

    Args:
        name: the file.
        table: the table in a config file.
        origin: where it is, for messages.

    Raises:
        ConfigError: a key is unknown.
    """
    for key, value in table.items():
        if key == "size":
            yield f"{FILES}.{name}", value
        elif key in CLIENT_SETTINGS:
            yield joined(name, key), value
        else:
            known = ("size", *CLIENT_SETTINGS)
            near = nearest(key, set(known))
            raise ConfigError(
                f"{origin}: [{FILES}.{name}] has the unknown setting {shown(key)[1:-1]}",
                hint=f"did you mean {near}?" if near else f"it can have: {', '.join(known)}",
            )
