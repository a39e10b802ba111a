# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters that outlive a process: exported as plain values, and added to a successor's.

Only counts of events are carried. A successor counts contents anew (stored pages, used frames), so
carrying them would count them twice. Each snapshot class declares the kind of its fields:

    cumulative   counts, times, tuples and mappings of counts that only grow: they are added
    high_water   a maximum: the larger value counts

Other fields describe the present. Nested snapshots are carried too. The members of a tuple of
snapshots are matched by `name`.

The values may come from another version of the program. A missing value counts as 0, and an unknown
one or one of another shape is left out. So a count may be lost, but a takeover never fails.
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
    """Declare the carried fields of a snapshot class, as names with blanks between them.

    It is called beside the class, because mypyc takes a class variable of a dataclass for a field.
    """
    _JOINS[kind] = dict.fromkeys(cumulative.split(), _sum) | dict.fromkeys(high_water.split(), max)


def export(statistics: DataclassInstance) -> dict[str, Any]:
    """Return the carried fields of a snapshot by name, as JSON values."""
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
    """Return a snapshot with the counts of a predecessor added.

    Args:
        statistics: the snapshot of this process alone.
        base: the predecessor's counts, from `export`; {} for none.
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
    """Return two values of a carried field as one; the first if the shapes differ."""
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
