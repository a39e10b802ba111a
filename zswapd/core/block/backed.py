# SPDX-License-Identifier: GPL-2.0-or-later
"""A device with a slot for each page on the disk behind the pool (backing/).

A page is in the first of these states that applies:

    pool     frontswap has it
    spill    the pool refused it, and it is on its way to its slot; readers get it from the buffer
    slot     the slot map says so
    lost     its data is gone: an error
    -        it was never written, or was discarded: zeros

A *spill* keeps a page that the pool refuses. The page is *written through*: its writer is answered
when the slot is written. *Writeback* moves a page out of the pool. Its slot is written while the
page stays in the pool. If the page is still the same afterwards, the slot counts, and the pool
drops the page (coherency rule 7).

Order: a death at any instruction must leave the old page or the new one. So a slot counts from the
end of its write until newer data exists anywhere. The pool's copy wins over a slot that counts.
Between a store and `clear`, the slot has the older page. Between `enter` and the drop, it has the
same page. A slot that counts wins over a mark of loss.

A plain call cannot return a page that is only in its slot. It raises `SlotsNeeded`. Then the caller
reads the slots of the range (`needed`, `Transfers.fetch`) and repeats the call. A write that
spills reports so in the ticket that `begin` returned.

A page that was refused for lack of room is young, and returns to the pool at its first read. A page
that was written back is old, and returns at its second read. A single pass over old pages would
otherwise push out pages in use.

Ages: one byte per page has the `epoch` of its last store or load. Writeback chooses pages by it.
The caller sets the epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.block.device import ADOPTED_PAGES, Device, do_nothing
from zswapd.core.block.slotmap import SlotMap, slot_map_bytes
from zswapd.core.block.state import PageState, pool_state
from zswapd.core.compress.base import RAW
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import RejectReason
from zswapd.errors import BackingError, CorruptedPageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.backing.transfers import Transfers, Write
    from zswapd.core.frontends.frontswap import Frontswap


POOR: Final = frozenset({RejectReason.COMPRESS_POOR, RejectReason.MEAN_COMPRESS_POOR})
"""Reasons for which the pool would refuse the page again."""


class PoorPool(Protocol):
    """A pool that can be told to keep pages that compress poorly (core/pam/zv.py)."""

    keep_poor: bool


class SlotsNeeded(Exception):  # noqa: N818 - no failure: the way a synchronous call says "not yet"
    """A page of the range is only in its slot, and has not been read."""


@dataclass(frozen=True, slots=True)
class BackedStatistics:
    """A device's pages on the disk.

    Attributes:
        name: the device.
        bd_count: pages that are only in their slots (zram's name).
        written_back_pages: pages that left the pool for their slots.
        promoted_pages: pages that returned to the pool after a read.
        written_through_pages: pages that the pool refused and that were written to their slots.
        kept_pages: pages whose slot was written in vain, because they were changed, freed or used
            meanwhile.
        failed_slots: pages whose slot could not be written.
        bad_slots: pages whose slot was damaged or could not be read.
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
    """The spills that one request waits for.

    Attributes:
        left: pages still on their way to their slots.
        errno: of the first page that failed; 0 if none failed.
        done: called when no page is left; may be set until then.
    """

    def __init__(self) -> None:
        self.left = 0
        self.errno = 0
        self.done: Callable[[], None] | None = None

    def end_one(self, code: int) -> None:
        """Record that one page has been written or has failed."""
        self.left -= 1
        self.errno = self.errno or code
        if not self.left and self.done is not None:
            self.done()


class _Spill:
    """A page on its way to its slot, because the pool refused it."""

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
        slots: the slot map: which pages are in their slots.
        transfers: reads and writes the slots.
        has_slots: the backing has room for its pages. A file that came later has none, and its map
            stays empty.

    Attributes:
        ages: the epoch of every page's last use; 0 for a page that is not in the pool, unless it
            may return there at its next read.
        epoch: the present epoch, 1 to 255.
        poor_pool: the pool that keeps a page that compresses poorly if its slot cannot be written;
            None to refuse the page then.
        promotes: whether a page that is read from its slot returns to the pool. A page that was
            written back returns at its second read, a page that was refused for lack of room at
            its first. The pool may refuse it.
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
        has_slots: bool = True,
    ) -> None:
        super().__init__(
            name, size, frontswap, swap_type, page_size=page_size, lost=lost, lost_copy=lost_copy
        )
        self._slots = slots
        self.has_slots = has_slots
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
                f"page {number} of {self.name} cannot be found on the backing: its slot map"
                " entry was damaged",
                hint="only its reader gets this error; test the machine's memory",
            )
        else:
            out[:] = self._zeros
        self._misses += 1

    def _read_slot(self, number: int, out: memoryview) -> None:
        try:
            page = self._transfers.page(self._slots.base + number)
        except OSError as error:
            self._bad_slots += 1
            raise BackingError(
                f"page {number} of {self.name} cannot be read from the backing: {error.strerror}",
                hint="check the device and the kernel's log",
            ) from error
        if page is None:
            raise SlotsNeeded
        if not self._slots.is_sound(number, page):
            self._bad_slots += 1
            raise CorruptedPageError(
                f"page {number} of {self.name} came back from the backing changed: its checksum is"
                " wrong",
                hint=(
                    "only its reader gets this error; test the disk, and check that no other"
                    " program writes to it"
                ),
            )
        out[:] = page
        self._disk_reads += 1
        if self.unreadable:  # the disk works again
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
        """Return the slots of those pages in a byte range that are only in their slots.

        Args:
            offset: where the range begins.
            length: its bytes.
            edges: only the first and last page, if the range covers them in part. A write or
                discard has to read no other page.
        """
        first, begin = divmod(offset, self._page_size)
        last, end = divmod(offset + length, self._page_size)
        if edges:
            parts = dict.fromkeys(
                number for number, part in ((first, begin), (last, end)) if part
            )  # both may be the same page
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
        """Write refused pages through until `end`, and return the ticket that counts them."""
        self._ticket = Ticket()
        return self._ticket

    def end(self) -> None:
        """Start the writes of refused pages. From here on, a refused page is refused."""
        self._ticket = None
        self._transfers.kick()

    def _write_page(self, number: int, page: memoryview) -> RejectReason | None:
        reason = self._store(number, page)
        if reason is None:
            return None
        if (
            self._ticket is not None
            and not self.is_kept
            and self._spill(number, page, self._ticket, 0 if reason in POOR else self.epoch)
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
        """Put a page into the pool; return None, or the reason of the refusal (counted)."""
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
        """Invalidate the slot and the spill of a page, because the pool has newer data."""
        if self._slots.holds(number):
            reach(crashpoints.SLOT_STALE)
            self._slots.clear(number)
        self._cancel(number)

    def _let_go(self, number: int) -> None:
        """Invalidate the older data of a refused page, and mark the page lost if it had any."""
        self.ages[number] = 0
        if self._cancel(number):
            self._mark_lost(number)
        if self._slots.holds(number):
            self._mark_lost(number)
            reach(crashpoints.SPILL_MARKED)
            self._slots.clear(number)
            reach(crashpoints.SPILL_CLEARED)

    def _cancel(self, number: int) -> bool:
        """Cancel the spill of a page: its slot does not count when written.

        Return whether there was one.
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
        # A cancelled spill succeeds whatever its write did: newer data or a discard overtook it.
        spill.ticket.end_one(0 if spill.is_cancelled else code)

    # Writeback.

    def is_raw(self, number: int) -> bool:
        """Say whether the pool has a page raw, because it does not compress."""
        key = self._frontswap.key_of(self.swap_type, number)
        return key is not None and key.codec == RAW

    def write_back(self, number: int, done: Callable[[bool], None]) -> bool:
        """Queue a page of the pool for its slot. If it is the same after the write, drop it.

        The caller has to kick the transfers.

        Args:
            number: the page.
            done: called with whether the page has left the pool.

        Returns:
            False if the page cannot be written now; `done` is not called then.
        """
        slot = self._slots.base + number
        serial = self._frontswap.generation(self.swap_type, number)
        if not serial:
            self.ages[number] = 0  # not in the pool; a store sets its age
            return False
        if self._transfers.is_writing(slot):
            return False
        try:
            self._frontswap.load(self.swap_type, number, self._page)
        except CorruptedPageError:
            self._note_unreadable(number)
            return False  # it stays in the pool, and its reader gets the error
        checksum, age = self._slots.checksum(number, self._page), self.ages[number]

        def written(code: int) -> None:
            done(self._drop(number, serial, checksum, age, code))

        return self._transfers.write(slot, self._page, written) is not None

    def _drop(self, number: int, serial: int, checksum: int, age: int, code: int) -> bool:
        """Drop a page from the pool after its slot was written, if it was not changed or used."""
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

    # The rest of a device.

    def in_use(self, number: int, epoch: int) -> bool:
        """Say whether a page was used after an epoch, or is being written back."""
        return self.ages[number] > epoch or self._transfers.is_writing(self._slots.base + number)

    def _has_page(self, number: int) -> bool:
        return (
            self._slots.holds(number)
            or number in self._spills
            or self._frontswap.holds(self.swap_type, number)
        )

    def state_of(self, number: int) -> PageState | None:
        """Return where a page's data is, and the epoch of its last use if it is in the pool.

        See `Device.state_of`.
        """
        key = self._frontswap.key_of(self.swap_type, number)
        if key is not None:
            return pool_state(key, self._page_size, self.ages[number])
        if number in self._spills:
            return PageState("writing")
        return PageState("disk") if self._slots.holds(number) else Device.state_of(self, number)

    def resize(self, size: int, lost: memoryview, lost_copy: memoryview) -> None:
        """Set the size of a device without slots.

        See `Device.resize`.
        """
        super().resize(size, lost, lost_copy)
        pages = size // self._page_size
        words = memoryview(bytearray(slot_map_bytes(size, self._page_size)))
        self._slots = SlotMap(words, self._slots.base)
        ages = self.ages[:pages]
        self.ages = ages + bytearray(pages - len(ages))

    def _forget(self, first: int, last: int) -> None:
        self._slots.clear_range(first, last)
        reach(crashpoints.DISCARD_SLOTS)
        for number in [number for number in self._spills if first <= number <= last]:
            self._cancel(number)
        for start in range(first, last + 1, self._page_size):  # in parts: each fits in memory
            end = min(start + self._page_size, last + 1)
            self.ages[start:end] = self._zeros[: end - start]

    def adopt(self, *, distrust: bool, alive: Callable[[], None] = do_nothing) -> None:
        """Take over the slot map and the marks of loss of a dead process (see `Device.adopt`)."""
        self.ages[:] = b"\1" * len(self.ages)  # writeback corrects those that are not in the pool
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
