# SPDX-License-Identifier: GPL-2.0-or-later
"""Recompression of pages that were unused for long, with a stronger codec.

The pages then take less memory, but take longer to read.

The work is done in passes, from the first page of the first device to the last. A pass takes every
page that was stored before its bound. Where ages are kept (core/block/backed.py), the page must
also be unused since. The bound is the newest serial number of `age_s` ago. A pass begins when there
is a new bound, and at the earliest `age_s` / 4 and LEAST_PASS_S after the start of the last pass. A
command begins a pass over all pages.

A page that gains too little is marked, and is not tried again while it stays the same. The mark is
one byte, made of the page's serial number, in memory that outlives the process. A changed page has
another number, so the mark need not be cleared. One changed page in 255 wrongly counts as tried.

Time: `step` takes BATCH pages. No page is served for that time, 0.5 ms. `step` returns the wait
that keeps the rate at RATE. One page takes about 30 µs.

Limits: a device without a disk behind it keeps no ages, so its pages count as used at their store.
The first bound of a successor comes after `age_s`. The reserve is for swap: below half of its
target, recompression stops.

Source of the idea: zram's recompression (idle pages, threshold, incompressible pages left alone).
"""

from __future__ import annotations

import errno
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zswapd import counters
from zswapd.core.pam.base import NO_NEED, NO_ROOM
from zswapd.errors import ArenaError, CorruptedPageError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable, Sequence

    from zswapd.core.compress.base import Compressor

STRONGER = "zstd"
"""Codec of recompressed pages."""
BATCH = 16
RATE = 1000
"""Maximum of pages that are recompressed in a second: 3 % of a processor."""
GAIN_PERCENT = 10
"""Minimum gain, in percent of a page's compressed size. zstd takes three times as long to read."""
PAGES_PER_STEP = 512
"""Maximum of pages that one step looks at. It takes 0.5 ms."""
LOOK_S = 40e-6
"""Wait for each page that is looked at, in seconds. A pass over a pool with nothing to do takes
1/40 of a processor.
"""
NO_ROOM_S = 1.0
LEAST_PASS_S = 10.0
NOTES = 16
"""Serial numbers that are noted in `age_s`."""
_STEP_BYTES = 1 << 20
_MADV_POPULATE_WRITE = 23
_MASK, _HALF = 0xFFFFFFFF, 1 << 31


def populate_marks(mappings: Iterable[mmap.mmap]) -> None:
    """Populate the memory of the marks, 1 MiB at a time.

    Raises:
        ArenaError: the system has no memory for the marks.
    """
    for mapping in mappings:
        for place in range(0, len(mapping), _STEP_BYTES):
            try:
                mapping.madvise(_MADV_POPULATE_WRITE, place, min(_STEP_BYTES, len(mapping) - place))
            except OSError as error:
                if error.errno != errno.EINVAL:  # Linux before 5.14 does not know this advice
                    raise ArenaError(
                        f"no memory for the marks of recompression: {error.strerror}"
                    ) from error


class Recompressible(Protocol):
    """A device whose pages can be recompressed, such as `block.device.Device`."""

    def generation(self, number: int) -> int:
        """Return the serial number of a page's store, or 0 if there is no page."""

    def in_use(self, number: int, epoch: int) -> bool:
        """Say whether a page was used after an epoch."""

    def recompress(self, number: int, compressor: Compressor, gain_percent: int) -> int:
        """Keep a page with another codec; return as `Frontswap.recompress` does."""


@dataclass(frozen=True, slots=True)
class RecompressionStatistics:
    """Counters of the tries. zv counts their results.

    Attributes:
        tried: pages compressed again.
        in_vain: tried pages with too small a gain. They are not tried again.
        damaged: pages that could not be read.
        passes: passes that have ended.
        running: whether a pass is under way.
    """

    tried: int
    in_vain: int
    damaged: int
    passes: int
    running: bool


counters.declare(RecompressionStatistics, cumulative="tried in_vain damaged passes")


class Recompression:
    """The recompression of one set of devices.

    Args:
        devices: their pages are recompressed.
        tried: the marks of each device, one byte a page, in memory that outlives the process.
        compressor: the stronger codec.
        newest: returns the serial number of the last store.
        epoch_before: returns the last epoch that ended at least the given seconds ago.
        has_room: says whether there is memory for a copy.
        prepare: populates the memory of the marks; may block. It returns new marks to use, or None
            to keep the old ones. None instead of a function if the marks are populated.
        clock: returns seconds; for tests.

    Attributes:
        age_s: seconds for which a page must be unused; 0 for recompression by command only.
    """

    def __init__(
        self,
        devices: Sequence[Recompressible],
        tried: Sequence[memoryview],
        compressor: Compressor,
        *,
        newest: Callable[[], int],
        epoch_before: Callable[[float], int],
        has_room: Callable[[], bool],
        prepare: Callable[[], Sequence[memoryview] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices = list(devices)
        self._marks = list(tried)
        self._compressor = compressor
        self._newest = newest
        self._epoch_before = epoch_before
        self._has_room = has_room
        self._prepare = prepare
        self._unprepared: list[tuple[Recompressible, Callable[[], None]]] = []
        self._clock = clock
        self.age_s = 0
        self._notes: deque[tuple[float, int]] = deque()
        self._bound = self._last_bound = self._epoch = 0
        self._place = self._number = 0
        self._next_pass = clock()
        self.is_running = False
        self._tried = self._in_vain = self._damaged = self._passes = 0

    @property
    def is_prepared(self) -> bool:
        """Whether the memory of the marks is populated."""
        return self._prepare is None and not self._unprepared

    def prepare(self) -> None:
        """Populate the marks before the first pass. It may block, and may run in any thread.

        Raises:
            ArenaError: the system has no memory for the marks.
        """
        if self._prepare is not None:
            self._marks[:] = self._prepare() or self._marks
            self._prepare = None
        while self._unprepared:
            self._unprepared[-1][1]()
            self._unprepared.pop()

    def add(self, device: Recompressible, marks: memoryview, prepare: Callable[[], None]) -> None:
        """Recompress a further device from the next pass on.

        Args:
            device: the device.
            marks: its marks, all zeros.
            prepare: populates their memory; may block.
        """
        self._devices.append(device)
        self._marks.append(marks)
        self._unprepared.append((device, prepare))

    def remove(self, device: Recompressible) -> None:
        """Leave a device out; a pass under way ends."""
        place = self._devices.index(device)
        del self._devices[place], self._marks[place]
        self._unprepared = [row for row in self._unprepared if row[0] is not device]
        self.abandon()

    def abandon(self) -> None:
        """Cancel the pass."""
        self.is_running = False

    def look(self) -> None:
        """Begin a pass if one is due. Call it about once a second."""
        now = self._clock()
        if not self.age_s:
            self._notes.clear()
            return
        if not self._notes or now - self._notes[-1][0] >= self.age_s / NOTES:
            self._notes.append((now, self._newest()))
        while len(self._notes) > 1 and now - self._notes[1][0] >= self.age_s:
            self._notes.popleft()
        noted, bound = self._notes[0]
        if (
            now - noted >= self.age_s
            and bound != self._last_bound
            and now >= self._next_pass
            and not self.is_running
        ):
            self._last_bound = bound
            self._next_pass = now + max(self.age_s / 4, LEAST_PASS_S)
            self._begin(bound, self._epoch_before(self.age_s))

    def command(self) -> None:
        """Begin a pass over all pages of any age."""
        self._begin(self._newest(), 1 << 30)

    def _begin(self, bound: int, epoch: int) -> None:
        self._bound, self._epoch = bound, epoch
        self._place = self._number = 0
        self.is_running = True

    def step(self) -> float:
        """Continue the pass; return the seconds to wait before the next step."""
        before, looks = self._tried, 0
        while self.is_running and looks < PAGES_PER_STEP and self._tried - before < BATCH:
            if not self._has_room():
                return NO_ROOM_S
            looks += 1
            if self._place == len(self._devices):
                self.is_running = False
                self._passes += 1
                break
            if self._number == len(self._marks[self._place]):
                self._place, self._number = self._place + 1, 0
                continue
            self._number += 1
            if not self._try(
                self._devices[self._place], self._marks[self._place], self._number - 1
            ):
                return NO_ROOM_S
        return max((self._tried - before) / RATE, looks * LOOK_S)

    def _try(self, device: Recompressible, marks: memoryview, number: int) -> bool:
        """Recompress a page if it is due; return False if there was no room."""
        generation = device.generation(number)
        mark = generation % 255 + 1
        if not generation or marks[number] == mark:
            return True
        if (self._bound - generation) & _MASK >= _HALF or device.in_use(number, self._epoch):
            return True
        try:
            outcome = device.recompress(number, self._compressor, GAIN_PERCENT)
        except CorruptedPageError:  # the page stays, and its reader gets the error
            self._damaged += 1
            marks[number] = mark
            return True
        if outcome == NO_ROOM:
            return False
        if outcome != NO_NEED:
            self._tried += 1
            self._in_vain += not outcome
        if outcome <= 0:
            marks[number] = mark
        return True

    def statistics(self) -> RecompressionStatistics:
        """Return a frozen snapshot."""
        return RecompressionStatistics(
            tried=self._tried,
            in_vain=self._in_vain,
            damaged=self._damaged,
            passes=self._passes,
            running=self.is_running,
        )
