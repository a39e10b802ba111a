# SPDX-License-Identifier: GPL-2.0-or-later
"""Ages of the pages in the pool or the cache, measured from their store.

It takes no memory per page, and no work on the page path. Every store has a serial number. From
time to time the newest number is noted. So a page's number tells between which two notes the page
was stored. The notes for an age class are 1/16 of its bound apart, and the number of notes is
bounded.

Limits: recompression counts as a store. A read does not change the age. With a disk behind the
pool, writeback knows when each page was last used.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BOUNDS_S: Final = (60, 600, 3600, 86400)
"""Upper bounds of the age classes in seconds. One more class has all older pages."""
SAMPLE: Final = 1024
"""Pages that are looked up for one answer. It takes 1 ms at most."""
NOTES: Final = 16
_MASK, _HALF = 0xFFFFFFFF, 1 << 31


class Stored(Protocol):
    """A store of pages: `block.device.Device`, or the runs of the cache (core/cache.py)."""

    @property
    def pages(self) -> int:
        """Number of places for pages."""

    def generation(self, number: int) -> int:
        """Return the serial number of a page's store, or 0 if there is no page."""


class StoreAges:
    """The notes of serial numbers over time.

    Args:
        devices: the pages to sample.
        newest: returns the serial number of the last store.
        places: pages that are looked up for one answer.
        clock: seconds since boot; for tests.
    """

    def __init__(
        self,
        devices: Sequence[Stored],
        newest: Callable[[], int],
        *,
        places: int = SAMPLE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices = devices
        self._places = places
        self._newest = newest
        self._clock = clock
        self._notes: list[deque[tuple[float, int]]] = [deque() for _ in BOUNDS_S]
        self._samples = 0

    def look(self) -> None:
        """Take a note if one is due. Call it about once a second."""
        now = self._clock()
        for bound, notes in zip(BOUNDS_S, self._notes, strict=True):
            if not notes or now - notes[-1][0] >= bound / NOTES:
                notes.append((now, self._newest()))
            while len(notes) > 1 and now - notes[1][0] >= bound:
                notes.popleft()

    def remember(self) -> list[list[tuple[float, int]]]:
        """Return the notes for a successor, which has the same clock."""
        return [list(notes) for notes in self._notes]

    def recall(self, left: Iterable[Iterable[tuple[float, int]]]) -> None:
        """Continue with a predecessor's notes."""
        for notes, noted in zip(self._notes, left, strict=False):
            notes.extend((float(at), int(serial)) for at, serial in noted)

    def sample(self) -> tuple[int, ...]:
        """Return the number of pages in each age class, from a sample.

        The sample has every n-th page of each device, and other pages at each call.
        """
        now = self._clock()
        # The newest store older than each bound. A page of unknown age counts as younger.
        marks = [
            (notes[0][1], bound)
            for bound, notes in zip(BOUNDS_S, self._notes, strict=True)
            if notes and now - notes[0][0] >= bound
        ]
        classes = [0] * (len(BOUNDS_S) + 1)
        self._samples += 1
        for device in self._devices:
            stride = max(device.pages * len(self._devices) // self._places, 1)
            for number in range(self._samples % stride, device.pages, stride):
                if generation := device.generation(number):
                    older = max(
                        (bound for serial, bound in marks if (serial - generation) & _MASK < _HALF),
                        default=0,
                    )
                    classes[bisect_right(BOUNDS_S, older)] += 1
        return tuple(classes)
