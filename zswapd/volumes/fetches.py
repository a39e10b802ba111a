# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads of a backing file that are under way, and the readers that wait for them.

Several readers of one page share one read.

A fetch passes through these states: waiting for a buffer; reading; loaded (the data is in the
buffer, and the readers have copied it); kept (the pages are in cleancache); gone. An invalidation
makes a fetch stale if it is reading or loaded. Readers that asked before may get either version. A
later reader must not join a stale fetch, and its pages are not kept.

This is plain bookkeeping in the event loop's thread. volume.py does the reading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Collection


class Want:
    """One reader's request: pages that it gets from fetches.

    Args:
        first: its first page.
        out: room for its pages, whole ones.
        missing: pages that it needs from fetches.

    Attributes:
        missing: pages that no fetch has brought yet.
        error: the error of a failed fetch.
        is_error_own: whether the failed fetch read only pages that are missing here.
        is_short: whether the file ended before a page of the request.
    """

    def __init__(self, first: int, out: memoryview, missing: Collection[int]) -> None:
        self.first = first
        self.out = out
        self.missing = set(missing)
        self.error: Exception | None = None
        self.is_error_own = False
        self.is_short = False
        self.changed = trio.Event()

    @property
    def is_waiting(self) -> bool:
        """Whether the reader has to wait for fetches."""
        return bool(self.missing) and not self.is_short and self.error is None

    def begin(self) -> None:
        """Forget the error of an earlier try."""
        self.error = None


class FileRead:
    """One read of a run of pages.

    Args:
        first, count: the run.
        skip: pages that are read only because they lie between others.
        keep: whether a reader wants its pages kept.

    Attributes:
        is_started: whether the read may have seen the file already. Then later changes make it
            stale.
        is_stale: whether the read is invalid for later readers; they must not join, and no page is
            kept.
        is_kept: whether a reader wants its pages kept.
        data: the buffer with the data, once loaded.
        valid: bytes of data in the buffer.
        wants: the readers that wait.
    """

    def __init__(self, first: int, count: int, skip: Collection[int], *, keep: bool) -> None:
        self.first = first
        self.count = count
        self.skip = frozenset(skip)
        self.is_started = self.is_stale = False
        self.is_kept = keep
        self.data: memoryview | None = None
        self.valid = 0
        self.wants: list[Want] = []

    def covers(self, page: int) -> bool:
        """Say whether a page is in the run."""
        return self.first <= page < self.first + self.count

    def overlaps(self, first: int, last: int) -> bool:
        """Say whether any page from `first` to `last` is in the run."""
        return self.first <= last and first < self.first + self.count

    def load(self, data: memoryview, valid: int, page_size: int, size: int) -> None:
        """Give the data to all waiting readers.

        Args:
            data: the buffer, with room for the whole run.
            valid: bytes that were read. The rest of the last page becomes zeros.
            page_size: bytes in a page.
            size: length of the file.
        """
        end = -(-valid // page_size) * page_size
        data[valid:end] = bytes(end - valid)
        self.data = data
        self.valid = valid
        for want in self.wants:
            self.give(want, page_size, size)
        self.wants.clear()

    def give(self, want: Want, page_size: int, size: int) -> None:
        """Copy to a reader the pages that it misses and this loaded fetch has."""
        assert self.data is not None
        for page in sorted(filter(self.covers, want.missing)):
            at, to = (page - self.first) * page_size, (page - want.first) * page_size
            # Nothing behind the data is valid, even if the file is shorter by now: the buffer has
            # held other pages.
            end = self.first * page_size + self.valid
            if end < min((page + 1) * page_size, size) or end <= page * page_size:
                want.is_short = True
            else:
                want.out[to : to + page_size] = self.data[at : at + page_size]
            want.missing.discard(page)
        want.changed.set()

    def fail(self, error: Exception) -> None:
        """Tell all waiting readers that this read has failed."""
        for want in self.wants:
            want.error = error
            want.is_error_own = want.missing.issuperset(range(self.first, self.first + self.count))
            want.changed.set()
        self.wants.clear()
