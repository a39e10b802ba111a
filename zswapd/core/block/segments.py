# SPDX-License-Identifier: GPL-2.0-or-later
"""Byte ranges cut at page borders. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple


class Segments(NamedTuple):
    """A byte range as at most two partial pages around whole ones.

    Attributes:
        head: (page, first byte in it, end byte in it) of a partial page at the beginning, or None.
            A range inside one page that does not fill it is all head.
        first, end: whole pages [first, end).
        tail: likewise of a partial page at the end, beginning at its byte 0, or None.
    """

    head: tuple[int, int, int] | None
    first: int
    end: int
    tail: tuple[int, int, int] | None


def cut(offset: int, length: int, page_size: int) -> Segments:
    """Cut the byte range [offset, offset + length) at page borders; `length` is at least 1."""
    stop = offset + length
    first, skip = divmod(offset, page_size)
    end, rest = divmod(stop, page_size)
    if first == end:
        return Segments((first, skip, rest), end, end, None)
    head = (first, skip, page_size) if skip else None
    tail = (end, 0, rest) if rest else None
    return Segments(head, first + 1 if skip else first, end, tail)
