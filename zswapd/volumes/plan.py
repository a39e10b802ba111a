# SPDX-License-Identifier: GPL-2.0-or-later
"""Which missing pages are read together, and what counts as a sequential stream. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

STREAMS = 16
"""Sequential readers that are told apart, most recent ones first (bcache follows 128)."""


def runs(pages: Sequence[int], *, gap: int, most: int) -> list[tuple[int, int]]:
    """Join page numbers to runs, each of which is one read.

    Args:
        pages: in rising order.
        gap: pages that are not wanted and are worth reading over, rather than beginning another
            read behind them.
        most: pages of the longest run.

    Returns:
        (first page, number of pages) of each run; every wanted page is in one, runs begin and end
        with wanted pages.
    """
    found: list[tuple[int, int]] = []
    for page in pages:
        if found:
            first, count = found[-1]
            if page - (first + count) <= gap and page - first < most:
                found[-1] = (first, page - first + 1)
                continue
        found.append((page, 1))
    return found


class Streams:
    """Recognises requests that continue one another.

    Whoever makes them (the idea is that of bcache's sequential_cutoff).
    """

    def __init__(self) -> None:
        self._lengths: dict[
            int, int
        ] = {}  # by the offset at which each stream would go on, the latest last

    def note(self, offset: int, length: int) -> int:
        """Return how many bytes the stream has come to that a request belongs to.

        This one included.
        """
        total = self._lengths.pop(offset, 0) + length
        self._lengths[offset + length] = total
        if len(self._lengths) > STREAMS:
            del self._lengths[next(iter(self._lengths))]
        return total
