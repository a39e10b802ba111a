# SPDX-License-Identifier: GPL-2.0-or-later
"""The task that empties a file after swapoff, by whichever program.

After swapoff, the pages of the file mean nothing, but keep the pool's memory. The kernel does not
discard them. `zswapctl swapoff` is not the only way to swap off: `swapoff -a`, systemd and kubeadm
do it too. So a worker looks at /proc/swaps when the kernel says that it has changed, and when an
open file is closed that could change a block file. A file that was swapped on before, and is not
at the look, is emptied:

- all but its first page while a loop device is attached to it, so that the device can be swapped on
  again;
- as a whole when the device is detached.

These files stay as they are:

- a file that was never seen swapped on, because it is a block file with other data;
- a file with a first page that is no swap header, as after mkfs;
- a file that another open file may have changed since.

Invariant: data that is written after the look is never discarded. A write ends the emptying, and so
does another open file that may write. Both are checked in the same turn of the event loop that
discards. The list of files that were swapped on survives a worker, and its successor goes on.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import select
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from zswapd.core.block.backed import SlotsNeeded
from zswapd.errors import ZswapdError
from zswapd.swapdevice.kernel import Kernel
from zswapd.swapdevice.state import Identity, find_attached

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from zswapd.core.backing.transfers import Transfers
    from zswapd.core.block.device import Device
    from zswapd.fuse.inodes import Directory
    from zswapd.fuse.session import Session
    from zswapd.fuse.writers import Writers
    from zswapd.system.offload import Offload

log = logging.getLogger(__name__)

STEP_BYTES = 4 << 20
"""Bytes that one turn of the event loop discards: 1024 pages, 1 ms."""
SWAP_MAGIC = b"SWAPSPACE2"
"""The last bytes of a swap area's first page."""


class FileState(NamedTuple):
    """The kernel's use of a file."""

    is_attached: bool
    is_swapped_on: bool


def identities(session: Session, directory: Directory) -> dict[Path, Identity]:
    """Return the identities of the block files by path; {} if the mount's device is not known."""
    return {
        session.mountpoint / file.name: Identity(session.device, inode)
        for inode, file in directory.block_files.items()
        if session.device
    }


def look_at(path: Path, *, identity: Identity | None, kernel: Kernel) -> FileState:
    """Return the kernel's use of a file.

    Args:
        path: path of the file.
        identity: device and inode of the file, by which it is found under any path.
        kernel: the system calls.
    """
    found = find_attached(path, identity=identity, kernel=kernel)
    return FileState(
        is_attached=found is not None, is_swapped_on=found is not None and bool(found.swap)
    )


async def read_first_page(
    device: Device, transfers: Transfers | None, page_size: int
) -> memoryview | None:
    """Return the first page of a device; None if it cannot be read.

    The worker does not open its own file: the open would be a request to itself. If all processes
    of the daemon were killed at that moment, the kernel would wait for the answer for ever.

    Args:
        device: the device.
        transfers: read the page from the disk behind the pool; None without one.
        page_size: bytes in a page.
    """
    page = memoryview(bytearray(page_size))
    with contextlib.ExitStack() as held:
        while True:
            try:
                device.read_into(0, page)
            except SlotsNeeded:
                assert transfers is not None
                is_there = trio.Event()
                fetch = transfers.fetch(device.needed(0, page_size), is_there.set)  # type: ignore[attr-defined]
                transfers.kick()
                await is_there.wait()
                held.callback(transfers.end, fetch)
            except ZswapdError:  # the page is damaged or lost
                return None
            else:
                return page


class Emptying:
    """The task that empties files.

    Args:
        devices: the devices of the block files, by inode.
        paths: the paths of the block files, by inode.
        writers: the open files that may change them.
        page_size: bytes in a page.
        look: returns the state of a file, given its path; called in another thread.
        first_page: returns the first page of a device; None if it cannot be read.
        run: calls a function in a thread.

    Attributes:
        emptied: number of pages that were discarded.
    """

    def __init__(
        self,
        devices: Mapping[int, Device],
        paths: Mapping[int, Path],
        writers: Writers,
        *,
        page_size: int,
        look: Callable[[Path], FileState],
        first_page: Callable[[Device], Awaitable[memoryview | None]],
        run: Callable[..., Awaitable[Any]],
    ) -> None:
        self.emptied = 0
        self._devices = dict(devices)
        self._paths = dict(paths)
        self._writers = writers
        self._page_size = page_size
        self._look_at = look
        self._first_page = first_page
        self._run = run
        # Files that were seen swapped on, each with the handle of its open file.
        self._was_on: dict[int, int] = {}
        # Files of which only the swap header is left, each with its count of writes.
        self._headers: dict[int, int] = {}
        self._wanted = trio.Event()
        writers.when_closed = self.look_soon

    def add(self, inode: int, device: Device, path: Path) -> None:
        """Empty a further file after swapoff."""
        self._devices[inode], self._paths[inode] = device, path

    def remove(self, inode: int) -> None:
        """Leave a file out that is not open for writing."""
        del self._devices[inode], self._paths[inode]
        self._was_on.pop(inode, None)
        self._headers.pop(inode, None)

    def look_soon(self) -> None:
        """Have the task look at the files."""
        self._wanted.set()

    def remember(self) -> dict[str, int]:
        """Return the files that were swapped on, each with the handle of its open file, as JSON.

        `recall` takes the result.
        """
        return {
            str(inode): handle
            for inode, handle in self._was_on.items()
            if inode not in self._headers
        }

    def recall(self, left: Mapping[str, int]) -> None:
        """Take over the files that a predecessor has seen swapped on."""
        self._was_on.update(
            (int(inode), handle) for inode, handle in left.items() if int(inode) in self._devices
        )

    async def run(self) -> None:
        """Look when there is a reason; never return."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            while True:
                self._wanted = trio.Event()
                for inode in list(self._paths):
                    if inode in self._paths:
                        await self.look(inode)
                await self._wanted.wait()

    async def _listen(self) -> None:
        with _swap_events() as events:
            while events is not None:
                await trio.lowlevel.wait_readable(events.fileno())
                events.poll(0)
                self.look_soon()

    async def look(self, inode: int) -> None:
        """Look at the kernel's use of a file, and empty it if it was swapped off."""
        written, writers = self._written(inode), self._writers
        state = await self._run(partial(self._look_at, self._paths[inode]))
        if inode not in self._paths:  # it was removed meanwhile
            return
        writers.settle(inode, is_attached=state.is_attached)
        if state.is_swapped_on:
            if self._headers.pop(inode, None) is not None:
                writers.when_changed()  # `remember` names it again
            self._note(inode, writers.handle_of(inode))
            return
        page = await self._first_page(self._devices[inode]) if inode in self._was_on else None
        if page is None or inode not in self._was_on:
            return
        handle = writers.handle_of(inode)
        # Another open file, or a first page that is no swap header: the data is not swap's.
        if handle not in {0, self._was_on[inode]} or page[-len(SWAP_MAGIC) :] != SWAP_MAGIC:
            self._note(inode, None)
        elif handle and not state.is_attached:
            return  # the file is about to be closed, which causes the next look
        elif inode not in self._headers:
            await self._empty(inode, handle, written)
        elif not handle or self._headers[inode] != written:
            if self._headers[inode] == self._written(inode):
                self._discard(inode, 0, self._page_size)
            self._note(inode, None)

    def _note(self, inode: int, handle: int | None) -> None:
        """Note the open file by which a file is swapped on; None if the file is to be forgotten."""
        if self._was_on.get(inode) == handle:
            return
        if handle is None:
            del self._was_on[inode]
            self._headers.pop(inode, None)
        else:
            self._was_on[inode] = handle
        self._writers.when_changed()

    async def _empty(self, inode: int, handle: int, written: int) -> None:
        """Discard the pages that swap has left, until another write comes."""
        device, before = self._devices[inode], self.emptied
        for offset in range(self._page_size if handle else 0, device.size, STEP_BYTES):
            if self._written(inode) != written or self._writers.handle_of(inode) not in {0, handle}:
                self._note(inode, None)
                break
            self._discard(inode, offset, min(STEP_BYTES, device.size - offset))
            await trio.lowlevel.checkpoint()
        else:
            if handle:
                self._headers[inode] = written
                # `remember` leaves the file out, because a successor could not see later writes.
                self._writers.when_changed()
            else:
                self._note(inode, None)
        if self.emptied > before:
            log.info(
                "%s was swapped off: %d of its pages are discarded",
                device.name,
                self.emptied - before,
            )

    def _discard(self, inode: int, offset: int, length: int) -> None:
        device = self._devices[inode]
        stored = device.statistics().stored_pages
        self._writers.when_void(inode)  # the hook may have read these pages ahead
        device.discard(offset, length)
        self.emptied += stored - device.statistics().stored_pages

    def _written(self, inode: int) -> int:
        """Return a number that every write to a file changes."""
        seen = self._devices[inode].statistics()
        return seen.pages_written + seen.partial_writes + seen.refused_writes


def make_emptying(
    session: Session,
    directory: Directory,
    devices: Mapping[str, Device],
    swapoff_thread: Offload,
    transfers: Transfers | None,
    left: Mapping[str, Any] | None,
) -> Emptying:
    """Return the task that empties the files of a session.

    The task takes over the predecessor's notes on files and writers.

    Args:
        session: the session that serves the files.
        directory: the directory of the mount.
        devices: the devices of the files, by name.
        swapoff_thread: the threads that read the kernel's tables.
        transfers: read pages from the disk behind the pool; None without one.
        left: the predecessor's document; None without a predecessor.
    """
    files = directory.block_files
    paths = {inode: session.mountpoint / file.name for inode, file in files.items()}
    kernel = Kernel()

    def look(path: Path) -> FileState:
        return look_at(path, identity=identities(session, directory).get(path), kernel=kernel)

    emptying = Emptying(
        {inode: devices[file.name] for inode, file in files.items()},
        paths,
        session.operations.writers,
        page_size=mmap.PAGESIZE,
        look=look,
        first_page=partial(read_first_page, transfers=transfers, page_size=mmap.PAGESIZE),
        run=partial(swapoff_thread.run, abandon=True),
    )
    if left is not None:
        session.operations.writers.recall(left.get("writers"))
        emptying.recall(left.get("swapped_on", {}))
    return emptying


@contextlib.contextmanager
def _swap_events() -> Iterator[select.epoll | None]:
    """Yield an epoll that becomes readable when /proc/swaps changes; None without swap support."""
    with contextlib.ExitStack() as undo:
        try:
            swaps = undo.enter_context(open("/proc/swaps", "rb", buffering=0))  # noqa: PTH123 - no Path is needed
            events = undo.enter_context(select.epoll())
            events.register(swaps.fileno(), select.EPOLLPRI | select.EPOLLET)
        except OSError as error:
            log.warning("/proc/swaps cannot be watched for changes: %s", error.strerror)
            yield None
            return
        yield events
