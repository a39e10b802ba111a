# SPDX-License-Identifier: GPL-2.0-or-later
"""Transfers between slots and private buffers: ordered, bounded, and known to a successor.

Order. Each slot has one transfer at a time. A write waits for the write before it and for the
readers of the slot. So older data never reaches a slot after newer data. Neighbouring slots that
are requested together go in one request. Readers of one slot share its read.

Memory. Pages are in private buffers, made and touched at the start. A write without a free buffer
is refused at once. A read waits for its turn, and a share of the buffers is reserved for reads
(`READ_SHARE`).

Death. `claims` is memory that outlives the process. It has a word for each write request. The word
is set before the disk can see the request, and cleared after the disk has answered. A thread that
hangs in the kernel outlives its process too, and may still write much later. So a successor writes
none of the slots in the words that it finds, until `release_held` tells it that no such thread
lives. Writes to these slots wait. The kernel sends the dead process's requests again, so nothing is
missing. Threads die within milliseconds unless the device hangs. After STALL_S no more writes for
these slots are accepted.

Faults. `health.py` says when writes are refused. `probe` then tests the device until it works. A
failed read of several slots is repeated for ever smaller halves, one after the other, until the bad
slots are known. So one bad sector costs only its own readers. If the whole device cannot be read,
the rest is given up.

The module is synchronous: `submit` runs a blocking job elsewhere, and reports its end in this
thread.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.backing.health import STALL_S, Health
from zswapd.core.crashpoints import reach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from zswapd.core.backing.store import Slots

CLAIMS = 256
"""Words for write requests."""
RUN_MAX = 256
"""Most slots in one request: 1 MiB of 4 KiB pages."""
READ_SHARE = 4
"""One buffer in READ_SHARE is reserved for reads."""
BAD_IN_A_ROW = 16
"""Slots in a row that cannot be read, on a disk that reads other slots: a stripe of 64 KiB."""
PROMPT_S = 0.2
"""A working disk answers a request within this many seconds."""
_COUNT_BITS = 16


@dataclass(slots=True, eq=False)
class Write:
    """A page on its way to its slot. `Transfers.content` shows it until `done` is called."""

    slot: int
    buffer: int
    done: Callable[[int], None]


@dataclass(slots=True, eq=False)
class _Read:
    """One slot that is being read. It stays until its last reader has ended."""

    slot: int
    buffer: int
    users: list[SlotRead] = field(default_factory=list)
    is_there: bool = False
    errno: int = 0


@dataclass(slots=True, eq=False)
class SlotRead:
    """Slots that are read together.

    Attributes:
        slots: their numbers.
        done: called once all slots have been read or have failed. From then on, until
            `Transfers.end`, `Transfers.page` has the pages.
    """

    slots: tuple[int, ...]
    done: Callable[[], None]
    missing: int = 0


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    """Traffic with the backing, in pages (bd_reads and bd_writes are zram's names).

    Attributes:
        bd_reads, bd_writes: pages read and written.
        read_requests, write_requests: system calls for these pages.
        failed_reads, failed_writes: system calls that failed.
        refused_writes: pages refused: no free buffer, or the slot or the device takes no writes.
        in_flight: requests under way.
        free_buffers: free buffers of one page each; all of them when nothing is under way.
        held_slots: slots that a predecessor's request may still write.
        avoided_slots: slots that are not written again yet, because a write to them failed.
        degraded: whether writes are refused because the device is in trouble.
    """

    bd_reads: int
    bd_writes: int
    read_requests: int
    write_requests: int
    failed_reads: int
    failed_writes: int
    refused_writes: int
    in_flight: int
    free_buffers: int
    held_slots: int
    avoided_slots: int
    degraded: bool


counters.declare(
    TransferStatistics,
    cumulative=(
        "bd_reads bd_writes read_requests write_requests failed_reads failed_writes refused_writes"
    ),
)


class Transfers:
    """All transfers of one store.

    Args:
        store: makes the requests.
        submit: runs a request elsewhere. It later calls its second argument with 0 or an errno, in
            this thread and never at once.
        page_size: bytes in a slot.
        buffers: the result of `store.make_buffers`; at least twice the longest read.
        depth: maximum number of requests under way.
        claims: CLAIMS 64-bit words that outlive the process; without them, private memory.
        clock: returns seconds; for tests.

    Attributes:
        trouble: why writes are refused; empty while the device works.
        buffers: number of buffers, one page each.
        before_write: called with a slot that is about to be written while its read is still held.
    """

    def __init__(
        self,
        store: Slots,
        submit: Callable[[Any, Callable[[int], None]], None],
        *,
        page_size: int,
        buffers: memoryview,
        depth: int = 32,
        claims: memoryview | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._submit = submit
        self._page_size = page_size
        self._depth = depth
        self._clock = clock
        self._claims = claims if claims is not None else memoryview(bytearray(8 * CLAIMS)).cast("Q")
        self._views = [
            buffers[place : place + page_size] for place in range(0, len(buffers), page_size)
        ]
        self.buffers = len(self._views)
        self.before_write: list[Callable[[int], None]] = []
        self._free = list(range(self.buffers))
        self._reads_only = self.buffers // READ_SHARE
        self._ready: deque[Write] = deque()
        self._queues: dict[int, deque[Write]] = {}
        self._reads: dict[int, _Read] = {}
        self._waiting: deque[SlotRead] = deque()
        self._started: dict[int, float] = {}
        self._number = 0
        self._held: set[int] = set()
        for word in self._claims:
            self._held.update(
                range(word >> _COUNT_BITS, (word >> _COUNT_BITS) + (word & (1 << _COUNT_BITS) - 1))
            )
        self._inherited = [place for place, word in enumerate(self._claims) if word]
        self._born = clock()
        self._health = Health(clock)
        self._bd_reads = self._bd_writes = self._read_requests = self._write_requests = 0
        self._failed_reads = self._failed_writes = self._refused = 0

    # Writing.

    @property
    def trouble(self) -> str:
        """Why writes are refused, for display."""
        if len(self._inherited) == len(self._claims):  # no claim is free for a request
            return f"{len(self._inherited)} requests of dead processes still hang"
        return self._health.trouble(min(self._started.values()) if self._started else None)

    def accepts(self, slot: int, *, buffers: int = 0) -> bool:
        """Say whether `write` would take a page for a slot.

        Args:
            slot: its number.
            buffers: number of buffers that the write must leave free.
        """
        if len(self._free) <= self._reads_only + buffers or self.trouble:
            return False
        hangs = slot in self._held and self._clock() - self._born > STALL_S
        return not hangs and not self._health.avoids(slot)

    def is_busy(self, pages: int) -> bool:
        """Say whether writes of `pages` pages should wait for requests that are under way.

        They need not wait if there are buffers for them. They should not if the device is in
        trouble, or if nothing is under way that could free a buffer.
        """
        if len(self._free) - self._reads_only >= pages:
            return False
        is_held = self._inherited and self._clock() - self._born <= STALL_S
        return bool(self._started or is_held) and not self.trouble

    def probe(self) -> None:
        """Test whether a device in trouble works again. Call it at intervals."""
        if self._started or not self._health.is_time_to_probe():
            return
        if self._health.no_space_for:
            self._probe_slots(self._health.no_space_for)
        else:
            writes = not self._health.reads_fail
            self._start(
                self._store.labelling(writes=writes),
                partial(self._health.note_probe, writes=writes),
            )

    def _probe_slots(self, slots: range) -> None:
        """Write to slots whose last write failed.

        No page depends on these slots, and none will while writes are refused.
        """
        place = self._free_claim()
        if (
            place < 0
            or not self._free
            or any(slot in self._queues or slot in self._reads for slot in slots)
        ):
            return
        buffer = self._free.pop()
        # Not zeros: a disk may keep zeros without a block.
        self._views[buffer][:] = b"Z" * self._page_size
        self._queues.update((slot, deque()) for slot in slots)

        def ended(code: int) -> None:
            self._free.append(buffer)
            self._health.note_probe(code, writes=True)
            for slot in slots:
                self._next(slot)

        self._send(place, slots[0], [self._views[buffer]] * len(slots), ended)

    def write(
        self, slot: int, page: bytes | memoryview, done: Callable[[int], None]
    ) -> Write | None:
        """Queue a page for its slot. `kick` begins the write.

        Args:
            slot: its number. Readers must not rely on its older data any more.
            page: its bytes, copied at once.
            done: called with 0 or an errno.

        Returns:
            None if the write is refused (counted). `done` is not called then.
        """
        if not self.accepts(slot):
            self._refused += 1
            return None
        for tell in self.before_write if slot in self._reads else ():
            tell(slot)
        buffer = self._free.pop()
        self._views[buffer][:] = page
        write = Write(slot, buffer, done)
        queue = self._queues.get(slot)
        if queue is not None:
            queue.append(write)
        else:
            self._queues[slot] = deque()
            waits = slot in self._reads or slot in self._held
            (self._queues[slot] if waits else self._ready).append(write)
        return write

    def content(self, write: Write) -> memoryview:
        """Return the page that is being written. It is valid until `done` is called."""
        return self._views[write.buffer]

    def kick(self) -> None:
        """Begin requests, up to `depth` under way."""
        self._admit_fetches()
        while self._ready and len(self._started) < self._depth:
            place = self._free_claim()
            if place < 0:
                return
            run = [self._ready.popleft()]
            while self._ready and len(run) < RUN_MAX and self._ready[0].slot == run[-1].slot + 1:
                run.append(self._ready.popleft())
            self._write_requests += 1
            pages = [self._views[write.buffer] for write in run]
            self._send(place, run[0].slot, pages, partial(self._written, run))

    def _free_claim(self) -> int:
        """Return the index of a free claim, or -1 if predecessors' requests hold all claims."""
        words = self._claims.tolist()
        return words.index(0) if 0 in words else -1

    def _send(
        self, place: int, first: int, pages: Sequence[memoryview], done: Callable[[int], None]
    ) -> None:
        """Begin a write request under a free claim."""
        self._claims[place] = first << _COUNT_BITS | len(pages)
        reach(crashpoints.SLOT_CLAIMED)

        def ended(code: int) -> None:
            reach(crashpoints.SLOT_WRITTEN)
            self._claims[place] = 0
            done(code)

        self._start(self._store.writing(first, pages), ended)

    def _start(self, job: Callable[[], None], done: Callable[[int], None]) -> None:
        self._number += 1
        number = self._number
        self._started[number] = self._clock()

        def ended(code: int) -> None:
            del self._started[number]
            done(code)
            self.kick()

        self._submit(job, ended)

    def _written(self, run: Sequence[Write], code: int) -> None:
        self._health.note_write(range(run[0].slot, run[-1].slot + 1), code)
        self._bd_writes += 0 if code else len(run)
        self._failed_writes += code != 0
        for write in run:
            self._free.append(write.buffer)
            self._next(write.slot)
            write.done(code)

    def _next(self, slot: int) -> None:
        """Start the next write of a slot, or forget the slot if none waits."""
        queue = self._queues.get(slot)
        if queue is None or slot in self._reads:
            return
        if queue:
            self._ready.append(queue.popleft())
        else:
            del self._queues[slot]

    def is_writing(self, slot: int) -> bool:
        """Say whether a write of a slot is under way or waits, a predecessor's included."""
        return slot in self._queues or slot in self._held

    # Reading.

    def fetch(self, slots: Iterable[int], done: Callable[[], None]) -> SlotRead:
        """Queue a read of slots. `kick` begins it.

        A slot that is named twice is read once. After `done`, the caller must pass the result to
        `end`.
        """
        fetch = SlotRead(tuple(sorted(set(slots))), done)
        self._waiting.append(fetch)
        return fetch

    def has_room(self, pages: int) -> bool:
        """Say whether `pages` pages may be read ahead.

        Half of the buffers must stay free, no reader may wait, and the device must work.
        """
        return (
            not self._waiting and len(self._free) >= pages + self.buffers // 2 and not self.trouble
        )

    def _admit_fetches(self) -> None:
        """Begin waiting reads in order, each only when it has all its buffers.

        A read with some of its buffers might wait for ever.
        """
        while self._waiting:
            fetch = self._waiting[0]
            new = [
                slot for slot in fetch.slots if slot not in self._reads and slot not in self._queues
            ]
            if len(new) > len(self._free):
                return
            self._waiting.popleft()
            for slot in fetch.slots:
                read = self._reads.get(slot)
                if read is not None:
                    read.users.append(fetch)
                    fetch.missing += not read.is_there
            for slot in new:
                self._reads[slot] = _Read(slot, self._free.pop(), [fetch])
            fetch.missing += len(new)
            self._begin_reads(new)
            # All pages are there, or they are being written. In the second case `page` returns
            # None, and the reader looks again.
            if not fetch.missing:
                fetch.done()

    def _begin_reads(self, slots: list[int]) -> None:
        run: list[int] = []
        for slot in [*slots, -1]:
            if run and (slot != run[-1] + 1 or len(run) == RUN_MAX):
                self._read([run])
                run = []
            run.append(slot)

    def _read(self, runs: list[list[int]], *, is_readable: bool = False) -> None:
        """Begin to read the last run of a list. The others follow (see `_has_read`)."""
        run = runs.pop()
        self._read_requests += 1
        pages = [self._views[self._reads[slot].buffer] for slot in run]
        self._start(
            self._store.reading(run[0], pages), partial(self._has_read, run, runs, is_readable)
        )

    def _has_read(  # is_readable comes by partial
        self,
        run: list[int],
        left: list[list[int]],
        is_readable: bool,  # noqa: FBT001
        code: int,
    ) -> None:
        """Record the result of a read.

        Args:
            run: its slots.
            left: the parts of a failed run that are still to be read.
            is_readable: whether some part of that run was read. Then bad sectors in a row do not
                mean a broken device.
            code: 0 or an errno.
        """
        self._failed_reads += code != 0
        self._bd_reads += 0 if code else len(run)
        is_readable = (is_readable or not code) and self._health.read_failures < BAD_IN_A_ROW
        if code and len(run) > 1 and (is_readable or not self._health.is_failing):
            half = len(run) // 2
            left += [run[half:], run[:half]]
        else:
            self._health.note_read(code)
            self._end_reads(run, code)
        if left:
            self._read(left, is_readable=is_readable)

    def _end_reads(self, run: list[int], code: int) -> None:
        """Tell the readers that wait for slots."""
        finished: list[SlotRead] = []
        for slot in run:
            read = self._reads[slot]
            read.is_there = True
            read.errno = code
            for fetch in read.users:
                fetch.missing -= 1
                if not fetch.missing:
                    finished.append(fetch)
        for fetch in finished:
            fetch.done()

    def page(self, slot: int) -> memoryview | None:
        """Return the page of a slot, or None if it has not been read or is not held.

        The page is valid until the last `end`.

        Raises:
            OSError: the read failed.
        """
        read = self._reads.get(slot)
        if read is None or not read.is_there:
            return None
        if read.errno:
            raise OSError(read.errno, os.strerror(read.errno))
        return self._views[read.buffer]

    def end(self, fetch: SlotRead) -> None:
        """Release the pages of a read."""
        for slot in fetch.slots:
            read = self._reads.get(slot)
            if read is None or fetch not in read.users:
                continue
            read.users.remove(fetch)
            if not read.users:
                del self._reads[slot]
                self._free.append(read.buffer)
                self._next(slot)

    # Slots that a predecessor may still write.

    @property
    def holds_any(self) -> bool:
        """Whether there are slots that a predecessor may still write."""
        return bool(self._inherited)

    def release_held(self) -> None:
        """Release the held slots: no thread of a predecessor lives any more."""
        for place in self._inherited:
            self._claims[place] = 0
        self._inherited = []
        held, self._held = self._held, set()
        for slot in held:
            self._next(slot)
        self.kick()

    def is_prompt(self) -> bool:
        """Say whether every request under way is younger than PROMPT_S."""
        return not self._started or self._clock() - min(self._started.values()) < PROMPT_S

    def is_idle(self) -> bool:
        """Say whether nothing is under way and nothing waits."""
        return not (self._started or self._ready or self._waiting or self._queues or self._reads)

    def statistics(self) -> TransferStatistics:
        """Return a frozen snapshot."""
        return TransferStatistics(
            bd_reads=self._bd_reads,
            bd_writes=self._bd_writes,
            read_requests=self._read_requests,
            write_requests=self._write_requests,
            failed_reads=self._failed_reads,
            failed_writes=self._failed_writes,
            refused_writes=self._refused,
            in_flight=len(self._started),
            free_buffers=len(self._free),
            held_slots=len(self._held),
            avoided_slots=self._health.avoided_slots(),
            degraded=bool(self.trouble),
        )
