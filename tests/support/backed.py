# SPDX-License-Identifier: GPL-2.0-or-later
"""A core with a backing on a disk in memory, and its FUSE handlers, driven without a mount."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from tests.support.disk import Disk
from tests.support.successor import make_config
from zswapd.core.backing.store import make_buffers
from zswapd.core.backing.transfers import Transfers
from zswapd.core.core import Core
from zswapd.core.disk import CoreDisk
from zswapd.core.sizing import slot_map_sizes, slots_needed
from zswapd.fuse.deferred import BackedOperations
from zswapd.fuse.held import DEFERRED
from zswapd.fuse.inodes import ROOT_INODE, Directory
from zswapd.fuse.operations import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

SWAP = ROOT_INODE + 1
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Files:
    """The file `swap` as the kernel sees it, with core and disk.

    Every request returns its number. `answers` gets the answer: bytes for a read, a number for any
    other request (negative for an errno).
    """

    def __init__(
        self,
        pages: int,
        page_size: int = 4096,
        *,
        buffers: int = 64,
        clock: Callable[[], float] | None = None,
        settings: tuple[str, ...] = (),
        ahead: int = 0,
    ) -> None:
        self.page_size = page_size
        config = make_config(
            f"swap.size={pages * page_size}",
            f"memory.reserve={pages * page_size}",
            "memory.arena=memfd",
            *settings,
            page_size=page_size,
        )
        self.config = config
        self.disk = Disk(page_size, slots_needed(config))
        self.transfers = Transfers(
            self.disk,
            self.disk.submit,
            page_size=page_size,
            buffers=make_buffers(buffers * page_size, page_size),
            clock=clock or time.monotonic,
        )
        maps = {
            name: memoryview(bytearray(length)) for name, length in slot_map_sizes(config).items()
        }
        self.core = Core(config, backing=CoreDisk(self.transfers, maps))
        (self.device,) = self.core.backed
        directory = Directory()
        directory.add_block_file(self.device)
        self.unique = 0
        self.answers: dict[int, bytes | int] = {}
        self._kinds: dict[int, str] = {}
        self.blamed: list[int] = []
        self.operations = BackedOperations(
            directory,
            page_size=page_size,
            transfers=self.transfers,
            unique=lambda: self.unique,
            reply=self._reply,
            blame=self.blamed.append,
            max_io=16 * page_size,
            ahead=ahead * page_size,
        )

    def _reply(self, unique: int, code: int, payload: bytes | memoryview) -> None:
        assert unique not in self.answers, "answered twice"
        if code:
            self.answers[unique] = -code
        elif self._kinds[unique] == "read":
            self.answers[unique] = bytes(payload)
        else:
            self.answers[unique] = struct.unpack("=II", payload)[0] if payload else 0

    def _begin(self, kind: str) -> int:
        self.unique += 1
        self._kinds[self.unique] = kind
        return self.unique

    def read(self, offset: int, length: int) -> int:
        number = self._begin("read")
        out = memoryview(bytearray(length))
        n = self.operations.serve_read(SWAP, offset, out)
        if n != DEFERRED:
            self._reply(number, max(-n, 0), out[: max(n, 0)])
        return number

    def write(self, offset: int, data: bytes) -> int:
        number = self._begin("write")
        # The hook's buffer is used again at once.
        lent = memoryview(bytearray(data))
        n = self.operations.serve_write(SWAP, offset, lent)
        lent[:] = b"\xbb" * len(data)
        if n != DEFERRED:
            self._reply(number, max(-n, 0), struct.pack("=II", max(n, 0), 0))
        self._refill()
        return number

    def discard(self, offset: int, length: int) -> int:
        number = self._begin("discard")
        n = self.operations.serve_fallocate(SWAP, PUNCH, offset, length)
        if n != DEFERRED:
            self._reply(number, max(-n, 0), b"")
        return number

    def _refill(self) -> None:
        if self.core.frames.wants_refill():
            self.core.frames.refill_now()

    def write_back(self, numbers: range | list[int]) -> int:
        """Begin to write pages back; return their number."""
        begun = sum(self.device.write_back(number, lambda _left: None) for number in numbers)
        self.transfers.kick()
        return begun

    def settle(self) -> None:
        """Make the disk answer all waiting requests."""
        self.disk.finish_all()
        assert self.transfers.is_idle() or any(
            ahead.statistics().held for ahead in self.operations.aheads.values()
        )

    def get(self, number: int) -> bytes | int:
        """Read a page and wait for the answer."""
        request = self.read(number * self.page_size, self.page_size)
        self.settle()
        return self.answers[request]

    def put(self, number: int, page: bytes) -> bytes | int:
        """Write a page and wait for the answer."""
        request = self.write(number * self.page_size, page)
        self.settle()
        return self.answers[request]

    def close(self) -> None:
        self.core.close()
