# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes without a mount: a cleancache that keeps all pages, and a kernel that keeps a record.

`Device` is between the volumes and their files. It counts reads, stalls them, and fails them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.fakes import FakePam
from zswapd.core.frontends.cleancache import Cleancache
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem
from zswapd.volumes import file_io as files
from zswapd.volumes.manager import KernelCache, Volumes, make_lane
from zswapd.volumes.volume import Volume

PAGE = 4096


class Device:
    """The device behind the backing files.

    Attributes:
        reads: (first page, pages) of each read that has begun.
        writes: (offset, length) of each write.
        bad: the pages that can be neither read nor written.
        answering: an event; reads wait while it is not set, as on a device that hangs.
        after: called in the thread when a read has its data, before the read returns.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.bad: set[int] = set()
        self.answering = threading.Event()
        self.answering.set()
        self.after: Any = lambda: None
        self._read, self._write = files.read_into, files.write_through
        patch.setattr(files, "read_into", self.read_into)
        patch.setattr(files, "write_through", self.write_through)

    def read_into(self, backing: files.SourceFile, buffer: memoryview, offset: int) -> int:
        """Read, stall or fail, as the attributes say."""
        run = offset // PAGE, len(buffer) // PAGE
        self.reads.append(run)
        assert self.answering.wait(20), "the test did not let the device answer"
        if self.bad.intersection(range(run[0], run[0] + run[1])):
            raise OSError(5, "Input/output error")
        count = self._read(backing, buffer, offset)
        self.after()
        return count

    def write_through(self, backing: files.SourceFile, data: bytes, offset: int) -> files.Written:
        """Write up to the first bad page."""
        self.writes.append((offset, len(data)))
        assert self.answering.wait(20), "the test did not let the device answer"
        wrong = min(
            (page * PAGE for page in self.bad if page * PAGE >= offset), default=offset + len(data)
        )
        if wrong >= offset + len(data):
            return self._write(backing, data, offset)
        done = self._write(backing, data[: wrong - offset], offset)
        return files.Written(done.count, 5, done.before, None)


class Entries:
    """A directory of volumes."""

    def __init__(self) -> None:
        self.files: dict[int, tuple[str, Volume]] = {}

    def add_cached_file(self, name: str, inode: int, file: Volume) -> None:
        """Record the call."""
        self.files[inode] = name, file

    def remove_cached_file(self, inode: int) -> None:
        """Remove the record."""
        del self.files[inode]


class Box:
    """Volumes with their device and kernel.

    Attributes:
        told: the inodes and names that the kernel was told to invalidate.
        telling: an event; notifications wait while it is not set.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.pam = FakePam(PAGE)
        self.tmem = Tmem(Objnodes(50_000, reserve=4000))
        self.cache = Cleancache(self.tmem, self.pam, lambda: None)
        self.entries = Entries()
        self.told: list[int | str] = []
        self.telling = threading.Event()
        self.telling.set()
        self.volumes: Volumes

    def _tell(self, what: int | str) -> None:
        assert self.telling.wait(20)
        self.told.append(what)

    @contextlib.asynccontextmanager
    async def running(
        self,
        *,
        left: dict[str, Any] | None = None,
        configured: dict[str, tuple[str, str]] | None = None,
        most: int = 2,
        depth: int = 3,
        most_waiting: int = 3000,
    ) -> AsyncIterator[Volumes]:
        """Run volumes, which by default check their files at every request."""
        self.volumes = Volumes(
            self.cache,
            self.entries,
            KernelCache(self._tell, self._tell),
            mountpoint=Path("/proc"),
            page_size=PAGE,
            lanes=[make_lane(number, depth) for number in range(most)],
            most_waiting=most_waiting,
            left=left or {},
            base={},
        )
        self.volumes.apply(check_s=0.0, cutoff=None)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.volumes.run, configured or {})
            yield self.volumes
            self.device.answering.set()
            self.telling.set()
            nursery.cancel_scope.cancel()
        self.tmem.check()


def make_file(path: Path, pages: float, seed: int = 0) -> bytes:
    """Write a file whose bytes name page and seed, and wait until its mtime is not racy.

    Returns:
        Its contents.
    """
    data = b"".join(
        b"%08d seed %08d." % (at, seed) + bytes(PAGE - 23) for at in range(int(pages) + 1)
    )[: int(pages * PAGE)]
    path.write_bytes(data)
    time.sleep(files.RACY_NS / 1e9 + 0.002)
    return data
