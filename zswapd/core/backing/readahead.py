# SPDX-License-Identifier: GPL-2.0-or-later
"""Read-ahead of slots, where a file is read in order.

A sequential reader asks for a few pages, waits for the disk, and asks for the next few. The disk is
idle between two requests; a second reader would halve that time. So after READS requests in a row,
the slots behind the last request are read too, one *window* at a time. The next window begins when
less than one window lies ahead of the reader. A request that finds its pages in a buffer is
answered at once, as if the pool had the pages.

Invariants
  - A buffer shows what its slot holds: no slot is written while a reader keeps its buffer
    (transfers.py). core/block/backed.py checks whether the slot counts when it gives the page out.
  - A window delays only the readers of its pages. A write releases the window first
    (`Transfers.before_write`). If the disk is still reading it, the write waits as for any reader.

Limits: one reader per file is followed, the last that began. Read-ahead takes at most half of the
buffers, and none while the device is in trouble. An unused window is dropped at the second `look`
after the last read.

The module is synchronous and has no clock. Source of the idea: the kernel's readahead. Its window
ends at the range that swap asks for (eight pages).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.backing.transfers import SlotRead, Transfers

READS = 3
"""Consecutive requests before read-ahead begins."""


@dataclass(frozen=True, slots=True)
class AheadStatistics:
    """Counters of read-ahead.

    Attributes:
        windows: windows that were begun.
        pages: slots that were requested.
        let_go: windows that were dropped before the reader reached their end.
        held: windows that exist at present.
    """

    windows: int
    pages: int
    let_go: int
    held: int


@dataclass(slots=True, eq=False)
class _Window:
    end: int
    fetch: SlotRead | None = None
    is_there: bool = False
    is_unwanted: bool = False


class Ahead:
    """Read-ahead for one file.

    Args:
        transfers: reads the slots.
        needed: returns the slots of a byte range (offset, length) whose pages are nowhere else.
        size: size of the file in bytes.
        window: bytes that are read at a time.
    """

    def __init__(
        self, transfers: Transfers, needed: Callable[[int, int], list[int]], size: int, window: int
    ) -> None:
        self._transfers = transfers
        self._needed = needed
        self._size = size
        self._window = window
        self._windows: list[_Window] = []
        self._next = -1
        self._followed = 0
        self._end = 0
        self._is_used = False
        self._begun = self._pages = self._let_go = 0
        transfers.before_write.append(self._before_write)

    def note(self, offset: int, length: int) -> None:
        """Record a read that was answered or waits for the disk, and read ahead if it is due.

        Args:
            offset: where the read began, in bytes.
            length: its bytes.
        """
        if offset != self._next:
            self._followed = 0
            self.forget()
        self._next = offset + length
        self._followed += 1
        self._is_used = True
        while self._windows and self._windows[0].end <= offset:
            self._release(self._windows.pop(0))
        if self._followed >= READS and self._end - self._next < self._window:
            self._read_on()

    def _read_on(self) -> None:
        start = max(self._end, self._next)
        self._end = min(start + self._window, self._size)
        slots = self._needed(start, self._end - start) if start < self._end else []
        if not slots or not self._transfers.has_room(len(slots)):
            return
        window = _Window(self._end)
        window.fetch = self._transfers.fetch(slots, partial(self._arrived, window))
        self._windows.append(window)
        self._begun += 1
        self._pages += len(slots)
        self._transfers.kick()

    def _arrived(self, window: _Window) -> None:
        """Keep the pages of a window. Drop a failed one: the reader reads again."""
        assert window.fetch is not None
        window.is_there = True
        try:
            for slot in window.fetch.slots:
                self._transfers.page(slot)
        except OSError:
            window.is_unwanted = True
        if window.is_unwanted:
            self._transfers.end(window.fetch)
            if window in self._windows:
                self._windows.remove(window)

    def _release(self, window: _Window) -> None:
        if window.is_there and window.fetch is not None:
            self._transfers.end(window.fetch)
        window.is_unwanted = True

    def _before_write(self, slot: int) -> None:
        """Drop the windows that contain a slot, because the slot is about to be written."""
        for window in [
            each for each in self._windows if each.fetch is not None and slot in each.fetch.slots
        ]:
            self._windows.remove(window)
            self._let_go += 1
            self._release(window)

    def forget(self) -> None:
        """Drop all windows."""
        self._let_go += len(self._windows)
        while self._windows:
            self._release(self._windows.pop())
        self._end = 0

    def look(self) -> None:
        """Drop the windows if no read came since the last call. Call it at intervals."""
        if not self._is_used:
            self.forget()
        self._is_used = False

    def statistics(self) -> AheadStatistics:
        """Return a frozen snapshot."""
        return AheadStatistics(self._begun, self._pages, self._let_go, len(self._windows))
