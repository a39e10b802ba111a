# SPDX-License-Identifier: GPL-2.0-or-later
"""One cache volume: a slow file behind the kernel's page cache and cleancache.

Read: the kernel asks for what its page cache does not have; what cleancache does not have either is
read from the backing file, in as few reads as possible, and kept. Write (mode writethrough): to the
backing file first, then what was cached is let go.

When is what is cached stale? When the backing file has changed underneath. It is looked at when it
is opened, before a request is answered if the last look is older than `check_s`, and as often while
it is open (watch.py): so no reader gets data that was replaced longer ago than that. A changed
signature drops everything, in cleancache at once, and in the kernel's page cache by a notification.
That takes the locks of pages under read, whose readers we answer: so it runs in a thread of its
own, and no request ever waits for it, but for an open. A request that is answered meanwhile brings
old pages at worst to a reader who asked before; the notification, coming after, finds them.

The invariants, in terms of the event loop, where all of this runs but the I/O:
- an invalidation marks every fetch stale that may have read older data, before anything else can
  run; a stale fetch is neither joined nor kept. A fetch that has not begun to read cannot be stale.
- a write is over (and its fetches stale, its pages let go) before its writer is answered, whatever
  came of it.
- writes go one after the other, since each compares signatures before and after itself: what it
  changed was itself, what was different before was somebody else.

Requests of a backing file that hangs wait, a bounded number of them (gate.py); a killed reader is
let go, its read goes on in its thread.
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
"""Longest read of a backing file: two requests of the kernel's default read-ahead."""
GAP_BYTES = 32 << 10
"""A gap that is worth reading over.

It takes a third of a millisecond at 100 MB/s, and saves a round trip.
"""
PUTS = 16
"""Pages kept between two turns of the event loop: a tenth of a millisecond."""
EMPTIED_PAGES = 512
"""Pages that are let go at a time: half a millisecond, or two where they lie far apart."""
NOTICE_S = 0.002
"""Time between finding a change and having the kernel forget what it knew."""
GATES = 2
"""Of a volume: looks have one of their own, since they need no reader's turn."""
READ_ONLY, WRITETHROUGH = "ro", "writethrough"
MODES = (READ_ONLY, WRITETHROUGH)


class Volume:
    """One volume. All of it belongs to the event loop's thread.

    Args:
        name: in the mount.
        path: of the backing file.
        mode: one of MODES.
        inode: in the mount, and in cleancache.
        cache: where its pages are kept.
        lane: its threads.
        places: what its requests take while they wait.
        mountpoint: of our mount, on which the backing file must not lie.
        nursery: for what goes on when whoever asked for it has left.
        tell_kernel: has the kernel forget an inode's pages and attributes; blocks.
        page_size: bytes.
        signature: the backing file's when a predecessor last looked, with nothing left to be
            forgotten; else None.
        may_be_open: a predecessor had it.

    Attributes:
        source: its backing file.
        cutoff: bytes after which a sequential stream is no longer kept; None for never.
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
        self._untold = 0  # notifications of the kernel that are under way
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

    # What fuse asks for.

    @property
    def writable(self) -> bool:
        """Whether it can be written."""
        return self.mode == WRITETHROUGH

    @property
    def attribute_s(self) -> float:
        """How long the kernel may go by what it knows of length and times, seconds.

        Until we look again.
        """
        return self.source.remaining_s

    @property
    def size(self) -> int:
        """Bytes, at the last look."""
        return self.source.size

    @property
    def mtime_ns(self) -> int:
        """When the contents changed underneath, ns since the epoch."""
        return self.source.mtime_ns

    async def refresh(self) -> None:
        """Look at the backing file if the last look is too old.

        Raises:
            VolumeError: it cannot be looked at; too many requests wait; the volume was removed.
        """
        async with self._admitted(self._looks):
            await self.source.look_if_due()

    async def opened(self) -> None:
        """Do what `renew` does for whoever opens it. Raises what that raises."""
        await self.renew()
        self._watch.opened()

    async def renew(self) -> None:
        """Look at the backing file now, and have the kernel forget what is old before going on.

        Raises what `refresh` does.
        """
        async with self._admitted(self._looks):
            await self.source.look()
            await self._told.wait()

    def closed(self) -> None:
        """Take note that one of those who have opened it has it no more."""
        self._watch.closed()

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer at the end of the file.

        Raises:
            VolumeError: what `refresh` raises, and what the device says.
        """
        async with self._admitted(self._requests):
            await self.source.look_if_due()
            for _ in range(3):
                data = await self._read(offset, min(size, max(self.source.size - offset, 0)))
                if data is not None:
                    return data
                await (
                    self.source.look()
                )  # the file ended before it should have: it has shrunk, perhaps
        self.counters.read_errors += 1
        raise VolumeError(f"{self.path} ends before its length says")

    async def write(self, offset: int, data: bytes) -> int:
        """Write to the backing file, then let go of what was cached.

        Return how many bytes were written.

        Raises:
            VolumeError: nothing was written: no room behind the end, what the device says.
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
        """Have what was written reach the device.

        Raises:
            VolumeError: what the device says.
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
        """Let go of everything that is cached; return how many pages cleancache had."""
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
        """End a pool that nobody asks any more.

        If it has many pages some at a time: no request is served meanwhile.
        """
        if self._cache.pages(pool) > EMPTIED_PAGES:
            self._nursery.start_soon(self._empty_slowly, pool)
        else:
            self._cache.invalidate_fs(pool)

    async def _empty_slowly(self, pool: int) -> None:
        while self._cache.invalidate_some(pool, EMPTIED_PAGES):
            await trio.lowlevel.checkpoint()
        self._cache.invalidate_fs(pool)

    def _tell(self) -> None:
        """Have the kernel forget what it has of this volume."""
        if not self._untold:
            self._told = trio.Event()
        self._untold += 1
        self._nursery.start_soon(self._notify)

    async def _notify(self) -> None:
        try:
            # After the answer to whoever made us look: the kernel takes attributes that it asked
            # for before a notification for older than that, and would go on with the old length.
            await trio.sleep(NOTICE_S)
            await self.lane.notices.run(self._tell_kernel, self.inode, abandon=True)
        finally:
            self._untold -= 1
            if not self._untold:
                self._told.set()

    # Reading.

    async def _read(self, offset: int, size: int) -> bytes | None:
        """Return `size` bytes, which the file is said to have.

        None if it ends before, or does by now.
        """
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
            if want.is_short or self.source.size < offset + size:  # it has shrunk meanwhile
                return None
        skip = offset - first * page
        return bytes(out[skip : skip + size])

    async def _satisfy(self, want: Want, *, keep: bool) -> None:
        """Fetch what a reader misses.

        First with others and over gaps, then, after an error of such a read, exactly that alone.

        A bad block is the trouble of whoever wants it, not of who shares a read with them.
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
        """Join fetches that are under way and begin others, so that all that is missing comes.

        Return them.
        """
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
            if not fetch.wants:  # all were killed
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
        """Put what was fetched into cleancache, a few pages a turn of the event loop.

        Unless it becomes stale meanwhile.
        """
        for place, page in enumerate(range(fetch.first, fetch.first + fetch.count)):
            if place % PUTS == PUTS - 1:
                await trio.lowlevel.checkpoint()
            begin = place * self._page
            end = min(begin + self._page, fetch.valid)
            # Part of a page is all there is of the last one, or else not worth believing.
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

    # The end, and what a successor has to know.

    def close(self) -> None:
        """End the volume: its pages go, whoever waits gets ESTALE, the kernel forgets it.

        What hangs is left behind.
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
        """Signature of what the kernel's page cache may have of this volume.

        None while it may have anything older.
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
