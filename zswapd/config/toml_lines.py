# SPDX-License-Identifier: GPL-2.0-or-later
"""The line of a key in a TOML text, for errors. tomllib does not report the lines of values.

This is a scan for table headers and assignments, not a parser. It can be simple, because tomllib
has accepted the same text. The scan skips strings over several lines. The line of an entry of an
inline table is the line of the table's key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER = re.compile(rf"\s*\[\[?\s*({_KEY})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_KEY})\s*=(.*)")
_PARTS = re.compile(_PART)
_LONG_QUOTES = ('"""', "'''")


def find_line(text: str, path: Sequence[str]) -> int | None:
    """Return the line, from 1, that sets a key.

    Args:
        text: a text that tomllib accepts.
        path: table names and key, outermost first.

    Returns:
        The line with the longest leading part of the path, or None if no line has any part.
    """
    table: list[str] = []
    best: tuple[int, int] | None = None  # (parts matched, line)
    closing = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if closing:
            closing = "" if closing in line else closing
            continue
        found = _HEADER.match(line)
        if found:
            table = named = _split(found[1])
        elif found := _ASSIGNMENT.match(line):
            named = table + _split(found[1])
            closing = _left_open(found[2])
        else:
            continue
        if named == list(path[: len(named)]) and (best is None or len(named) > best[0]):
            best = (len(named), number)
    return best[1] if best else None


def _split(key: str) -> list[str]:
    return [part.strip("\"'") for part in _PARTS.findall(key)]


def _left_open(value: str) -> str:
    """Return the quotes that end the string that a value leaves open, or an empty string."""
    value = value.strip()
    return next(
        (
            quotes
            for quotes in _LONG_QUOTES
            if value.startswith(quotes) and value.count(quotes) == 1
        ),
        "",
    )
