# SPDX-License-Identifier: GPL-2.0-or-later
"""Compresses pages again with a stronger codec when nobody has used them for long.

Slower to read, but they take less memory.

In passes: from the first page of the first device to the last, every page that was stored before
the pass' bound, and (where ages are kept, core/block/backed.py) not used since. A bound is the
serial number that stores had `age_s` ago. A pass begins when there is a new one, a quarter of
`age_s` after the last; or by command, over all that there is.

A page that no codec helps, or not enough, is marked and not tried again as long as it is the same:
the mark is a byte made of its serial number, in memory that outlives the process, so nobody has to
take it away when the page changes. Hence one changed page in 255 may pass for tried.

Time: `step` takes BATCH pages, half a millisecond in which no page is served, and says how long to
wait so that there are no more than `rate` in a second. A page costs about 30 µs.

Limits: a device without a disk behind it keeps no ages, so there "used" is "stored"; a successor's
first bound comes after `age_s`. The reserve is swap's: below half of it nothing is done.

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
PAGES_PER_STEP = 512
"""Pages that one step looks at, at most: it takes 0.5 ms."""
LOOK_S = 40e-6
"""Wait for each of them: going over a pool in which nothing is to be done takes a fortieth of a processor."""
NO_ROOM_S = 1.0
LEAST_PASS_S = 10.0
NOTES = 16
"""Serial numbers noted while `age_s` passes."""
_STEP_BYTES = 1 << 20
_MADV_POPULATE_WRITE = 23
_MASK, _HALF = 0xFFFFFFFF, 1 << 31


def populate_marks(mappings: Iterable[mmap.mmap]) -> None:
    """Take the memory of marks, a mebibyte at a time.

    Raises:
        ArenaError: the system has no memory for them.
    """
    for mapping in mappings:
        for place in range(0, len(mapping), _STEP_BYTES):
            try:
                mapping.madvise(_MADV_POPULATE_WRITE, place, min(_STEP_BYTES, len(mapping) - place))
            except OSError as error:
                if error.errno != errno.EINVAL:  # before Linux 5.14 there is no such advice
                    raise ArenaError(
                        f"no memory for the marks of recompression: {error.strerror}"
                    ) from error


class Recompressible(Protocol):
    """A device as far as it matters here; `block.device.Device` is one."""

    def generation(self, number: int) -> int:
        """Return the serial number of the store that a page is from, 0 for none."""

    def in_use(self, number: int, epoch: int) -> bool:
        """Say whether a page was used after an epoch."""

    def recompress(self, number: int, compressor: Compressor, gain_percent: int) -> int:
        """Keep a page with another codec; return as `Frontswap.recompress`."""


@dataclass(frozen=True, slots=True)
class RecompressionStatistics:
    """What was tried; what came of it is counted by zv.

    Attributes:
        tried: pages compressed again.
        in_vain: of these, those that it did not help enough; they are left alone from then on.
        damaged: pages that could not be read.
        passes: how many have ended.
        running: one is under way.
    """

    tried: int
    in_vain: int
    damaged: int
    passes: int
    running: bool


counters.declare(RecompressionStatistics, cumulative="tried in_vain damaged passes")


class Recompression:
    """The job.

    Args:
        devices: whose pages are looked at.
        tried: the marks of each, a byte a page, in memory that outlives the process.
        compressor: the stronger codec.
        newest: returns the serial number of the last store.
        epoch_before: returns the last epoch that was over so many seconds ago.
        has_room: says whether there is memory for a copy.
        prepare: takes the memory of the marks, and may wait for it; returns other marks to use, or
            None. None if they have it.
        clock: seconds, for tests.

    Attributes:
        age_s: how long pages must not have been used; 0 for only by command.
        rate: most pages a second.
        gain_percent: of its compressed size, what a page has to save at least.
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
        self._devices = devices
        self._marks = tried
        self._compressor = compressor
        self._newest = newest
        self._epoch_before = epoch_before
        self._has_room = has_room
        self._prepare = prepare
        self._clock = clock
        self.age_s = 0
        self.rate = 1000
        self._gain_percent = 10
        self._notes: deque[tuple[float, int]] = deque()
        self._bound = self._last_bound = self._epoch = 0
        self._place = self._number = 0
        self._next_pass = clock()
        self.is_running = False
        self._tried = self._in_vain = self._damaged = self._passes = 0

    @property
    def gain_percent(self) -> int:
        """What a page has to save at least."""
        return self._gain_percent

    @gain_percent.setter
    def gain_percent(self, percent: int) -> None:
        if percent < self._gain_percent and self.is_prepared:  # what was not worthwhile may be now
            for marks in self._marks:
                for place in range(0, len(marks), 4096):
                    marks[place : place + 4096] = bytes(len(marks[place : place + 4096]))
        self._gain_percent = percent

    @property
    def is_prepared(self) -> bool:
        """Whether the marks have their memory."""
        return self._prepare is None

    def prepare(self) -> None:
        """Take the memory of the marks, before the first pass; in any thread, since it may block.

        Raises:
            ArenaError: there is none.
        """
        if self._prepare is not None:
            self._marks = self._prepare() or self._marks
            self._prepare = None

    def abandon(self) -> None:
        """End a pass that cannot be made."""
        self.is_running = False

    def look(self) -> None:
        """Begin a pass if it is time; to be called about once a second."""
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
        """Begin a pass over all pages, however young."""
        self._begin(self._newest(), 1 << 30)

    def _begin(self, bound: int, epoch: int) -> None:
        self._bound, self._epoch = bound, epoch
        self._place = self._number = 0
        self.is_running = True

    def step(self) -> float:
        """Go on with the pass; return the seconds to wait before the next step."""
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
        return max((self._tried - before) / self.rate, looks * LOOK_S)

    def _try(self, device: Recompressible, marks: memoryview, number: int) -> bool:
        """Compress a page again if it is its turn; return False if there was no room."""
        generation = device.generation(number)
        mark = generation % 255 + 1
        if not generation or marks[number] == mark:
            return True
        if (self._bound - generation) & _MASK >= _HALF or device.in_use(number, self._epoch):
            return True
        try:
            outcome = device.recompress(number, self._compressor, self._gain_percent)
        except CorruptedPageError:  # stays where it is, for its reader to learn of it
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
