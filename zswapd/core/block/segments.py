# SPDX-License-Identifier: GPL-2.0-or-later
"""Arithmetic that cuts byte ranges at page borders."""

from __future__ import annotations

from typing import NamedTuple


class Segments(NamedTuple):
    """The parts of a byte range: whole pages, and at most one partial page on either side.

    Attributes:
        head: (page, first byte in it, end byte in it) of a partial page at the beginning, or None.
            A range that fills only a part of one page is all head.
        first, end: the whole pages are [first, end).
        tail: (page, 0, end byte in it) of a partial page at the end, or None.
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
