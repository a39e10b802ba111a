# SPDX-License-Identifier: GPL-2.0-or-later
"""A device with a slot for each page on the disk behind the pool (backing/).

Where a page's data is, the first of these that applies:

    pool     frontswap has it
    spill    it was refused by the pool and is on its way to its slot; readers get it from the buffer
    slot     the slot map says so
    lost     it has none: an error
    -        it was never written, or was discarded: zeros

Spilling is how a page that the pool refuses is kept: it is *written through*, and its writer is
answered when the slot is written. Writing back is how a page leaves the pool: its slot is written
while it stays where it is, and if it is still the same afterwards, the slot counts and the pool
lets go of it (coherency rule 7).

Order, so that a death at any instruction leaves the old page or the new one: a slot counts only
from when it is written until something newer is anywhere. Hence the pool's copy wins over a slot
that counts (between a store and `clear`, the older one is in the slot; between `enter` and the
drop, the same one), and a slot that counts over a mark of loss.

A page that only a slot has cannot be given out by a plain call. Then `SlotsNeeded` is raised: the
caller has the slots of the range read (`needed`, `Transfers.fetch`), and makes the same call again.
A write that spills says so in the ticket that `begin` gave.

A page that was turned away for want of room is as young as any, and returns when it is read; one
that has left the pool was old, and returns when it is read for the second time: one reader who
comes by once would push out what is used.

Ages: one byte a page, the `epoch` of its last store or load, for whoever chooses what to write
back. Epochs are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.block.device import ADOPTED_PAGES, Device, do_nothing
from zswapd.core.block.state import PageState, pool_state
from zswapd.core.compress.base import RAW
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import RejectReason
from zswapd.errors import BackingError, CorruptedPageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.backing.transfers import Transfers, Write
    from zswapd.core.block.slotmap import SlotMap
    from zswapd.core.frontends.frontswap import Frontswap


POOR: Final = frozenset({RejectReason.COMPRESS_POOR, RejectReason.MEAN_COMPRESS_POOR})
"""Why the pool would refuse the page again."""


class PoorPool(Protocol):
    """A pool that can be told to keep what compresses poorly (core/pam/zv.py)."""

    keep_poor: bool


class SlotsNeeded(Exception):  # noqa: N818 - no failure: the way a synchronous call says "not yet"
    """A page of the range is in its slot only, and has not been read."""


@dataclass(frozen=True, slots=True)
class BackedStatistics:
    """A device's pages on the disk.

    Attributes:
        name: the device.
        bd_count: pages that are in their slots and nowhere else (zram's name).
        written_back_pages: pages that left the pool for their slots.
        promoted_pages: pages that returned to the pool, since they were read again and again.
        written_through_pages: pages that the pool refused and that went there at once.
        kept_pages: pages whose slot was written in vain, since they were changed, let go or used
            meanwhile.
        failed_slots: pages whose slot could not be written.
        bad_slots: pages that came back from their slots damaged or not at all.
    """

    name: str
    bd_count: int
    written_back_pages: int
    promoted_pages: int
    written_through_pages: int
    kept_pages: int
    failed_slots: int
    bad_slots: int


counters.declare(
    BackedStatistics,
    cumulative=(
        "written_back_pages promoted_pages written_through_pages kept_pages failed_slots bad_slots"
    ),
)


class Ticket:
    """What one request still waits for.

    Attributes:
        left: pages on their way to their slots.
        errno: of the first that failed, 0 if none did.
        done: called when none is left; may be set until then.
    """

    def __init__(self) -> None:
        self.left = 0
        self.errno = 0
        self.done: Callable[[], None] | None = None

    def end_one(self, code: int) -> None:
        """Take note that one of them is done."""
        self.left -= 1
        self.errno = self.errno or code
        if not self.left and self.done is not None:
            self.done()


class _Spill:
    """A page on its way to its slot after the pool has refused it."""

    def __init__(self, number: int, checksum: int, ticket: Ticket, age: int) -> None:
        self.number = number
        self.age = age
        self.checksum = checksum
        self.ticket = ticket
        self.is_cancelled = False
        self.write: Write | None = None


class BackedDevice(Device):
    """A device and its slots.

    Args:
        name, size, frontswap, swap_type, page_size, lost, lost_copy: see `Device`.
        slots: which pages are in their slots.
        transfers: how they get there and back.

    Attributes:
        ages: of every page, the epoch of its last use; 0 for what is not in the pool, unless it may
            return there.
        epoch: of what is used now, 1 to 255.
        poor_pool: the pool that takes what compresses poorly if its slot cannot be written; None if
            it is to be refused then.
        promotes: a page that is read from its slot returns to the pool, if that takes it: for the
            second time if it has left the pool since it was old, for the first if there was no room
            for it.
    """

    def __init__(
        self,
        name: str,
        size: int,
        frontswap: Frontswap,
        swap_type: int,
        *,
        page_size: int,
        lost: memoryview | None,
        slots: SlotMap,
        transfers: Transfers,
        lost_copy: memoryview | None = None,
    ) -> None:
        super().__init__(
            name, size, frontswap, swap_type, page_size=page_size, lost=lost, lost_copy=lost_copy
        )
        self._slots = slots
        self._transfers = transfers
        self._spills: dict[int, _Spill] = {}
        self._ticket: Ticket | None = None
        self._page = memoryview(bytearray(page_size))
        self.ages = bytearray(size // page_size)
        self.epoch = 1
        self.poor_pool: PoorPool | None = None
        self.promotes = False
        self._promoted = 0
        self._written_back = self._written_through = self._kept = self._failed_slots = (
            self._bad_slots
        ) = 0

    # Reading.

    def _read_page(self, number: int, out: memoryview) -> None:
        if self._frontswap.load(self.swap_type, number, out):
            self.ages[number] = self.epoch
            return
        spill = self._spills.get(number) if self._spills else None
        if spill is not None and spill.write is not None:
            out[:] = self._transfers.content(spill.write)
        elif self._slots.holds(number):
            self._read_slot(number, out)
        elif self._lost_pages and self._is_lost(number):
            self._raise_lost(number)
        elif self._slots.has_lost_word(number):
            self._mark_lost(number)
            self._bad_slots += 1
            raise CorruptedPageError(
                f"page {number} of {self.name} cannot be found on the backing: what says where it"
                " is was damaged",
                hint="only its reader is hurt; test the machine's memory",
            )
        else:
            out[:] = self._zeros

    def _read_slot(self, number: int, out: memoryview) -> None:
        try:
            page = self._transfers.page(self._slots.base + number)
        except OSError as error:
            self._bad_slots += 1
            raise BackingError(
                f"page {number} of {self.name} cannot be read from the backing: {error.strerror}",
                hint="look at the device and the kernel's log",
            ) from error
        if page is None:
            raise SlotsNeeded
        if not self._slots.is_sound(number, page):
            self._bad_slots += 1
            raise CorruptedPageError(
                f"page {number} of {self.name} came back from the backing changed: its checksum is"
                " wrong",
                hint=(
                    "only its reader is hurt; test the disk, and whether anybody else writes to it"
                ),
            )
        out[:] = page
        if self.unreadable:  # the disk has come back
            self.unreadable.pop(number, None)
        if self.promotes and not self._frontswap.frozen:
            if self.ages[number] and self._frontswap.store(self.swap_type, number, out) is None:
                self._promoted += 1
                reach(crashpoints.SLOT_STALE)
                self._slots.clear(number)
            self.ages[number] = self.epoch

    def _version(self, number: int) -> tuple[int, ...]:
        return *super()._version(number), self._slots.word(number)

    def needed(self, offset: int, length: int, *, edges: bool = False) -> list[int]:
        """Return the slots of a byte range that have pages which are nowhere else.

        Args:
            offset: where it begins.
            length: its bytes.
            edges: only those of its first and last page, if it covers them in part: all that a
                write or discard has to read.
        """
        first, begin = divmod(offset, self._page_size)
        last, end = divmod(offset + length, self._page_size)
        if edges:
            parts = dict.fromkeys(
                number for number, part in ((first, begin), (last, end)) if part
            )  # which may be one page
            numbers = [number for number in parts if self._slots.holds(number)]
        else:
            numbers = self._slots.numbers(first, last + (end > 0))
        return [
            self._slots.base + number
            for number in numbers
            if not self._frontswap.holds(self.swap_type, number)
        ]

    # Writing.

    def begin(self) -> Ticket:
        """Have pages that the pool refuses written through from now on, until `end`.

        Return what counts them.
        """
        self._ticket = Ticket()
        return self._ticket

    def end(self) -> None:
        """Begin to write what was refused; from now on, refusal is refusal again."""
        self._ticket = None
        self._transfers.kick()

    def _write_page(self, number: int, page: memoryview) -> RejectReason | None:
        reason = self._store(number, page)
        if reason is None:
            return None
        if self._ticket is not None and self._spill(
            number, page, self._ticket, 0 if reason in POOR else self.epoch
        ):
            self._refused_writes -= 1
            return None
        if reason in POOR and self.poor_pool is not None:
            self._refused_writes -= 1
            self.poor_pool.keep_poor = True
            try:
                reason = self._store(number, page)
            finally:
                self.poor_pool.keep_poor = False
        return reason

    def _store(self, number: int, page: memoryview) -> RejectReason | None:
        """Put a page into the pool; return None, or why it was refused, as what it then counts as."""
        is_stored = False
        try:
            reason = self._frontswap.store(self.swap_type, number, page)
            is_stored = reason is None
        finally:
            if not is_stored:
                self._let_go(number)
                self._refused_writes += 1
        if reason is None:
            if self._lost_pages:
                reach(crashpoints.STORE_STILL_LOST)
                self._clear_lost(number, number)
            self.ages[number] = self.epoch
            if self._slots.count or self._spills:
                self._supersede(number)
        return reason

    def _supersede(self, number: int) -> None:
        """Take note that the pool has a newer page than the slot."""
        if self._slots.holds(number):
            reach(crashpoints.SLOT_STALE)
            self._slots.clear(number)
        self._cancel(number)

    def _let_go(self, number: int) -> None:
        """Make sure that the older data of a page that was refused is found by nobody."""
        self.ages[number] = 0
        if self._cancel(number):
            self._mark_lost(number)
        if self._slots.holds(number):
            self._mark_lost(number)
            reach(crashpoints.SPILL_MARKED)
            self._slots.clear(number)
            reach(crashpoints.SPILL_CLEARED)

    def _cancel(self, number: int) -> bool:
        """Have the page that is on its way to a slot not count when it is there.

        Return whether there is one.
        """
        spill = self._spills.pop(number, None) if self._spills else None
        if spill is None:
            return False
        spill.is_cancelled = True
        return True

    def _spill(self, number: int, page: memoryview, ticket: Ticket, age: int) -> bool:
        spill = _Spill(number, self._slots.checksum(number, page), ticket, age)

        def done(code: int) -> None:
            self._spilled(spill, code)

        spill.write = self._transfers.write(self._slots.base + number, page, done)
        if spill.write is None:
            return False
        ticket.left += 1
        self._spills[number] = spill
        return True

    def _spilled(self, spill: _Spill, code: int) -> None:
        if not spill.is_cancelled:
            del self._spills[spill.number]
            if code:
                self._failed_slots += 1
            else:
                self._written_through += 1
                self.ages[spill.number] = spill.age
                self._slots.enter(spill.number, spill.checksum)
                reach(crashpoints.SLOT_VALID)
                self._clear_lost(spill.number, spill.number)
        # What was overtaken by a newer page has happened before it, whatever became of the slot.
        spill.ticket.end_one(0 if spill.is_cancelled else code)

    # Writing back.

    def is_raw(self, number: int) -> bool:
        """Say whether the pool has a page as it is, since it does not compress."""
        key = self._frontswap.key_of(self.swap_type, number)
        return key is not None and key.codec == RAW

    def write_back(self, number: int, done: Callable[[bool], None]) -> bool:
        """Have a page of the pool written to its slot, once the transfers are kicked.

        And dropped if it is the same then.

        Args:
            number: the page.
            done: called with whether the page has left the pool.

        Returns:
            False if there is nothing to be written, or not now; `done` is not called then.
        """
        slot = self._slots.base + number
        serial = self._frontswap.generation(self.swap_type, number)
        if not serial:
            self.ages[number] = 0  # not here; it gets an age when it comes
            return False
        if self._transfers.is_writing(slot):
            return False
        try:
            self._frontswap.load(self.swap_type, number, self._page)
        except CorruptedPageError:
            self._note_unreadable(number)
            return False  # stays where it is, for its reader to learn of it
        checksum, age = self._slots.checksum(number, self._page), self.ages[number]

        def written(code: int) -> None:
            done(self._drop(number, serial, checksum, age, code))

        return self._transfers.write(slot, self._page, written) is not None

    def _drop(self, number: int, serial: int, checksum: int, age: int, code: int) -> bool:
        """Let the pool go of a page that is in its slot.

        If it is still the one that was written and nobody wanted it.
        """
        if code:
            self._failed_slots += 1
            return False
        if self._frontswap.generation(self.swap_type, number) != serial or self.ages[number] != age:
            self._kept += 1
            return False
        self._slots.enter(number, checksum)
        reach(crashpoints.SLOT_VALID)
        self._frontswap.invalidate_page(self.swap_type, number)
        reach(crashpoints.WRITEBACK_DROPPED)
        self.ages[number] = 0
        self._written_back += 1
        return True

    # The rest.

    def in_use(self, number: int, epoch: int) -> bool:
        """Say whether a page was used after an epoch, or is being written back as it is."""
        return self.ages[number] > epoch or self._transfers.is_writing(self._slots.base + number)

    def _has_page(self, number: int) -> bool:
        return (
            self._slots.holds(number)
            or number in self._spills
            or self._frontswap.holds(self.swap_type, number)
        )

    def state_of(self, number: int) -> PageState | None:
        """Say where a page's data is.

        And when it was last used if it is in the pool (see `Device.state_of`).
        """
        key = self._frontswap.key_of(self.swap_type, number)
        if key is not None:
            return pool_state(key, self._page_size, self.ages[number])
        if number in self._spills:
            return PageState("writing")
        return PageState("disk") if self._slots.holds(number) else Device.state_of(self, number)

    def _forget(self, first: int, last: int) -> None:
        self._slots.clear_range(first, last)
        reach(crashpoints.DISCARD_SLOTS)
        for number in [number for number in self._spills if first <= number <= last]:
            self._cancel(number)
        for start in range(first, last + 1, self._page_size):  # in parts, for which there is memory
            end = min(start + self._page_size, last + 1)
            self.ages[start:end] = self._zeros[: end - start]

    def adopt(self, *, distrust: bool, alive: Callable[[], None] = do_nothing) -> None:
        """Take over what a dead process has left in the slot map.

        And its marks of loss (see `Device.adopt`).
        """
        self.ages[:] = b"\1" * len(self.ages)  # which of them are in the pool, writeback will see
        for place, number in enumerate(self._slots.numbers()):
            if not place & ADOPTED_PAGES - 1:
                alive()
            if not self._frontswap.holds(self.swap_type, number):
                self.ages[number] = 0
            else:
                self._slots.clear(number)
                reach(crashpoints.TAKEOVER_SLOT)
        for number in self._slots.adopt():
            if not self._frontswap.holds(self.swap_type, number):
                self._mark_lost(number)
                self._bad_slots += 1
        super().adopt(distrust=distrust, alive=alive)

    def backed_statistics(self) -> BackedStatistics:
        """Return a frozen snapshot of what is on the disk."""
        return BackedStatistics(
            name=self.name,
            bd_count=self._slots.count,
            written_back_pages=self._written_back,
            promoted_pages=self._promoted,
            written_through_pages=self._written_through,
            kept_pages=self._kept,
            failed_slots=self._failed_slots,
            bad_slots=self._bad_slots,
        )
