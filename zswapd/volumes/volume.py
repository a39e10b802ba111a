# SPDX-License-Identifier: GPL-2.0-or-later
"""One cache volume: a slow file behind the kernel's page cache and cleancache.

Read: the kernel asks for pages that its page cache lacks. Pages that cleancache lacks too are read
from the backing file, in as few reads as possible, and kept. Write (mode writethrough): the data
goes to the backing file first, then the cached pages are dropped.

Cached pages are stale when the backing file has changed. So the file is looked at
  - when the volume is opened,
  - before a request is answered, if the last look is older than `check_s`,
  - and as often while the volume is open (watch.py).
So no reader gets data that was replaced longer ago than `check_s`. A changed signature drops all
pages: in cleancache at once, in the kernel's page cache by a notification. The notification takes
the locks of pages under read, and this process answers those reads. So it runs in a thread of its
own, and only an open waits for it. A request that is answered meanwhile may bring old pages to a
reader that asked earlier. The notification comes later and drops them.

Invariants. All of this except the I/O runs in the event loop.
- An invalidation marks every fetch stale that may have read older data, before any other task runs.
  A stale fetch is neither joined nor kept. A fetch that has not begun to read cannot be stale.
- Before a writer is answered, its write has ended, fetches of its pages are stale, and its pages
  are dropped, with or without an error.
- Writes go one after another, because each compares the signatures before and after itself. It
  changes the signature itself. An unexpected signature before it means a change by another program.

Requests for a hanging backing file wait, up to a bound (gate.py). A killed reader returns at once,
and its read goes on in its thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from typing import TYPE_CHECKING

import trio

from zswapd.errors import VolumeError
from zswapd.volumes import file_io as files
from zswapd.volumes.fetches import FileRead, Want
from zswapd.volumes.gate import Gate
from zswapd.volumes.plan import Streams, runs
from zswapd.volumes.source import Source
from zswapd.volumes.statistics import VolumeCounters, VolumeStatistics
from zswapd.volumes.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from zswapd.core.frontends.cleancache import Cleancache
    from zswapd.volumes.file_io import Signature
    from zswapd.volumes.gate import Places
    from zswapd.volumes.source import Lane

RUN_BYTES = 256 << 10
"""Longest read of a backing file: twice the kernel's default read-ahead."""
GAP_BYTES = 32 << 10
"""Longest gap that is read over. That takes 1/3 ms at 100 MB/s, and saves a round trip."""
PUTS = 16
"""Pages that are kept between two turns of the event loop: 0.1 ms."""
EMPTIED_PAGES = 512
"""Pages that are dropped at a time: 0.5 ms, or 2 ms where they lie far apart."""
NOTICE_S = 0.002
"""Seconds between a detected change and the notification of the kernel."""
GATES = 2
"""Gates of a volume. Looks have a gate of their own, because they need no reader's turn."""
READ_ONLY, WRITETHROUGH = "ro", "writethrough"
MODES = (READ_ONLY, WRITETHROUGH)


class Volume:
    """One volume. It is used in the event loop's thread only.

    Args:
        name: in the mount.
        path: of the backing file.
        mode: one of MODES.
        inode: in the mount, and in cleancache.
        cache: the store of its pages.
        lane: its threads.
        places: the places that its waiting requests take.
        mountpoint: our mount. The backing file must not lie on it.
        nursery: for tasks that outlive the request that started them.
        tell_kernel: makes the kernel drop an inode's pages and attributes; blocks.
        page_size: bytes in a page.
        signature: of the backing file at a predecessor's last look, if no notification was under
            way; else None.
        may_be_open: whether the volume comes from a predecessor, where it may be open.

    Attributes:
        source: its backing file.
        cutoff: bytes after which pages of a sequential stream are not kept; None for never.
    """

    def __init__(
        self,
        name: str,
        path: str,
        mode: str,
        *,
        inode: int,
        cache: Cleancache,
        lane: Lane,
        places: Places,
        mountpoint: Path,
        nursery: trio.Nursery,
        tell_kernel: Callable[[int], None],
        page_size: int,
        signature: Signature | None = None,
        may_be_open: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.mode = mode
        self.inode = inode
        self.lane = lane
        self.cutoff: int | None = None
        self.counters = VolumeCounters()
        self._cache = cache
        self._pool = cache.init_fs()
        self._nursery = nursery
        self._tell_kernel = tell_kernel
        self._page = page_size
        self.source = Source(
            path,
            writable=mode == WRITETHROUGH,
            lane=lane,
            mountpoint=mountpoint,
            nursery=nursery,
            when_changed=self.drop,
            signature=signature,
        )
        self._watch = Watch(self.source, is_open=may_be_open)
        nursery.start_soon(self._watch.run)
        self._untold = 0  # notifications of the kernel under way
        self._told = trio.Event()
        self._told.set()
        self._fetches: list[FileRead] = []
        self._give_buffer, self._take_buffer = trio.open_memory_channel[memoryview](
            len(lane.buffers)
        )
        for buffer in lane.buffers:
            self._give_buffer.send_nowait(memoryview(buffer))
        self._writing = trio.Lock()
        self._streams = Streams()
        self._looks = Gate(path, places, self.counters)
        self._requests = Gate(path, places, self.counters)

    # The interface for fuse.

    @property
    def writable(self) -> bool:
        """Whether the volume may be written."""
        return self.mode == WRITETHROUGH

    @property
    def attribute_s(self) -> float:
        """Seconds for which the kernel may use cached attributes: until the next look."""
        return self.source.remaining_s

    @property
    def size(self) -> int:
        """Bytes at the last look."""
        return self.source.size

    @property
    def mtime_ns(self) -> int:
        """Time of the last change by another program, ns since the epoch."""
        return self.source.mtime_ns

    async def refresh(self) -> None:
        """Look at the backing file if the last look is too old.

        Raises:
            VolumeError: the look failed, too many requests wait, or the volume was removed.
        """
        async with self._admitted(self._looks):
            await self.source.look_if_due()

    async def opened(self) -> None:
        """Renew the volume for a program that opens it. Raises as `renew` does."""
        await self.renew()
        self._watch.opened()

    async def renew(self) -> None:
        """Look at the backing file now, and wait until the kernel has dropped old pages.

        Raises as `refresh` does.
        """
        async with self._admitted(self._looks):
            await self.source.look()
            await self._told.wait()

    def closed(self) -> None:
        """Count a close."""
        self._watch.closed()

    async def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes; fewer at the end of the file.

        Raises:
            VolumeError: as `refresh` raises it, or the device reports an error.
        """
        async with self._admitted(self._requests):
            await self.source.look_if_due()
            for _ in range(3):
                data = await self._read(offset, min(size, max(self.source.size - offset, 0)))
                if data is not None:
                    return data
                # The file ended too early: it may have shrunk.
                await self.source.look()
        self.counters.read_errors += 1
        raise VolumeError(f"{self.path} ends before its reported length")

    async def write(self, offset: int, data: bytes) -> int:
        """Write to the backing file, then drop the cached pages; return the bytes written.

        Raises:
            VolumeError: nothing was written. The write begins behind the end, or the device reports
                an error.
        """
        async with self._admitted(self._requests, len(data)):
            await self.source.look_if_due()
            if not self.writable:
                raise VolumeError(f"volume {self.name} is read-only", errno_=errno.EROFS)
            data = data[: max(self.source.size - offset, 0)]
            if not data:
                raise VolumeError(
                    f"the write begins behind the end of volume {self.name}", errno_=errno.ENOSPC
                )
            async with self._writing:
                return await self._write(offset, data)

    async def sync(self) -> None:
        """Flush written data to the device.

        Raises:
            VolumeError: the device reports an error.
        """
        async with self._admitted(self._requests):
            await self.source.run(files.sync)

    @contextlib.asynccontextmanager
    async def _admitted(self, gate: Gate, size: int = 0) -> AsyncIterator[None]:
        self.source.raise_if_gone()
        async with gate.passed(size):
            self.source.raise_if_gone()
            yield

    def drop(self) -> int:
        """Drop all cached pages; return how many pages cleancache had."""
        self.counters.drops += 1
        for fetch in self._fetches:
            fetch.is_stale = fetch.is_stale or fetch.is_started
        self._tell()
        old, pages = self._pool, self._cache.pages(self._pool)
        try:
            self._pool = self._cache.init_fs()
        except ValueError:  # all of tmem's pools are in use
            self._cache.invalidate_inode(old, self.inode)
        else:
            self._empty(old)
        return pages

    def _empty(self, pool: int) -> None:
        """Destroy a pool that is out of use; a large one in steps, because no request is served."""
        if self._cache.pages(pool) > EMPTIED_PAGES:
            self._nursery.start_soon(self._empty_slowly, pool)
        else:
            self._cache.invalidate_fs(pool)

    async def _empty_slowly(self, pool: int) -> None:
        while self._cache.invalidate_some(pool, EMPTIED_PAGES):
            await trio.lowlevel.checkpoint()
        self._cache.invalidate_fs(pool)

    def _tell(self) -> None:
        """Notify the kernel, so that it drops the pages of this volume."""
        if not self._untold:
            self._told = trio.Event()
        self._untold += 1
        self._nursery.start_soon(self._notify)

    async def _notify(self) -> None:
        try:
            # After the answer to the request that caused the look. The kernel discards attributes
            # that it requested before a notification. It would go on with the old length.
            await trio.sleep(NOTICE_S)
            await self.lane.notices.run(self._tell_kernel, self.inode, abandon=True)
        finally:
            self._untold -= 1
            if not self._untold:
                self._told.set()

    # Reading.

    async def _read(self, offset: int, size: int) -> bytes | None:
        """Return `size` bytes, or None if the file ends before or has shrunk meanwhile."""
        if not size:
            return b""
        page = self._page
        first, end = offset // page, -(-(offset + size) // page)
        out = memoryview(bytearray((end - first) * page))
        missing = [
            number
            for place, number in enumerate(range(first, end))
            if not self._cache.get_page(
                self._pool, self.inode, number, out[place * page : place * page + page], keep=True
            )
        ]
        stream = self._streams.note(offset, size)
        is_bypassing = self.cutoff is not None and stream > self.cutoff
        self.counters.note_read(size, len(missing) * page, is_bypassing=is_bypassing)
        if missing:
            want = Want(first, out, missing)
            await self._satisfy(want, keep=not is_bypassing)
            # The second case: the file has shrunk meanwhile.
            if want.is_short or self.source.size < offset + size:
                return None
        skip = offset - first * page
        return bytes(out[skip : skip + size])

    async def _satisfy(self, want: Want, *, keep: bool) -> None:
        """Fetch the pages that a reader misses.

        The first try shares reads and reads over gaps. After an error of a shared read, the second
        try reads exactly the missing pages. So a bad block fails only the readers that want it.
        """
        is_alone = False
        while want.missing and not want.is_short:
            self.source.raise_if_gone()
            want.begin()
            begun = self._join(want, keep=keep, is_alone=is_alone)
            try:
                while want.is_waiting:
                    want.changed = trio.Event()
                    await want.changed.wait()
            finally:
                for fetch in begun:
                    with contextlib.suppress(ValueError):
                        fetch.wants.remove(want)
            if want.error is not None:
                if is_alone or want.is_error_own or self.source.is_gone:
                    self.source.raise_if_gone()
                    self.counters.read_errors += 1
                    raise want.error
                is_alone = True

    def _join(self, want: Want, *, keep: bool, is_alone: bool) -> list[FileRead]:
        """Join fetches under way, and begin others for the other missing pages; return them."""
        joined: list[FileRead] = []
        alone: list[int] = []
        for page in sorted(want.missing):
            fetch = (
                None
                if is_alone
                else next((fetch for fetch in self._fetches if self._may_join(fetch, page)), None)
            )
            if fetch is None:
                alone.append(page)
            elif fetch not in joined:
                fetch.is_kept = fetch.is_kept or keep
                self.counters.shared_reads += 1
                if fetch.data is not None:
                    fetch.give(want, self._page, self.source.size)
                else:
                    fetch.wants.append(want)
                    joined.append(fetch)
        gap = 0 if is_alone else GAP_BYTES // self._page
        for first, count in runs(alone, gap=gap, most=max(RUN_BYTES // self._page, 1)):
            skip = set(range(first, first + count)).difference(alone)
            fetch = FileRead(first, count, skip, keep=keep)
            fetch.wants.append(want)
            joined.append(fetch)
            self._fetches.append(fetch)
            self._nursery.start_soon(self._fetch, fetch)
        return joined

    @staticmethod
    def _may_join(fetch: FileRead, page: int) -> bool:
        return fetch.covers(page) and not fetch.is_stale

    async def _fetch(self, fetch: FileRead) -> None:
        buffer = await self._take_buffer.receive()
        try:
            if not fetch.wants:  # all readers were killed
                return
            view = buffer[: fetch.count * self._page]
            try:
                fetch.is_started = True
                valid = await self.source.run(files.read_into, view, fetch.first * self._page)
            except VolumeError as error:
                fetch.is_stale = True
                fetch.fail(error)
                return
            self.counters.backing_reads += 1
            self.counters.backing_read_bytes += valid
            fetch.load(view, valid, self._page, self.source.size)
            await self._keep(fetch)
        finally:
            self._fetches.remove(fetch)
            self._give_buffer.send_nowait(buffer)

    async def _keep(self, fetch: FileRead) -> None:
        """Put fetched pages into cleancache, unless they become stale; a few in each turn."""
        for place, page in enumerate(range(fetch.first, fetch.first + fetch.count)):
            if place % PUTS == PUTS - 1:
                await trio.lowlevel.checkpoint()
            begin = place * self._page
            end = min(begin + self._page, fetch.valid)
            # A partial page is only valid as the last page of the file.
            is_whole = (
                end == begin + self._page or page * self._page + end - begin == self.source.size
            )
            if fetch.is_stale or not fetch.is_kept or end <= begin or not is_whole:
                continue
            if page not in fetch.skip:
                assert fetch.data is not None
                self._cache.put_page(
                    self._pool, self.inode, page, fetch.data[begin : begin + self._page]
                )

    # Writing.

    async def _write(self, offset: int, data: bytes) -> int:
        first, last = offset // self._page, (offset + len(data) - 1) // self._page
        try:
            written = await self.source.run(files.write_through, data, offset)
        finally:
            for fetch in self._fetches:
                fetch.is_stale = fetch.is_stale or (
                    fetch.is_started and fetch.overlaps(first, last)
                )
            if not self.source.is_gone:
                self._cache.invalidate_range(self._pool, self.inode, first, last)
        self.source.raise_if_gone()
        self.source.absorb(written)
        self.counters.backing_writes += 1
        self.counters.written_bytes += written.count
        if written.errno_:
            self.counters.write_errors += 1
        if not written.count:
            raise VolumeError(
                f"{self.path}: {os.strerror(written.errno_)}", errno_=written.errno_ or errno.EIO
            )
        return written.count

    # The end of the volume, and the state for a successor.

    def close(self) -> None:
        """End the volume: drop its pages, fail waiting readers with ESTALE, notify the kernel.

        Threads that hang are left behind.
        """
        self.source.close()
        self._watch.end()
        self._looks.open_wide()
        self._requests.open_wide()
        for fetch in self._fetches:
            fetch.is_stale = True
            fetch.fail(VolumeError(f"volume {self.name} was removed", errno_=errno.ESTALE))
        self._empty(self._pool)
        self._tell()

    @property
    def vouched(self) -> Signature | None:
        """Signature of the contents that the kernel's page cache may have of this volume.

        None while the page cache may have older contents.
        """
        return None if self._untold else self.source.signature

    def statistics(self) -> VolumeStatistics:
        """Return a frozen snapshot."""
        return VolumeStatistics(
            name=self.name,
            size=self.source.size,
            pages=0 if self.source.is_gone else self._cache.pages(self._pool),
            pending=self._looks.held + self._requests.held,
            **dataclasses.asdict(self.counters),
        )
