# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads slots before they are asked for, where a file is read in order.

A reader in order asks for a few pages, waits for the disk, and asks for the next few: with two of
him the disk would have half as much to wait for. So when READS requests have followed one another,
the slots behind the last one are read too, a *window* of them at a time, the next as soon as less
than a window lies before him. What he asks for then is in a buffer, and his request is answered at
once, as if the pool had the page.

Invariants
  - What a buffer shows is what the slot holds: no slot is written while somebody holds what was
    read of it (transfers.py). Whether the slot counts is asked when the page is given out, as ever
    (core/block/backed.py).
  - Nobody waits for a window but who reads its pages: a write lets go of it first
    (`Transfers.before_write`), unless the disk is still at it, and then waits as for any reader.

Limits: one reader a file is followed, the last who began. At most half of the buffers, none while
the device is in trouble. A window that nobody uses is let go of at the second `look` after the last
read.

Synchronous, without a clock. Source of the idea: the kernel's readahead, whose window ends at what
swap asks for (eight pages).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.backing.transfers import SlotRead, Transfers

READS = 3
"""Requests that have followed one another before anything is read ahead of them."""


@dataclass(frozen=True, slots=True)
class AheadStatistics:
    """What was read ahead.

    Attributes:
        windows: how often.
        pages: slots that were asked for.
        let_go: windows that were given up before their reader came by their end.
        held: windows there are now.
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
    """The reader of one file.

    Args:
        transfers: how slots are read.
        needed: returns the slots of a byte range (offset, length) whose pages are nowhere else.
        size: of the file, bytes.
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
        """Take note of a read that was answered or waits for the disk.

        And read ahead of it if there is a reason to.

        Args:
            offset: where it began.
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
        """Keep what was read; what could not be is read again by whoever asks for it.

        And fails for him.
        """
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
        """Let go of the windows that a slot lies in, which is about to be written."""
        for window in [
            each for each in self._windows if each.fetch is not None and slot in each.fetch.slots
        ]:
            self._windows.remove(window)
            self._let_go += 1
            self._release(window)

    def forget(self) -> None:
        """Let go of all that was read ahead."""
        self._let_go += len(self._windows)
        while self._windows:
            self._release(self._windows.pop())
        self._end = 0

    def look(self) -> None:
        """Let go of what a reader has left who comes no more; to be called now and then."""
        if not self._is_used:
            self.forget()
        self._is_used = False

    def statistics(self) -> AheadStatistics:
        """Return a frozen snapshot."""
        return AheadStatistics(self._begun, self._pages, self._let_go, len(self._windows))
