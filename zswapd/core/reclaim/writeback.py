# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages leave the pool for the disk, and when.

Least recently used first, with a second chance for what is used again.

Use is told by ages: each device has a byte a page, the *epoch* of its last store or load
(core/block/backed.py). An epoch ends when a thirty-second part of the pool has been used in it, or
after EPOCH_S. The oldest pages go first, in the order of their offsets: what was swapped out
together lies together, in the pool as on the disk, so slots go out in long requests and whole
zspages become free; compaction packs what is left. A page that is used while its slot is being
written stays.

Triggers, in this order: a command; more memory taken by pages that do not compress than they may
have (then the oldest of those go, and no others); the limit, from half of the way between
accept_threshold_percent and all of it until that percentage is reached; the reserve nearly empty;
age. A budget bounds all but commands. Pages of the present epoch stay.

Pages that are not in the pool have no age, 0, but for those on the disk that were read once.

Limits: a successor knows no ages, so to it all pages are equally old. Same-filled pages go like all
others.

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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EPOCHS = 255
EPOCH_S = 60.0
EPOCH_DIVISOR = 32
"""An epoch ends when as many pages were used as 1/32 of the frames in use."""
IN_FLIGHT = 512
"""Most pages on their way at a time."""
PAGES_PER_STEP = 4096
"""Pages that one step looks at, at most: it takes 1 to 2 ms."""
RAW_LOOK = 8
"""What a look at a page's header counts, to see whether it is stored as it is, or there."""
EMPTY_LOOK = 16
"""What an epoch without pages counts."""
SCAN_BITS = 13
"""Ages of 8192 pages that are of no interest are passed over in the time of one look."""
DAY_S = 86400.0
_OLDER = bytes([0, *(max(1, age - 128) for age in range(1, 256))])


class Aged(Protocol):
    """A device as far as it matters here; `block.backed.BackedDevice` is one."""

    ages: bytearray
    epoch: int
    promotes: bool

    def is_raw(self, number: int) -> bool:
        """Say whether a page is in the pool as it is, since it does not compress."""

    def write_back(self, number: int, done: Callable[[bool], None]) -> bool:
        """Begin to write a page back; False if it cannot be, or is not there."""

    def generation(self, number: int) -> int:
        """Return a number above 0 if a page is in the pool, else 0."""


@dataclass(frozen=True, slots=True)
class WritebackStatistics:
    """What was written back, and why.

    Attributes:
        by_command, by_incompressible, by_limit, by_reserve, by_age: pages sent, by trigger.
        budget_bytes: most bytes a day, 0 for no limit.
        budget_left_bytes: what is left of it today.
        budget_stops: times that it was used up.
        epochs: how many have ended.
        oldest_age_s: time since the oldest epoch that has pages of the pool began.
        sampled_ages: pages of a sample by the time since they were used, in classes that end at
            BOUNDS_S; empty if none was taken.
    """

    by_command: int
    by_incompressible: int
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
    cumulative="by_command by_incompressible by_limit by_reserve by_age budget_stops epochs",
)


class _Cursor:
    """How far a search for the oldest pages has come: an epoch, a device, a page of it."""

    def __init__(self, devices: Sequence[Aged]) -> None:
        self._devices = devices
        self.begin_anew()

    def begin_anew(self) -> None:
        """Go to where the oldest pages may be."""
        self.age, self._place, self.position = 1, 0, 0

    @property
    def device(self) -> Aged:
        """Where it is looked next."""
        return self._devices[self._place]

    def find(self) -> tuple[int, int]:
        """Go behind the next page of this epoch and device, or to the next of these.

        Return the page, or -1, and the looks.
        """
        ages, position = self.device.ages, self.position
        number = ages.find(self.age, position)
        if number >= 0:
            self.position = number + 1
            return number, 1 + (number - position >> SCAN_BITS)
        self._place, self.position = self._place + 1, 0
        if self._place == len(self._devices):
            self.age, self._place = self.age + 1, 0
        return -1, EMPTY_LOOK + (len(ages) - position >> SCAN_BITS)


class Writeback:
    """The choice.

    Args:
        devices: whose pages may go.
        page_size: bytes in a page.
        used: returns the frames that the pool holds.
        uses: returns a number that grows by one with each store and load.
        raw_pages: returns how many of its pages are stored as they are, each in a frame of its own.
        is_short: says whether the reserve is nearly empty.
        accepts: says whether the disk takes more.
        clock: seconds, for tests.

    Attributes:
        limit_frames: of the pool.
        raw_limit: frames that pages may take that are stored as they are.
        accept_percent: how full the pool may be afterwards, of its limit.
        idle_s: pages unused for so long go without need; 0 for never.
        budget: bytes a day, 0 for no limit.
        promotes: pages that are read from the disk twice may return, while the pool is not nearly
            full.
        in_flight: pages on their way.
        is_looking: the last step found fewer pages than there may be, since its time was up.
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
        self._epoch = 2  # what a predecessor has left is older than anything now
        self._began = [clock()] * (EPOCHS + 1)
        self._uses_before = self._uses_seen = uses()
        self._cursors = {kind: _Cursor(devices) for kind in ("", "incompressible", "oldest")}
        self._is_draining = False
        self._looks_for_raw = True
        self._commanded, self._commanded_kind, self._commanded_age = 0, "", 0.0
        self._sent = dict.fromkeys(("command", "incompressible", "limit", "reserve", "age"), 0)
        self._day, self._spent, self._stops, self._epochs = clock(), 0, 0, 0
        self._samples = 0
        self._set_epoch()

    # Time.

    def look(self) -> bool:
        """Let an epoch end if it is time, and say whether pages are being used.

        To be called a few times a second.
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
        # Beyond where writeback begins: pages that return have to push out colder ones, or the pool
        # would stay as it is.
        has_room = self.promotes and self._used() < (self._start() + self.limit_frames) // 2
        for device in self._devices:
            device.promotes = has_room
        return is_busy

    def _start(self) -> int:
        """Return how many frames the pool may hold before writeback begins."""
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
        """Return the time since an epoch began.

        A page of it was last used since then, and not since the next one began.
        """
        return self._clock() - self._began[epoch]

    def _begin_anew(self) -> None:
        """Look at the oldest pages next."""
        for cursor in self._cursors.values():
            cursor.begin_anew()

    def _set_epoch(self) -> None:
        for device in self._devices:
            device.epoch = self._epoch

    def epoch_before(self, seconds: float) -> int:
        """Return the last epoch that has been over for so long, 0 for none."""
        now = self._clock()
        for epoch in range(self._epoch - 1, 0, -1):
            if now - self._began[epoch + 1] >= seconds:
                return epoch
        return 0

    def mark_idle(self) -> None:
        """Take all pages for unused since long, until they are used again."""
        table = bytes([0, *([1] * 255)])
        for device in self._devices:
            device.ages[:] = device.ages.translate(table)
        self._begin_anew()
        self._next_epoch(self._clock())

    # What to do.

    def command(self, pages: int, *, incompressible: bool = False, unused_s: float = 0.0) -> None:
        """Have so many pages written back, the oldest first; the present epoch's too.

        Args:
            pages: how many.
            incompressible: only such as are stored as they are.
            unused_s: only such as were not used for so long, as far as epochs tell: up to EPOCH_S
                longer.
        """
        self._next_epoch(self._clock())
        self._begin_anew()
        self._commanded, self._commanded_kind = pages, "incompressible" if incompressible else ""
        self._commanded_age = unused_s

    @property
    def commanded(self) -> int:
        """Pages of a command that are still to be sent."""
        return self._commanded

    def wanted(self) -> str:
        """Return why pages should go now: `command`, `incompressible`, `limit`, `reserve` or `age`.

        Empty for no reason.
        """
        if self._commanded:
            return "command"
        if self.budget and self._spent >= self.budget:
            return ""
        if self._looks_for_raw and self._raw_pages() > self.raw_limit:
            return "incompressible"
        used, low = self._used(), self.limit_frames * self.accept_percent // 100
        if used > self._start():
            self._is_draining = True
        elif used <= low:
            self._is_draining = False
        if self._is_draining:
            return "limit"
        if self._is_short():
            return "reserve"
        return "age" if self.idle_s and self._oldest_idle() else ""

    def _oldest_idle(self) -> bool:
        """Say whether there may be pages that were not used for `idle_s`."""
        age = self._cursors[""].age
        return age < self._epoch and self._is_unused(age, self.idle_s)

    def step(self, why: str) -> int:
        """Begin to write back some of the oldest pages; return how many.

        The transfers are to be kicked then.

        Args:
            why: what `wanted` has returned.
        """
        begun = looks = 0
        most = self._missing(why)
        kind = self._commanded_kind if why == "command" else why if why == "incompressible" else ""
        cursor = self._cursors[kind]
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
        if is_through:  # all that is older has had its turn
            cursor.begin_anew()
            if not begun:
                self._commanded = 0
        if why == "incompressible" and not begun:
            self._looks_for_raw = False  # until the next look: the other triggers have their turn
        return begun

    def _missing(self, why: str) -> int:
        """Return how many pages must leave at least, since none takes more than a frame.

        No more are to be under way.
        """
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
        """Say whether an epoch has been over for so long."""
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
        """Return what a successor has to go on with."""
        return {"spent": self._spent, "day_s": self._clock() - self._day}

    def recall(self, left: dict[str, float]) -> None:
        """Go on with what a predecessor has spent of the budget."""
        self._spent = int(left.get("spent", 0))
        self._day = self._clock() - left.get("day_s", 0.0)

    def _sample_ages(self) -> tuple[int, ...]:
        """Count pages by class of age: one in so many of each device's, others each time."""
        classes = [0] * (len(BOUNDS_S) + 1)
        self._samples += 1
        for device in self._devices:
            stride = max(len(device.ages) * len(self._devices) // SAMPLE, 1)
            for number in range(self._samples % stride, len(device.ages), stride):
                if device.ages[number] and device.generation(number):
                    classes[bisect_right(BOUNDS_S, self.age_s(device.ages[number]))] += 1
        return tuple(classes)

    def _oldest(self) -> int:
        """Return the oldest epoch that has pages; where its time is up, one that may have some."""
        cursor, looks = self._cursors["oldest"], 0
        while cursor.age < self._epoch and looks < PAGES_PER_STEP:
            device = cursor.device
            number, cost = cursor.find()
            looks += cost + RAW_LOOK
            if number >= 0 and device.generation(number):
                cursor.position = number  # the next time it is the first again
                break
        return min(cursor.age, self._epoch)

    def statistics(self, *, ages_sampled: bool = True) -> WritebackStatistics:
        """Return a frozen snapshot, in a millisecond or two at most.

        Args:
            ages_sampled: have a sample of ages too, which takes up to a millisecond.
        """
        oldest = self._oldest()
        return WritebackStatistics(
            by_command=self._sent["command"],
            by_incompressible=self._sent["incompressible"],
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
