# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads of a backing file that are under way, and who waits for them.

Several readers of one page share one read.

A fetch goes through: waiting for a buffer, reading, loaded (its data lies in the buffer, readers
have theirs), kept (its pages are in cleancache), gone. What is invalidated while it reads or is
loaded makes it stale: whoever asked before may have either version, but nobody who asks later may
join it, and its pages are not kept.

Plain bookkeeping of the event loop's thread; volume.py does the reading.
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

    Attributes:
        missing: pages that no fetch has brought yet.
        error: what a fetch has failed with.
        is_error_own: that fetch had only pages that are missing here.
        is_short: the file ended before a page that was wanted.
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
        """Whether there is reason to wait for fetches."""
        return bool(self.missing) and not self.is_short and self.error is None

    def begin(self) -> None:
        """Forget what an earlier try has failed with."""
        self.error = None


class FileRead:
    """One read of a run of pages.

    Args:
        first, count: the run.
        skip: pages in it that are read only because they lie between others.

    Attributes:
        is_started: the read may have seen the file already, so what changes from now on makes it
            stale.
        is_stale: nobody may join it, and nothing of it is kept.
        is_kept: somebody wants its pages kept.
        data: the buffer with what was read, once it is loaded.
        valid: bytes in it.
        wants: those who wait.
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
        """Give what was read to everybody who waits.

        Args:
            data: the buffer, room for the whole run.
            valid: bytes of it that were read; what is behind them in the last page becomes zeros.
            page_size: bytes.
            size: of the file: where it may end.
        """
        end = -(-valid // page_size) * page_size
        data[valid:end] = bytes(end - valid)
        self.data = data
        self.valid = valid
        for want in self.wants:
            self.give(want, page_size, size)
        self.wants.clear()

    def give(self, want: Want, page_size: int, size: int) -> None:
        """Copy to a reader what it misses and this loaded fetch has."""
        assert self.data is not None
        for page in sorted(filter(self.covers, want.missing)):
            at, to = (page - self.first) * page_size, (page - want.first) * page_size
            # Behind what was read there is nothing, however short the file is by now: the buffer
            # has held other pages.
            end = self.first * page_size + self.valid
            if end < min((page + 1) * page_size, size) or end <= page * page_size:
                want.is_short = True
            else:
                want.out[to : to + page_size] = self.data[at : at + page_size]
            want.missing.discard(page)
        want.changed.set()

    def fail(self, error: Exception) -> None:
        """Tell everybody who waits that this read has failed."""
        for want in self.wants:
            want.error = error
            want.is_error_own = want.missing.issuperset(range(self.first, self.first + self.count))
            want.changed.set()
        self.wants.clear()
