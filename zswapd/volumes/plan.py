# SPDX-License-Identifier: GPL-2.0-or-later
"""Planning of reads: which missing pages to read together, and what a stream is. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

STREAMS = 16
"""Sequential readers that are told apart, the most recent ones first (bcache follows 128)."""


def runs(pages: Sequence[int], *, gap: int, most: int) -> list[tuple[int, int]]:
    """Join page numbers to runs. Each run is one read.

    Args:
        pages: in rising order.
        gap: maximum of unwanted pages between two wanted ones in a run. Reading over them is
            cheaper than another read.
        most: pages of the longest run.

    Returns:
        (first page, number of pages) of each run. Every wanted page is in one run. A run begins
        and ends with wanted pages.
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
    """Detects requests that continue one another, from any reader.

    Source of the idea: bcache's sequential_cutoff.
    """

    def __init__(self) -> None:
        # By the offset at which each stream would continue, the latest last.
        self._lengths: dict[int, int] = {}

    def note(self, offset: int, length: int) -> int:
        """Return the bytes of the stream that a request belongs to, this request included."""
        total = self._lengths.pop(offset, 0) + length
        self._lengths[offset + length] = total
        if len(self._lengths) > STREAMS:
            del self._lengths[next(iter(self._lengths))]
        return total
