# SPDX-License-Identifier: GPL-2.0-or-later
"""How long ago pages of the pool or the cache were stored, for who looks at it.

Without a byte a page, and off the page path.

Every store has a serial number. Which was the newest is noted from time to time, so a page's number
says between which notes it came. The notes for each class of age are a sixteenth of its bound
apart, and there are no more than that takes.

Limits: a page that is compressed again counts as stored then. A page that is read keeps its age;
with a disk behind the pool writeback knows when each was last used.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

BOUNDS_S: Final = (60, 600, 3600, 86400)
"""Bounds of the classes that ages are told in; one more class has what is older."""
SAMPLE: Final = 1024
"""Places that are looked at for one answer: a millisecond at most."""
NOTES: Final = 16
_MASK, _HALF = 0xFFFFFFFF, 1 << 31


class Stored(Protocol):
    """What has pages, as far as it matters here.

    `block.device.Device`, or the runs of the cache (core/cache.py).
    """

    @property
    def pages(self) -> int:
        """How many places for pages it has."""

    def generation(self, number: int) -> int:
        """Return the serial number of the store that a page is from, 0 for one that is not there."""


class StoreAges:
    """The notes.

    Args:
        devices: whose pages are told of.
        newest: returns the serial number of the last store.
        places: how many are looked at for one answer.
        clock: seconds since the machine was started, for tests.
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
        """Take a note if it is time; to be called about once a second."""
        now = self._clock()
        for bound, notes in zip(BOUNDS_S, self._notes, strict=True):
            if not notes or now - notes[-1][0] >= bound / NOTES:
                notes.append((now, self._newest()))
            while len(notes) > 1 and now - notes[1][0] >= bound:
                notes.popleft()

    def remember(self) -> list[list[tuple[float, int]]]:
        """Return the notes, for a successor: its clock is the same."""
        return [list(notes) for notes in self._notes]

    def recall(self, left: Iterable[Iterable[tuple[float, int]]]) -> None:
        """Go on with a predecessor's notes."""
        for notes, noted in zip(self._notes, left, strict=False):
            notes.extend((float(at), int(serial)) for at, serial in noted)

    def sample(self) -> tuple[int, ...]:
        """Count pages of a sample by class of age.

        One in so many of each device's, others each time.
        """
        now = self._clock()
        # Of the newest store that is older than each bound; what is not known is younger.
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
