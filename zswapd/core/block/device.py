# SPDX-License-Identifier: GPL-2.0-or-later
"""A block device over one frontswap type. It takes any byte range and stores whole pages.

Swap sends whole pages only, and they pass straight through. A partial page is read, changed and
written. Discards arrive as ranges (2 MiB clusters, the whole device at swapon) and stay ranges. A
page that was never written, or was discarded, reads as zeros.

A page whose overwrite was refused has no copy left, old or new (frontswap's rule). A read of it
must not return zeros, which would be wrong data. So the page is marked *lost* in a bitmap, and its
reader gets an error until the page is written or discarded. The kernel never reads a swap slot
whose write failed. The mark protects all other readers.

The bitmap may lie in memory that outlives the process. A mark is set before the page's last copy is
dropped, and cleared after a new copy exists. So a page without data is marked after a death at any
point. A mark of a page with data means nothing, and `adopt` clears it.

A page whose reader got an error is *unreadable* until its data is replaced or discarded. The device
keeps the page's number to protect the neighbours. The kernel reads ahead several slots in one
request, and the request fails as a whole from its first bad page on. fuse/operations.py answers the
part in front, and worker/merging.py keeps requests apart.

A single bit decides between an error and wrong data. So there are two bitmaps, in different pages
of memory, and a page is lost if either says so. A bit flip can only add an error, and the loss of
one bitmap page costs nothing.

Limits: every range must be inside the device; the FUSE layer cuts requests at its end. At most
UNREADABLE_MAX unreadable pages are kept. That is enough to know that some exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.block.segments import cut
from zswapd.core.block.state import PageState, pool_state
from zswapd.core.crashpoints import reach
from zswapd.core.frontends.frontswap import MAX_OFFSET
from zswapd.core.pam.accounts import NO_LIMIT
from zswapd.errors import CorruptedPageError, DiscardError, LostPageError, ZswapdError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from zswapd.core.compress.base import Compressor
    from zswapd.core.frontends.frontswap import Frontswap
    from zswapd.core.pam.base import RejectReason


UNREADABLE_MAX = 256


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """The traffic of one device.

    Attributes:
        name, size: the device, and its bytes.
        stored_pages: pages in the pool.
        object_bytes: bytes that these take in the pool, with headers. Other bytes of the pool's
            frames belong to no file.
        hits: pages that were read from the pool, also in order to change a part of them.
        disk_reads: pages that were read from the disk behind the pool.
        pages_read, pages_written, pages_discarded: pages since the start. Reads of zeros count.
        partial_reads, partial_writes: pages that were read or written in part.
        refused_writes: requests that were refused in whole or in part (zram's failed_writes).
        failed_reads: requests that met a damaged or lost page (zram's failed_reads).
        lost_pages: pages without data, because an overwrite was refused or memory was damaged.
        limit_bytes: limit of `object_bytes`; 0 for no limit.
        limit_hits: pages that were refused because of that limit.
        weight: its weight against other devices.
    """

    name: str
    size: int
    stored_pages: int
    object_bytes: int
    hits: int
    disk_reads: int
    pages_read: int
    pages_written: int
    pages_discarded: int
    partial_reads: int
    partial_writes: int
    refused_writes: int
    failed_reads: int
    lost_pages: int
    limit_bytes: int
    limit_hits: int
    weight: int


counters.declare(
    DeviceStatistics,
    cumulative=(
        "hits disk_reads pages_read pages_written pages_discarded partial_reads partial_writes"
        " refused_writes failed_reads limit_hits"
    ),
)


ADOPTED_PAGES: Final = 1 << 15
"""Pages between two signs of life in a takeover, a power of two. It takes about 30 ms if every page
has to be looked up.
"""


def lost_bytes(size: int, page_size: int) -> int:
    """Return the bytes of the bitmap of lost pages for a device of `size` bytes: one bit a page."""
    return size // page_size // 8 + 1


def do_nothing() -> None:
    """Do nothing: the default of a callback."""


def _bitmap(given: memoryview | None, length: int) -> memoryview:
    """Return memory for a bitmap: the given memory, or private memory.

    Raises:
        ValueError: the given memory is too short.
    """
    if given is None:
        # bytearray(n) alone is not backed by memory until it is written.
        return memoryview(bytearray(b"\0") * length)
    if len(given) < length:
        raise ValueError(f"{len(given)} bytes are no bitmap of {length} bytes")
    return given[:length]


class Device:
    """A device of `size` bytes.

    Args:
        name: for messages and statistics.
        size: in bytes, a multiple of the page.
        frontswap: stores the pages.
        swap_type: frontswap type of this device; initialised here.
        page_size: bytes in a page.
        lost: memory for the bitmap of lost pages, `lost_bytes` long, backed and locked; private
            memory if None.
        lost_copy: memory for the second bitmap, likewise; an older program leaves none.

    Attributes:
        unreadable: numbers of the unreadable pages, each with the `_version` of its error.
        has_lost_by_damage: whether a takeover has found pages missing (`adopt`), and some of them
            are still lost.
        when_unreadable: called after a page became unreadable.

    Raises:
        ValueError: the size is 0, is not a multiple of the page, or has more pages than an index
            can name; or `lost` or `lost_copy` is too small.
    """

    def __init__(
        self,
        name: str,
        size: int,
        frontswap: Frontswap,
        swap_type: int,
        *,
        page_size: int,
        lost: memoryview | None = None,
        lost_copy: memoryview | None = None,
    ) -> None:
        if size <= 0 or size % page_size or size // page_size - 1 > MAX_OFFSET:
            raise ValueError(
                f"{size} bytes are not a number of {page_size}-byte pages from 1 to"
                f" {MAX_OFFSET + 1}"
            )
        self.name = name
        self.size = size
        self.swap_type = swap_type
        frontswap.init(swap_type, size // page_size, when_losing=self._mark_lost)
        self._frontswap = frontswap
        self._page_size = page_size
        self._zeros = bytes(page_size)
        self._scratch = memoryview(bytearray(page_size))
        self._lost = _bitmap(lost, lost_bytes(size, page_size))
        self._lost_copy = _bitmap(lost_copy, lost_bytes(size, page_size))
        self._lost_pages = 0
        self._misses = self._disk_reads = 0
        self._pages_read = self._pages_written = self._pages_discarded = 0
        self._partial_reads = self._partial_writes = self._refused_writes = self._failed_reads = 0
        self.weight = 100
        self.limit_bytes = NO_LIMIT
        self.is_kept = False
        self.has_slots = False
        self.unreadable: dict[int, tuple[int, ...]] = {}
        self.has_lost_by_damage = False
        self.when_unreadable: Callable[[], object] = do_nothing

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on.

        Raises:
            CorruptedPageError: a page in the range is damaged. `filled` says how many bytes before
                that page are in `out`.
            LostPageError: a page in the range has no data; likewise.
        """
        size = self._page_size
        length = len(out)
        number = offset // size
        start = 0
        misses, disk_reads = self._misses, self._disk_reads
        is_whole = offset % size == 0 and length % size == 0
        try:
            if is_whole:
                for start in range(0, length, size):
                    self._read_page(number, out[start : start + size])
                    number += 1
                self._pages_read += length // size
            else:
                while start < length:
                    start += self._read_part(number, (offset + start) % size, out[start:])
                    number += 1
        except Exception as error:
            if is_whole:  # its pages were not counted as read
                self._misses, self._disk_reads = misses, disk_reads
            if isinstance(error, ZswapdError):  # SlotsNeeded is not one: it is no failure
                self._failed_reads += 1
                error.filled = start
                self._note_unreadable(number)
            raise

    def _read_page(self, number: int, out: memoryview) -> None:
        if not self._frontswap.load(self.swap_type, number, out):
            if self._lost_pages and self._is_lost(number):
                self._raise_lost(number)
            out[:] = self._zeros
            self._misses += 1

    def _read_part(self, number: int, begin: int, out: memoryview) -> int:
        """Read a page from byte `begin` on, as far as `out` has room; return the bytes read."""
        if begin == 0 and len(out) >= self._page_size:
            self._read_page(number, out[: self._page_size])
            self._pages_read += 1
            return self._page_size
        self._read_page(number, self._scratch)
        part = self._scratch[begin : begin + len(out)]
        out[: len(part)] = part
        self._partial_reads += 1
        return len(part)

    def write(self, offset: int, data: memoryview) -> RejectReason | None:
        """Write bytes from `offset` on.

        Returns:
            None when all is stored, or the reason for which a page was refused. Pages before the
                refused page are stored, pages after it are unchanged. The refused page is lost if
                it had data.

        Raises:
            CorruptedPageError, LostPageError: a page that is written in part cannot be read.
        """
        size = self._page_size
        length = len(data)
        if offset % size == 0 and length % size == 0:
            number = offset // size
            for start in range(0, length, size):
                reason = self._write_page(number, data[start : start + size])
                if reason is not None:
                    return reason
                number += 1
            self._pages_written += length // size
            return None
        return self._write_parts(offset, data)

    def _write_page(self, number: int, page: memoryview) -> RejectReason | None:
        """Store a whole page. A refusal or failure may lose the older page (`_mark_lost`)."""
        is_stored = False
        try:
            reason = self._frontswap.store(self.swap_type, number, page)
            is_stored = reason is None
        finally:
            if not is_stored:
                self._refused_writes += 1
        if self._lost_pages and is_stored:
            reach(crashpoints.STORE_STILL_LOST)
            self._clear_lost(number, number)
        return reason

    def _write_parts(self, offset: int, data: memoryview) -> RejectReason | None:
        parts = cut(offset, len(data), self._page_size)
        position = 0
        if parts.head:
            number, begin, end = parts.head
            reason = self._modify(number, begin, data[: end - begin])
            if reason is not None:
                return reason
            position = end - begin
        if parts.first < parts.end:
            whole = (parts.end - parts.first) * self._page_size
            reason = self.write(offset + position, data[position : position + whole])
            if reason is not None:
                return reason
            position += whole
        if parts.tail:
            return self._modify(parts.tail[0], 0, data[position:])
        return None

    def _modify(self, number: int, begin: int, data: memoryview) -> RejectReason | None:
        """Change part of a page."""
        self._read_page(number, self._scratch)
        self._scratch[begin : begin + len(data)] = data
        self._partial_writes += 1
        return self._write_page(number, self._scratch)

    def discard(self, offset: int, length: int) -> None:
        """Discard a byte range. It reads as zeros afterwards.

        Raises:
            CorruptedPageError, LostPageError: a page that is discarded in part cannot be read. The
                rest is discarded.
            DiscardError: there is no room for the remaining part of a page. The whole pages are
                discarded. The other edge is not tried, since a refusal loses its page.
        """
        if not length:
            return
        parts = cut(offset, length, self._page_size)
        if parts.first < parts.end:
            last = parts.end - 1
            self._forget(parts.first, last)
            self._frontswap.invalidate_range(self.swap_type, parts.first, last)
            if self._lost_pages:
                reach(crashpoints.DISCARD_STILL_LOST)
                self._clear_lost(parts.first, last)
            self._pages_discarded += parts.end - parts.first
        self._zero_edges([part for part in (parts.head, parts.tail) if part])

    def _zero_edges(self, edges: list[tuple[int, int, int]]) -> None:
        """Discard parts of pages. A part that cannot be read does not stop the next one."""
        if edges:
            try:
                self._zero_part(*edges[0])
            except (CorruptedPageError, LostPageError):
                self._zero_edges(edges[1:])
                raise
            self._zero_edges(edges[1:])

    def _zero_part(self, number: int, begin: int, end: int) -> None:
        if not self._has_page(number):
            if self._is_lost(number):
                self._raise_lost(number)
            return
        reason = self._modify(number, begin, memoryview(self._zeros)[begin:end])
        if reason is not None:
            raise DiscardError(
                f"part of page {number} of {self.name} cannot be discarded: {reason.name.lower()}"
            )

    def _has_page(self, number: int) -> bool:
        """Say whether a page has data anywhere."""
        return self._frontswap.holds(self.swap_type, number)

    def state_of(self, number: int) -> PageState | None:
        """Return where a page's data is, or None if it has none. This does not count as a use."""
        key = self._frontswap.key_of(self.swap_type, number)
        if key is not None:
            return pool_state(key, self._page_size)
        return PageState("lost") if self._lost_pages and self._is_lost(number) else None

    def _forget(self, first: int, last: int) -> None:
        """Drop copies of pages first..last outside the pool. Called before the pool drops them."""

    def resize(self, size: int, lost: memoryview, lost_copy: memoryview) -> None:
        """Set the size. No page beyond it has data or is lost.

        Args:
            size: bytes, a multiple of the page.
            lost: the new bitmap of lost pages, with the marks (`copy_marks`).
            lost_copy: the second one.
        """
        length = lost_bytes(size, self._page_size)
        self._lost, self._lost_copy = _bitmap(lost, length), _bitmap(lost_copy, length)
        self.size = size
        self._frontswap.resize(self.swap_type, size // self._page_size)

    def copy_marks(self, lost: memoryview, lost_copy: memoryview) -> None:
        """Copy the marks of lost pages into new bitmaps, as far as these reach."""
        shared = min(len(lost), len(self._lost))
        lost[:shared], lost_copy[:shared] = self._lost[:shared], self._lost_copy[:shared]

    def has_data_beyond(self, size: int, most: int) -> bool:
        """Return whether one of `most` pages from byte `size` on has data or is lost."""
        first = size // self._page_size
        pages = range(first, min(first + most, self.pages))
        return any(self._has_page(number) or self._is_lost(number) for number in pages)

    def invalidate(self) -> int:
        """Drop all pages, as swapoff does; return how many pages the pool had."""
        self._forget(0, self.size // self._page_size - 1)
        self._clear_lost(0, self.size // self._page_size - 1)
        return self._frontswap.invalidate_area(self.swap_type)

    # Unreadable pages: not on the page path while there are none.

    def _version(self, number: int) -> tuple[int, ...]:
        """Return a value that changes when a page gets other data, or loses it."""
        return self.generation(number), self._is_lost(number)

    def _note_unreadable(self, number: int) -> None:
        """Remember that a page cannot be read."""
        if number not in self.unreadable and len(self.unreadable) < UNREADABLE_MAX:
            self.unreadable[number] = self._version(number)
            self.when_unreadable()

    def has_unreadable(self) -> bool:
        """Forget unreadable pages that were replaced or discarded; say whether any page is left.

        Pages that are lost by a refused write do not count. The kernel has kept their data, and
        reads no such slot.
        """
        for number in [
            number
            for number, version in self.unreadable.items()
            if version != self._version(number)
        ]:
            del self.unreadable[number]
        self.has_lost_by_damage = self.has_lost_by_damage and self._lost_pages > 0
        return bool(self.unreadable) or self.has_lost_by_damage

    def recall_unreadable(self, numbers: Iterable[int]) -> None:
        """Take over a predecessor's unreadable pages, if they have data or are lost."""
        for number in numbers:
            if 0 <= number < self.pages and (self._has_page(number) or self._is_lost(number)):
                self._note_unreadable(number)

    # For recompression: not on the page path.

    @property
    def pages(self) -> int:
        """Number of pages of the device."""
        return self.size // self._page_size

    def generation(self, number: int) -> int:
        """Return the serial number of a page's store, or 0 if the page is not in the pool."""
        return self._frontswap.generation(self.swap_type, number)

    def pampd_of(self, number: int) -> int:
        """Return where the pool has a page, or 0."""
        return self._frontswap.pampd_of(self.swap_type, number)

    def object_bytes(self) -> int:
        """Return the bytes that the pages of the device take in the pool, with headers."""
        return self._frontswap.object_bytes(self.swap_type)

    def in_use(self, number: int, epoch: int) -> bool:
        """Say whether a page was used after an epoch. A device without ages says no."""
        return False

    def recompress(self, number: int, compressor: Compressor, gain_percent: int) -> int:
        """Keep a page of the pool with another codec (see `Frontswap.recompress`)."""
        return self._frontswap.recompress(self.swap_type, number, compressor, gain_percent)

    # Lost pages: not on the page path while there are none.

    def _is_lost(self, number: int) -> bool:
        return bool((self._lost[number >> 3] | self._lost_copy[number >> 3]) >> (number & 7) & 1)

    def _raise_lost(self, number: int) -> None:
        raise LostPageError(
            f"page {number} of {self.name} has no data: its last write was refused, or memory was"
            " damaged before a takeover",
            hint="write or discard it",
        )

    def _mark_lost(self, number: int) -> None:
        """Mark a page as lost. Called before its data is dropped."""
        if not self._is_lost(number):
            self._lost[number >> 3] |= 1 << (number & 7)
            self._lost_copy[number >> 3] |= 1 << (number & 7)
            self._lost_pages += 1

    def adopt(self, *, distrust: bool, alive: Callable[[], None] = do_nothing) -> None:
        """Take over the marks that a dead process has left in the bitmap.

        Args:
            distrust: the arena was damaged, so pages may be missing without a mark. Then every page
                without data is lost: an error is better than wrong zeros.
            alive: called once for every ADOPTED_PAGES pages.
        """
        pages = self.size // self._page_size
        lost, copy = self._lost, self._lost_copy
        for place in range(len(lost)):
            if not place << 3 & ADOPTED_PAGES - 1:
                alive()
            marks = lost[place] | copy[place]
            if not marks and not distrust:
                continue
            for number in range(place << 3, (place << 3) + 8):
                if number >= pages or self._has_page(number):
                    marks &= ~(1 << (number & 7))
                elif distrust:
                    self.has_lost_by_damage = True
                    marks |= 1 << (number & 7)
            lost[place] = copy[place] = marks
        self._lost_pages = self._count_lost()

    def _clear_lost(self, first: int, last: int) -> None:
        """Clear the marks of pages first..last: they have data, or may read as zeros."""
        if not self._lost_pages:
            return
        number = first
        while number <= last:
            if number & 7 == 0 and number + 7 <= last:
                self._lost_pages -= (
                    self._lost[number >> 3] | self._lost_copy[number >> 3]
                ).bit_count()
                self._lost[number >> 3] = self._lost_copy[number >> 3] = 0
                number += 8
                continue
            if self._is_lost(number):
                self._lost[number >> 3] &= ~(1 << (number & 7))
                self._lost_copy[number >> 3] &= ~(1 << (number & 7))
                self._lost_pages -= 1
            number += 1
        if self._lost_pages <= 0:
            # Recount before marks are ignored. Damage may have set a mark that was cleared and
            # counted here, while a real mark is left.
            self._lost_pages = self._count_lost()

    def _count_lost(self) -> int:
        """Return how many pages are marked. It copies one page of the bitmap at a time."""
        count = 0
        for start in range(0, len(self._lost), self._page_size):
            one = self._lost[start : start + self._page_size].tobytes()
            other = self._lost_copy[start : start + self._page_size].tobytes()
            if one.count(0) < len(one) or other.count(0) < len(other):
                count += (
                    int.from_bytes(one, "little") | int.from_bytes(other, "little")
                ).bit_count()
        return count

    def statistics(self) -> DeviceStatistics:
        """Return a frozen snapshot."""
        return DeviceStatistics(
            name=self.name,
            size=self.size,
            stored_pages=self._frontswap.pages(self.swap_type),
            object_bytes=self.object_bytes(),
            hits=self._pages_read + self._partial_reads + self._partial_writes - self._misses,
            disk_reads=self._disk_reads,
            pages_read=self._pages_read,
            pages_written=self._pages_written,
            pages_discarded=self._pages_discarded,
            partial_reads=self._partial_reads,
            partial_writes=self._partial_writes,
            refused_writes=self._refused_writes,
            failed_reads=self._failed_reads,
            lost_pages=self._lost_pages,
            limit_bytes=self.limit_bytes if self.limit_bytes < NO_LIMIT else 0,
            limit_hits=self._frontswap.limit_hits(self.swap_type),
            weight=self.weight,
        )
