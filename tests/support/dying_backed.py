# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that die at a crash point while pages are on a disk, and on their way there.

The disk is memory that outlives the processes. While a write is under way, its slots contain
garbage; they keep it if the process dies. A dead process's write may reach the disk at any time
while its claim stands. So the successor here overwrites the claimed slots before it frees them.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests.support.dying import PAGES, REFUSED, STORED, Op, Process, World
from tests.support.strategies import page
from zswapd.core import compress
from zswapd.core.backing.store import make_buffers
from zswapd.core.backing.transfers import CLAIMS, Transfers
from zswapd.core.block.backed import SlotsNeeded
from zswapd.core.core import Core, Inherited
from zswapd.core.disk import CoreDisk
from zswapd.core.sizing import slot_map_sizes
from zswapd.errors import BackingError, LostPageError


@functools.cache
def _longest_zsize(kind: str, seed: int, page_size: int) -> int:
    """Return the size in bytes of a page with the codec that compresses it worst."""
    return max(
        len(codec.compress(memoryview(page(kind, seed, page_size))))
        for codec in compress.by_codec().values()
    )


class _Disk:
    """The slots in shared memory, and the waiting requests of this process."""

    def __init__(self, memory: memoryview, page_size: int) -> None:
        self._memory = memory
        self._size = page_size
        self.waiting: list[tuple[Any, Callable[[int], None]]] = []
        self.failing = 0

    def read(self, first: int, pages: Sequence[memoryview]) -> None:
        for slot, one in enumerate(pages, first):
            one[:] = self._memory[slot * self._size : (slot + 1) * self._size]

    def write(self, first: int, pages: Sequence[memoryview]) -> None:
        for slot, one in enumerate(pages, first):
            self._memory[slot * self._size : (slot + 1) * self._size] = one

    def reading(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        return partial(self.read, first, pages)

    def writing(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        return partial(self.write, first, pages)

    def labelling(self, *, writes: bool) -> Callable[[], None]:
        return partial(self.read, 0, [])

    def spoil(self, first: int, count: int) -> None:
        self._memory[first * self._size : (first + count) * self._size] = b"\xba" * (
            count * self._size
        )

    def submit(self, job: Any, done: Callable[[int], None]) -> None:
        first, pages = job.args
        if job.func == self.write:
            self.spoil(first, len(pages))
        self.waiting.append((job, done))

    def finish(self, place: int = 0) -> None:
        job, done = self.waiting.pop(place)
        if not self.failing:
            job()
        done(self.failing)


class BackedWorld(World):
    """The memory that outlives processes with a backing."""

    def __init__(self, kind: str, page_size: int) -> None:
        super().__init__(kind, page_size)
        (length,) = slot_map_sizes(self.config).values()
        self._map = memoryview(mmap.mmap(-1, length))
        self._slots = memoryview(mmap.mmap(-1, PAGES * page_size))
        self._claims = memoryview(mmap.mmap(-1, 8 * CLAIMS)).cast("Q")

    def may_write_through(self, kind: str, seed: int) -> bool:
        return _longest_zsize(kind, seed, self.size) > self.size // 8 * 5

    def take_over(self) -> Core:
        self.disk = _Disk(self._slots, self.size)
        self.transfers = Transfers(
            self.disk,
            self.disk.submit,
            page_size=self.size,
            buffers=make_buffers(64 * self.size, self.size),
            claims=self._claims,
        )
        backing = CoreDisk(self.transfers, {"swap": self._map})
        return Core(
            self.config, inherited=Inherited(self.arena.fd, {"swap": self.lost}), backing=backing
        )

    def late_writes(self) -> None:
        """Make the writes of dead processes reach the disk, and free their slots."""
        for word in self._claims if self.transfers.holds_any else ():
            if word:
                self.disk.spoil(word >> 16, word & 0xFFFF)
        self.transfers.release_held()

    def process(self, core: Core) -> Process:
        return _BackedProcess(core, self.size, self)

    def find(self, core: Core, number: int, out: memoryview) -> bool:
        (device,) = core.backed
        if number == 0:
            self.late_writes()
        while True:
            fetch = self.transfers.fetch(device.needed(number * self.size, self.size), lambda: None)
            self.transfers.kick()
            while self.disk.waiting:
                self.disk.finish()
            try:
                device.read_into(number * self.size, out)
            except SlotsNeeded:  # the page has left the pool meanwhile
                continue
            finally:
                self.transfers.end(fetch)
            return device._has_page(number)


class _BackedProcess(Process):
    def __init__(self, core: Core, size: int, world: BackedWorld) -> None:
        super().__init__(core, size)
        self._world = world

    def do(self, op: Op) -> int:
        (device,) = self.core.backed
        disk, transfers = self._world.disk, self._world.transfers
        match op:
            case ("write", number, kind, seed):
                ticket = device.begin()
                reason = device.write(number * self.size, memoryview(page(kind, seed, self.size)))
                device.end()
                while ticket.left:  # a write-back stays under way, where the order allows it
                    if not disk.waiting:  # the operation waits for a dead process' write
                        self._world.late_writes()
                    disk.finish(-1)
                self._refill()
                return REFUSED if reason is not None or ticket.errno else STORED
            case ("limit", frames):
                self.core.zv.limit_frames = frames
            case ("write_back", first, count):
                for number in range(first, min(first + count, PAGES)):
                    device.write_back(number, lambda _left: None)
                transfers.kick()
            case ("disk", count):
                for _ in range(min(count, len(disk.waiting))):
                    disk.finish()
            case ("disk_fails", code):
                disk.failing = code
            case ("read", first, count):
                device.promotes = True
                expected = (LostPageError, BackingError) if disk.failing else (LostPageError,)
                out = memoryview(bytearray(self.size))
                for number in range(first, min(first + count, PAGES)):
                    with contextlib.suppress(*expected):
                        self._world.find(self.core, number, out)
            case ("late_writes",):
                self._world.late_writes()
            case _:
                return super().do(op)
        return STORED
