# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters that outlive a process.

What its statistics counted, as plain values, and the sum of those and a successor's.

Only what happened is carried. What describes contents (pages stored, frames in use) a successor
counts anew; carrying it too would count it twice. Each snapshot class declares which of its fields
are of which kind:

    cumulative   counts, times, tuples of counts and mappings of counts that only grow: they are added up
    high_water   the most there ever was: the larger one counts

A field that is neither describes the present. Snapshots within snapshots are followed; a tuple of
them is matched by `name`.

What comes from another process may be from another version of the program: what is missing counts
as nothing, what is unknown or of another shape is left out. A count may be lost that way, never a
takeover.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
else:
    T = TypeVar("T")


_JOINS: dict[type, dict[str, Any]] = {}


def declare(kind: type, *, cumulative: str = "", high_water: str = "") -> None:
    """Say which fields of a snapshot class are carried, their names with blanks between them.

    (Beside the class and not in it: mypyc takes a class variable of a dataclass for a field.)
    """
    _JOINS[kind] = dict.fromkeys(cumulative.split(), _sum) | dict.fromkeys(high_water.split(), max)


def export(statistics: DataclassInstance) -> dict[str, Any]:
    """Return what a successor has to go on from, as JSON can say it.

    Fields that are carried, by name; no others.
    """
    kept: dict[str, Any] = {}
    carried = _JOINS.get(type(statistics), {})
    for field in dataclasses.fields(statistics):
        value = getattr(statistics, field.name)
        if field.name in carried:
            kept[field.name] = (
                list(value)
                if isinstance(value, tuple)
                else dict(value)
                if isinstance(value, Mapping)
                else value
            )
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            kept[field.name] = export(value)
        elif _is_named(value):
            kept[field.name] = {part.name: export(part) for part in value}
    return kept


def add(statistics: T, base: Mapping[str, Any]) -> T:
    """Return a snapshot with what `cumulative` made of a predecessor's added.

    Args:
        statistics: of this process alone.
        base: {} for none.
    """
    changes: dict[str, Any] = {}
    carried = _JOINS.get(type(statistics), {})
    for field in dataclasses.fields(statistics):
        value, earlier = getattr(statistics, field.name), base.get(field.name)
        if earlier is None:
            continue
        if field.name in carried:
            changes[field.name] = _joined(value, earlier, carried[field.name])
        elif (
            isinstance(earlier, Mapping)
            and dataclasses.is_dataclass(value)
            and not isinstance(value, type)
        ):
            changes[field.name] = add(value, earlier)
        elif isinstance(earlier, Mapping) and _is_named(value):
            changes[field.name] = tuple(add(part, earlier.get(part.name) or {}) for part in value)
    return dataclasses.replace(statistics, **changes)


def _is_named(value: object) -> bool:
    return isinstance(value, tuple) and all(
        dataclasses.is_dataclass(part) and hasattr(part, "name") for part in value
    )


def _sum(one: float, other: float) -> float:
    return one + other


def _joined(value: Any, earlier: Any, join: Any) -> Any:
    """Return two values of a carried field as one.

    The first alone if the second is of another shape.
    """
    if isinstance(value, Mapping):
        known = earlier if isinstance(earlier, Mapping) else {}
        names = [*value, *(name for name in known if name not in value)]
        return {name: _joined(value.get(name, 0), known.get(name, 0), join) for name in names}
    if isinstance(value, tuple):
        same = isinstance(earlier, list | tuple) and len(earlier) == len(value)
        return (
            tuple(_joined(one, other, join) for one, other in zip(value, earlier, strict=True))
            if same
            else value
        )
    return join(value, earlier) if isinstance(earlier, int | float) else value
