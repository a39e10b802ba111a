# SPDX-License-Identifier: GPL-2.0-or-later
"""Writeback: which pages leave the pool for the disk, and when.

The least recently used pages go first, and a page that is used again gets a second chance.

Each device has one age byte per page: the *epoch* of its last store or load (core/block/backed.py).
An epoch ends when its uses reach 1/32 of the pool's frames, or after EPOCH_S. The oldest pages go
first, in the order of their offsets. Pages that were swapped out together are neighbours in the
pool and on the disk. So slots go out in long requests, and whole zspages become free. Compaction
packs the rest. A page that is used while its slot is written stays in the pool.

Triggers, in this order:
  1. A command.
  2. Incompressible pages take more memory than they may. Then the oldest of them go, and no others.
  3. The limit of a swap file. Then the oldest pages of this file go (shares.py).
  4. The limit. Writeback begins halfway between accept_threshold_percent and the limit, and ends
     at that percentage.
  5. The reserve is nearly empty.
  6. Age.
For 4 and 5, the oldest pages go of the swap file that is most above its share.
A budget bounds all but commands. Pages of the present epoch stay.

A page that is not in the pool has age 0. Pages on the disk that were read once have an age.

Limits: a successor does not know the ages, so all pages are equally old for it. Same-filled pages
are treated like all others.

Sources of the ideas: zswap's shrinker and accept_threshold_percent, zram's idle marks and its
writeback limit, the multi-generational LRU.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zswapd import counters
from zswapd.core.reclaim.ages import BOUNDS_S, SAMPLE
from zswapd.core.reclaim.shares import Shareholder, Shares

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EPOCHS = 255
EPOCH_S = 60.0
EPOCH_DIVISOR = 32
"""An epoch ends after uses equal to 1/32 of the frames in use."""
IN_FLIGHT = 512
"""Maximum of pages under way."""
PAGES_PER_STEP = 4096
"""Maximum of looks in one step. They take 1 to 2 ms."""
RAW_LOOK = 8
"""Looks that a read of a page's header costs. The header tells whether the page is there or raw."""
EMPTY_LOOK = 16
"""Looks that an epoch without pages costs."""
SCAN_BITS = 13
"""A scan passes over the ages of 8192 other pages in the time of one look."""
DAY_S = 86400.0
_OLDER = bytes([0, *(max(1, age - 128) for age in range(1, 256))])


class Aged(Shareholder, Protocol):
    """A device with ages, such as `block.backed.BackedDevice`."""

    ages: bytearray
    epoch: int
    promotes: bool

    def is_raw(self, number: int) -> bool:
        """Say whether a page is in the pool raw, because it does not compress."""

    def write_back(self, number: int, done: Callable[[bool], None]) -> bool:
        """Begin to write a page back; return False if that is impossible or it is not there."""

    def generation(self, number: int) -> int:
        """Return the serial number of a page's store, or 0 if it is not in the pool."""


@dataclass(frozen=True, slots=True)
class WritebackStatistics:
    """Counters of writeback, by trigger.

    Attributes:
        by_command, by_incompressible, by_file, by_limit, by_reserve, by_age: pages sent, by
            trigger.
        budget_bytes: maximum of bytes a day, 0 for no limit.
        budget_left_bytes: bytes that are left of today's budget.
        budget_stops: times that the budget was used up.
        epochs: epochs that have ended.
        oldest_age_s: seconds since the start of the oldest epoch that has pages in the pool.
        sampled_ages: sampled pages by the time since their last use, in classes that end at
            BOUNDS_S; empty without a sample.
    """

    by_command: int
    by_incompressible: int
    by_file: int
    by_limit: int
    by_reserve: int
    by_age: int
    budget_bytes: int
    budget_left_bytes: int
    budget_stops: int
    epochs: int
    oldest_age_s: float
    sampled_ages: tuple[int, ...]


counters.declare(
    WritebackStatistics,
    cumulative=(
        "by_command by_incompressible by_file by_limit by_reserve by_age budget_stops epochs"
    ),
)


class _Cursor:
    """The position of a search for the oldest pages: an epoch, a device and a page of it."""

    def __init__(self, devices: Sequence[Aged]) -> None:
        self._devices = devices
        self.begin_anew()

    def begin_anew(self) -> None:
        """Return to the start, where the oldest pages are."""
        self.age, self._place, self.position = 1, 0, 0

    @property
    def device(self) -> Aged:
        """The device at the position."""
        return self._devices[self._place]

    def find(self) -> tuple[int, int]:
        """Move behind the next page of this epoch and device, or to the next device or epoch.

        Return the page (-1 for none) and the number of looks. A device whose pages stay off the
        disk has none.
        """
        if self.device.is_kept:
            self._skip()
            return -1, EMPTY_LOOK
        ages, position = self.device.ages, self.position
        number = ages.find(self.age, position)
        if number >= 0:
            self.position = number + 1
            return number, 1 + (number - position >> SCAN_BITS)
        self._skip()
        return -1, EMPTY_LOOK + (len(ages) - position >> SCAN_BITS)

    def _skip(self) -> None:
        """Move to the next device, or to the next epoch."""
        self._place, self.position = self._place + 1, 0
        if self._place >= len(self._devices):
            self.age, self._place = self.age + 1, 0


class Writeback:
    """The choice of pages, and its triggers.

    Args:
        devices: their pages may be written back.
        page_size: bytes in a page.
        used: returns the frames that the pool holds.
        uses: returns a number that grows by one with each store and load.
        raw_pages: returns how many pages are stored raw, each in a frame of its own.
        is_short: says whether the reserve is nearly empty.
        accepts: says whether the disk takes more pages.
        clock: returns seconds; for tests.

    Attributes:
        limit_frames: limit of the pool, in frames.
        raw_limit: maximum number of frames for raw pages.
        accept_percent: how full the pool may be afterwards, in percent of its limit.
        idle_s: pages unused for this many seconds are written back without need; 0 for never.
        budget: maximum of bytes a day, 0 for no limit.
        promotes: whether pages that are read from the disk may return to the pool, while it is not
            nearly full.
        in_flight: pages under way.
        shares: the choice among the swap files.
        is_looking: whether the last step ran out of time before it had seen all candidates.
    """

    def __init__(
        self,
        devices: Sequence[Aged],
        *,
        page_size: int,
        used: Callable[[], int],
        uses: Callable[[], int],
        raw_pages: Callable[[], int],
        is_short: Callable[[], bool],
        accepts: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices = devices
        self._page_size = page_size
        self._used = used
        self._uses = uses
        self._raw_pages = raw_pages
        self._is_short = is_short
        self._accepts = accepts
        self._clock = clock
        self.limit_frames = 0
        self.raw_limit = 1 << 62
        self.accept_percent = 90
        self.idle_s = 0
        self.budget = 0
        self.promotes = True
        self.in_flight = 0
        self.is_looking = False
        self._epoch = 2  # epoch 1 is for the pages of a predecessor
        self._began = [clock()] * (EPOCHS + 1)
        self._uses_before = self._uses_seen = uses()
        self.shares = Shares(devices)
        self._own = [_Cursor([device]) for device in devices]
        self._cursors = {kind: _Cursor(devices) for kind in ("", "incompressible", "oldest")}
        self._is_draining = False
        self._looks_for_raw = True
        self._commanded, self._commanded_kind, self._commanded_age = 0, "", 0.0
        self._sent = dict.fromkeys(
            ("command", "incompressible", "file", "limit", "reserve", "age"), 0
        )
        self._day, self._spent, self._stops, self._epochs = clock(), 0, 0, 0
        self._samples = 0
        self._set_epoch()

    def changed(self) -> None:
        """Begin all searches anew: the list of devices has changed, or the size of one."""
        self._own = [_Cursor([device]) for device in self._devices]
        self.shares.begin_anew()
        self._begin_anew()
        self._set_epoch()

    # Time.

    def look(self) -> bool:
        """End the epoch if it is time; return whether pages are being used.

        Call it a few times a second.
        """
        now, uses = self._clock(), self._uses()
        is_busy, self._uses_seen = uses != self._uses_seen, uses
        step = min(EPOCH_S, self.idle_s / 8) if self.idle_s else EPOCH_S
        if (
            uses - self._uses_before >= max(self._used() // EPOCH_DIVISOR, 64)
            or now - self._began[self._epoch] >= step
        ):
            self._uses_before = uses
            self._next_epoch(now)
        if now - self._day >= DAY_S:
            self._day, self._spent = now, 0
        self._looks_for_raw = True
        self.shares.look()
        # This mark is above the start of writeback. Pages that return must push out colder pages,
        # or the pool would stay as it is.
        has_room = self.promotes and self._used() < (self._start() + self.limit_frames) // 2
        for place, device in enumerate(self._devices):
            device.promotes = has_room and self.shares.has_room(place)
        return is_busy

    def _start(self) -> int:
        """Return the frames at which writeback begins."""
        return self.limit_frames * (100 + self.accept_percent) // 200

    def _next_epoch(self, now: float) -> None:
        if self._epoch == EPOCHS:
            for device in self._devices:
                device.ages[:] = device.ages.translate(_OLDER)
            self._epoch -= 128
            self._began[1 : self._epoch + 1] = self._began[129 : EPOCHS + 1]
            self._begin_anew()
        self._epoch += 1
        self._epochs += 1
        self._began[self._epoch] = now
        self._set_epoch()

    def age_s(self, epoch: int) -> float:
        """Return the seconds since an epoch began.

        The last use of a page of the epoch lies between this start and the start of the next one.
        """
        return self._clock() - self._began[epoch]

    def _begin_anew(self) -> None:
        """Restart the searches at the oldest pages."""
        for cursor in (*self._cursors.values(), *self._own):
            cursor.begin_anew()

    def _set_epoch(self) -> None:
        for device in self._devices:
            device.epoch = self._epoch

    def epoch_before(self, seconds: float) -> int:
        """Return the last epoch that ended at least `seconds` ago, or 0 for none."""
        now = self._clock()
        for epoch in range(self._epoch - 1, 0, -1):
            if now - self._began[epoch + 1] >= seconds:
                return epoch
        return 0

    def mark_idle(self) -> None:
        """Treat all pages as unused for long, until they are used again."""
        table = bytes([0, *([1] * 255)])
        for device in self._devices:
            device.ages[:] = device.ages.translate(table)
        self._begin_anew()
        self._next_epoch(self._clock())

    # The choice.

    def command(self, pages: int, *, incompressible: bool = False, unused_s: float = 0.0) -> None:
        """Write `pages` pages back, the oldest first, the present epoch's included.

        Args:
            pages: how many.
            incompressible: only raw pages.
            unused_s: only pages that were unused for this many seconds. Epochs are coarse: the real
                time is up to EPOCH_S longer.
        """
        self._next_epoch(self._clock())
        self._begin_anew()
        self._commanded, self._commanded_kind = pages, "incompressible" if incompressible else ""
        self._commanded_age = unused_s

    @property
    def commanded(self) -> int:
        """Pages of a command that are not sent yet."""
        return self._commanded

    def wanted(self) -> str:
        """Return the trigger: `command`, `incompressible`, `file`, `limit`, `reserve` or `age`.

        The result is empty if there is no trigger.
        """
        if self._commanded:
            return "command"
        if self.budget and self._spent >= self.budget:
            return ""
        if self._looks_for_raw and self._raw_pages() > self.raw_limit:
            return "incompressible"
        if self.shares.above_limit() >= 0:
            return "file"
        used, low = self._used(), self.limit_frames * self.accept_percent // 100
        if used > self._start():
            self._is_draining = True
        elif used <= low:
            self._is_draining = False
        if self._is_draining or self._is_short():
            return "limit" if self._is_draining else "reserve"
        return "age" if self.idle_s and self._oldest_idle() else ""

    def _oldest_idle(self) -> bool:
        """Say whether pages may exist that were unused for `idle_s`."""
        age = self._cursors[""].age
        return age < self._epoch and self._is_unused(age, self.idle_s)

    def step(self, why: str) -> int:
        """Begin to write back the oldest pages; return how many. The caller kicks the transfers.

        Args:
            why: the result of `wanted`.
        """
        begun = looks = 0
        kind = self._commanded_kind if why == "command" else why if why == "incompressible" else ""
        place = self._client(why)
        most = self._missing(why, place)
        cursor = self._cursors[kind] if place < 0 else self._own[place]
        while (
            looks < PAGES_PER_STEP
            and self.in_flight < min(most, IN_FLIGHT)
            and self._may_go(cursor.age, why)
            and self._accepts()
        ):
            device = cursor.device
            number, cost = cursor.find()
            looks += cost
            if number < 0:
                continue
            if kind:
                looks += RAW_LOOK
                if not device.is_raw(number):
                    continue
            if device.write_back(number, self._done):
                begun += 1
                self.in_flight += 1
                self._note_sent(why)
        self.is_looking = looks >= PAGES_PER_STEP
        is_through = cursor.age >= self._epoch or (
            self._commanded > 0 and not self._is_unused(cursor.age, self._commanded_age)
        )
        if is_through:  # all older pages have been seen
            cursor.begin_anew()
            if not begun:
                self._commanded = 0
                if place >= 0:  # another client may have older pages
                    self.shares.pass_over(place)
                    self.is_looking = True
        if why == "incompressible" and not begun:
            self._looks_for_raw = False  # until the next look, so that other triggers get a turn
        return begun

    def _client(self, why: str) -> int:
        """Return the place of the device whose pages go, or -1 for the oldest pages of all."""
        if why == "file":
            return self.shares.above_limit()
        if why in {"limit", "reserve"} and len(self._devices) > 1:
            return self.shares.above_share()
        return -1

    def _missing(self, why: str, place: int) -> int:
        """Return how many pages must leave at least. No more may be under way.

        A page takes one frame at most, so fewer pages could not free the frames.
        """
        if why == "file":
            over = self._devices[place].object_bytes() - self.shares.low(place)
            return -(-over // self._page_size)
        if why == "limit":
            return self._used() - self.limit_frames * self.accept_percent // 100
        return self._raw_pages() - self.raw_limit if why == "incompressible" else IN_FLIGHT

    def _may_go(self, age: int, why: str) -> bool:
        if age >= self._epoch:
            return False
        if why == "command":
            return self._commanded > 0 and self._is_unused(age, self._commanded_age)
        if self.budget and self._spent >= self.budget:
            return False
        return why != "age" or self._is_unused(age, self.idle_s)

    def _is_unused(self, age: int, seconds: float) -> bool:
        """Say whether an epoch ended at least `seconds` ago."""
        return self._clock() - self._began[age + 1] >= seconds

    def _note_sent(self, why: str) -> None:
        self._sent[why] += 1
        if why == "command":
            self._commanded -= 1
            return
        before = self._spent
        self._spent += self._page_size
        self._stops += bool(self.budget) and before < self.budget <= self._spent

    def _done(self, _has_left: bool) -> None:  # noqa: FBT001 - a callback
        self.in_flight -= 1

    def remember(self) -> dict[str, float]:
        """Return the state that a successor needs."""
        return {"spent": self._spent, "day_s": self._clock() - self._day}

    def recall(self, left: dict[str, float]) -> None:
        """Continue with a predecessor's spent budget."""
        self._spent = int(left.get("spent", 0))
        self._day = self._clock() - left.get("day_s", 0.0)

    def _sample_ages(self) -> tuple[int, ...]:
        """Return the number of pages in each age class: every n-th page, others at each call."""
        classes = [0] * (len(BOUNDS_S) + 1)
        self._samples += 1
        for device in self._devices:
            stride = max(len(device.ages) * len(self._devices) // SAMPLE, 1)
            for number in range(self._samples % stride, len(device.ages), stride):
                if device.ages[number] and device.generation(number):
                    classes[bisect_right(BOUNDS_S, self.age_s(device.ages[number]))] += 1
        return tuple(classes)

    def _oldest(self) -> int:
        """Return the oldest epoch with pages. If time runs out, return one that may have some."""
        cursor, looks = self._cursors["oldest"], 0
        while cursor.age < self._epoch and looks < PAGES_PER_STEP:
            device = cursor.device
            number, cost = cursor.find()
            looks += cost + RAW_LOOK
            if number >= 0 and device.generation(number):
                cursor.position = number  # the next search begins with this page
                break
        return min(cursor.age, self._epoch)

    def statistics(self, *, ages_sampled: bool = True) -> WritebackStatistics:
        """Return a frozen snapshot. It takes 2 ms at most.

        Args:
            ages_sampled: include a sample of ages, which takes up to 1 ms.
        """
        oldest = self._oldest()
        return WritebackStatistics(
            by_command=self._sent["command"],
            by_incompressible=self._sent["incompressible"],
            by_file=self._sent["file"],
            by_limit=self._sent["limit"],
            by_reserve=self._sent["reserve"],
            by_age=self._sent["age"],
            budget_bytes=self.budget,
            budget_left_bytes=max(self.budget - self._spent, 0) if self.budget else 0,
            budget_stops=self._stops,
            epochs=self._epochs,
            oldest_age_s=self._clock() - self._began[oldest],
            sampled_ages=self._sample_ages() if ages_sampled else (),
        )
