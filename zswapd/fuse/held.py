# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes that wait for memory: a refill of the reserve is under way, and is faster than a refusal.

A write that finds too little memory for all its pages is held before the first of them is stored,
so the older copies stay. Its data is copied to a room that was populated at the start, and the
request is answered after the refill (`DEFERRED`). Meanwhile other requests go on: reads and
discards are served, and later writes are held behind it.

If the room has no place for a write, the request stays in the hook's buffer (`STALLED`), and no
further request is taken until `serve` has made place. A kernel that cannot resend requests (before
Linux 6.9) gets no room: a successor would find only the request in the buffer.

A write that waits for a refill waits for at most `wait_s`. After that it is stored with the memory
that there is, which may evict pages of the cache, or it is refused. Further writes then do not wait
until a refill has brought memory again. A write that waits for the disk behind the pool has no such
limit: the disk answers, or it is in trouble after some seconds (core/backing/health.py).

Invariants: writes are stored in the order of their arrival. Each one is answered exactly once.
A successor needs no list of them, because the kernel resends what was not answered.
"""

from __future__ import annotations

import errno
import math
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from zswapd import counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.memory import StoreMemory

DEFERRED: Final = -errno.EINPROGRESS
"""The result that tells the hook that `reply` will answer; it is DEFERRED in _lowlevel.c."""
STALLED: Final = -errno.EALREADY
"""The result that tells the hook to keep the request; it is STALLED in _lowlevel.c."""
POLL_S: Final = 0.001
"""Time, s, between two looks at the refill while writes are held. It takes 3 to 5 ms for 8 MiB."""
WAITS: Final = 12
"""Buckets of the histogram of waits: bounds of 1, 2, 4, … 1024 ms, and the rest."""


@dataclass(frozen=True, slots=True)
class HeldStatistics:
    """Counts of writes that waited for memory."""

    held: int
    """Writes that were held."""
    stalled: int
    """Times that the room was full, so that no further request was taken."""
    expired: int
    """Writes that waited for the whole time in vain."""
    waiting: int
    """Writes that are held now."""
    counts: tuple[int, ...]
    """Waits of at most 1, 2, 4, … 1024 ms and more than the bound before; the last has no bound."""
    seconds: float
    """Time of all waits."""


counters.declare(HeldStatistics, cumulative="held stalled expired counts seconds")


NONE_HELD = HeldStatistics(0, 0, 0, 0, (0,) * WAITS, 0.0)


@dataclass(slots=True)
class _Held:
    unique: int
    inode: int
    offset: int
    data: memoryview
    begin: float


class HeldWrites:
    """The writes of one session that wait for memory.

    Args:
        memory: says whether there is memory for a write, and wakes the refill.
        write: stores (unique, inode, offset, data); returns the number of bytes, -errno, or
            DEFERRED if it answers by itself.
        wait_s: longest wait of a write in seconds; 0 for no waits.
        room: bytes of the room, a multiple of the page; 0 for no room.
        page_size: bytes of a page.
        unique: returns the kernel's number of the present request; 0 for none.
        reply: sends (unique, errno or 0, payload).
        blame: records the number of the request that is stored, in case it kills this process; 0
            for none.
        resume: makes the hook serve the stalled request.
        clock: returns seconds; for tests.

    Attributes:
        wait_s: as above. It can be set at any time.
    """

    def __init__(
        self,
        memory: StoreMemory,
        write: Callable[[int, int, int, memoryview], int],
        *,
        wait_s: float,
        room: int,
        page_size: int,
        unique: Callable[[], int],
        reply: Callable[[int, int, bytes], None],
        blame: Callable[[int], None],
        resume: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._page_size = page_size
        # Every page is written, because an untouched one would be a fault on the page path.
        self._room = memoryview(bytearray(b"\1") * room)
        self._unique = unique
        self._reply = reply
        self._blame = blame
        self._resume = resume
        self._clock = clock
        self._write = write
        self.wait_s = wait_s
        self._queue: deque[_Held] = deque()
        self._end = 0
        self._stalled_at: float | None = None
        self._wanted = trio.Event()
        self._held = self._stalled = self._expired = 0
        self._counts = [0] * WAITS
        self._seconds = 0.0

    def hold(self, inode: int, offset: int, data: memoryview) -> int:
        """Hold a write if it should wait for memory.

        Returns:
            0 to store it now, DEFERRED if it is held, or STALLED to be called again with the
            same request.
        """
        if not self._queue and not self._memory.is_short(self._pages(len(data))):
            self._end_stall()
            return 0
        return self._hold(inode, offset, data)

    def _end_stall(self) -> None:
        """Note that the stalled write, if there is one, is stored now."""
        if self._stalled_at is not None:
            self._note(self._clock() - self._stalled_at)
            self._stalled_at = None

    def _pages(self, length: int) -> int:
        return length // self._page_size + 2

    def _hold(self, inode: int, offset: int, data: memoryview) -> int:
        unique = self._unique()
        if not unique or (not self._queue and self.wait_s <= 0):
            self._end_stall()
            return 0
        now = self._clock()
        begin, end = self._end, self._end + len(data)
        if end > len(self._room):
            if self._stalled_at is None:
                self._stalled_at = now
                self._stalled += 1
            elif not self._queue and self._is_over(self._stalled_at):
                self._expire()
                if not self._memory.is_short(self._pages(len(data))):
                    self._end_stall()
                    return 0
            self._wake()
            return STALLED
        self._room[begin:end] = data
        begun = now if self._stalled_at is None else self._stalled_at
        self._queue.append(_Held(unique, inode, offset, self._room[begin:end], begun))
        self._stalled_at = None
        self._end = end
        self._held += 1
        self._wake()
        return DEFERRED

    def _is_over(self, begin: float) -> bool:
        """Return whether a write has waited long enough since `begin`."""
        return not self._memory.waits_for_disk and self._clock() - begin >= self.wait_s

    def _wake(self) -> None:
        self._memory.await_refill()
        self._wanted.set()

    def _expire(self) -> None:
        self._expired += 1
        self._memory.give_up()

    def _note(self, seconds: float) -> None:
        whole_ms = max(math.ceil(seconds * 1000), 1)
        self._counts[min((whole_ms - 1).bit_length(), WAITS - 1)] += 1
        self._seconds += seconds

    def serve(self) -> None:
        """Store the held writes for which there is memory, and those that waited long enough."""
        while self._queue:
            first = self._queue[0]
            if self._memory.is_short(self._pages(len(first.data))):
                if not self._is_over(first.begin):
                    self._memory.await_refill()
                    return
                self._expire()
                continue  # to store it, or to have it wait for the disk
            self._queue.popleft()
            self._note(self._clock() - first.begin)
            self._store(first)
        self._end = 0
        if self._stalled_at is not None:
            self._resume()
        if not self._queue and self._stalled_at is None:
            self._memory.end_wait()

    def _store(self, held: _Held) -> None:
        self._blame(held.unique)
        try:
            n = self._write(held.unique, held.inode, held.offset, held.data)
        finally:
            self._blame(0)
        if n == DEFERRED:
            return
        payload = b"" if n < 0 else struct.pack("=II", n, 0)  # struct fuse_write_out
        self._reply(held.unique, max(-n, 0), payload)

    async def run(self) -> None:
        """Serve held writes as memory comes; never return."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while self._queue or self._stalled_at is not None:
                await trio.sleep(POLL_S)
                self.serve()

    def statistics(self) -> HeldStatistics:
        """Return the counters."""
        return HeldStatistics(
            held=self._held,
            stalled=self._stalled,
            expired=self._expired,
            waiting=len(self._queue) + (self._stalled_at is not None),
            counts=tuple(self._counts),
            seconds=self._seconds,
        )
