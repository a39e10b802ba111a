# SPDX-License-Identifier: GPL-2.0-or-later
"""The handlers of devices with pages on a disk.

A request that needs the disk is answered later, and other requests do not wait for it.

The hook passes each request once. If a request needs the disk, the handler keeps it under the
kernel's number for it (`unique`) and returns DEFERRED to the hook. After the disk has answered, the
same call is made again, and `reply` sends its result. The page path does not change: a request that
the pool can answer pays only for an exception handler that is not entered.

A successor needs no list of deferred requests. The kernel resends all unanswered requests (Linux
6.9), and a repeated request changes nothing.

Limits: all devices are `BackedDevice`s. Written data that waits is copied to the heap. The heap has
room for as many pages as `transfers` has buffers.
"""

from __future__ import annotations

import errno
import struct
from functools import partial
from typing import TYPE_CHECKING

from zswapd.core.backing.readahead import Ahead
from zswapd.core.block.backed import BackedDevice, SlotsNeeded
from zswapd.errors import ConfigError, ZswapdError
from zswapd.fuse.held import DEFERRED
from zswapd.fuse.operations import Operations, part_of, serving

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.backing.transfers import SlotRead, Transfers
    from zswapd.fuse.inodes import Directory


def _written(n: int) -> bytes:
    """Return struct fuse_write_out."""
    return struct.pack("=II", n, 0)


def _nothing(_n: int) -> bytes:
    return b""


class BackedOperations(Operations):
    """The handlers of a mount with a backing.

    Args:
        directory: names and inodes; all its block files are `BackedDevice`s.
        page_size: see `Operations`.
        transfers: reads and writes slots.
        unique: returns the kernel's number for the present request; 0 for a read-ahead.
        reply: sends (unique, errno or 0, payload).
        blame: records the number of the present request, in case it kills this process; 0 for none.
        max_io: longest read in bytes.
        takes_part: see `Operations`.
        ahead: bytes of one read-ahead for a sequential reader; 0 for no read-ahead.

    Raises:
        ConfigError: a block file is not a `BackedDevice`.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        page_size: int,
        transfers: Transfers,
        unique: Callable[[], int],
        reply: Callable[[int, int, bytes | memoryview], None],
        blame: Callable[[int], None],
        max_io: int,
        takes_part: Callable[[], bool] = lambda: True,
        ahead: int = 0,
    ) -> None:
        super().__init__(directory, page_size=page_size, takes_part=takes_part)
        self._devices: dict[int, BackedDevice] = {}
        self._ahead = ahead
        self.aheads: dict[int, Ahead] = {}
        self._transfers = transfers
        for inode in directory.block_files:
            self._add(inode)
        self._unique = unique
        self._send = reply
        self._blame = blame
        self._out = memoryview(bytearray(max_io))

    def _add(self, inode: int) -> None:
        file = self._files[inode]
        if not isinstance(file, BackedDevice):
            raise ConfigError(
                f"{file.name} has no slots in the backing", hint="report this as a bug"
            )
        self._devices[inode] = file
        if self._ahead and file.has_slots:
            self.aheads[inode] = Ahead(self._transfers, file.needed, file.size, self._ahead)

    def add_block_file(self, inode: int) -> None:
        """Serve a block file that was added to the directory."""
        self._add(inode)
        super().add_block_file(inode)

    def remove_block_file(self, inode: int) -> None:
        """Serve a block file no more; it is not in the directory, and not open for writing."""
        super().remove_block_file(inode)
        del self._devices[inode]
        if ahead := self.aheads.pop(inode, None):
            ahead.look()

    @serving
    def serve_read(self, inode: int, offset: int, out: memoryview) -> int:
        """Serve a read as `Operations.serve_read` does, or return DEFERRED."""
        ahead = self.aheads.get(inode)
        try:
            n = self._read(inode, offset, out)
        except SlotsNeeded:
            unique = self._unique()
            if not unique:
                return -errno.EAGAIN
            length = min(len(out), self._devices[inode].size - offset)
            wanted = partial(self._devices[inode].needed, offset, length)
            n = self._fetch(
                wanted, unique, partial(self._read_again, inode, offset, length, self._takes_part())
            )
        else:
            length = n
        if ahead is not None and length > 0:
            ahead.note(offset, length)
        return n

    def _read_again(
        self,
        inode: int,
        offset: int,
        length: int,
        takes_part: bool,  # noqa: FBT001
        unique: int,
    ) -> int:
        """Answer a read after its slots were read.

        The caller passes `takes_part`, because only the hook's present request can be asked for it.
        """
        file = self._files.get(inode)
        if file is None:  # it was removed while its slots were read
            return -errno.ESTALE
        try:
            file.read_into(offset, self._out[:length])
        except ZswapdError as error:
            length = part_of(error)
            if not length or not takes_part:
                raise
        self._reply(unique, 0, self._out[:length])
        return DEFERRED

    @serving
    def serve_write(self, inode: int, offset: int, data: memoryview) -> int:
        """Serve a write as `Operations.serve_write` does, or return DEFERRED."""
        return (self.held and self.held.hold(inode, offset, data)) or self._write_as(
            self._unique(), inode, offset, data
        )

    @serving
    def store_held(self, unique: int, inode: int, offset: int, data: memoryview) -> int:
        """Store a write that was held, or return DEFERRED."""
        return self._write_as(unique, inode, offset, data)

    def _write_as(self, unique: int, inode: int, offset: int, data: memoryview) -> int:
        try:
            return self._change(inode, partial(self._write, inode, offset, data), _written, unique)
        except SlotsNeeded:
            call = partial(self._write, inode, offset, memoryview(bytes(data)))
            wanted = self._edges(inode, offset, len(data))
        return self._fetch(wanted, unique, partial(self._change_again, inode, call, _written))

    @serving
    def serve_fallocate(self, inode: int, mode: int, offset: int, length: int) -> int:
        """Serve a discard as `Operations.serve_fallocate` does, or return DEFERRED."""
        unique = self._unique()
        call = partial(self._discard, inode, mode, offset, length)
        try:
            return self._change(inode, call, _nothing, unique)
        except SlotsNeeded:
            wanted = self._edges(inode, offset, length)
        return self._fetch(wanted, unique, partial(self._change_again, inode, call, _nothing))

    def _edges(self, inode: int, offset: int, length: int) -> Callable[[], list[int]]:
        """Return a function that returns the slots to read before a byte range can change.

        The range is clipped at the end of the file.
        """
        device = self._devices[inode]
        return partial(device.needed, offset, min(length, device.size - offset), edges=True)

    def _change(
        self, inode: int, call: Callable[[], int], payload: Callable[[int], bytes], unique: int
    ) -> int:
        """Write or discard; return DEFERRED if a page of the range is in flight to its slot.

        Args:
            inode: inode of the file.
            call: the plain handler with its arguments.
            payload: returns the payload of the answer for a result of the handler.
            unique: the kernel's number of the request.
        """
        device = self._devices[inode]
        ticket = device.begin()
        try:
            n = call()
        finally:
            device.end()
        if n < 0 or not ticket.left:
            return n

        def done() -> None:
            self._refused_writes += ticket.errno != 0
            self._reply(unique, ticket.errno, payload(n))

        ticket.done = done
        return DEFERRED

    def _change_again(
        self, inode: int, call: Callable[[], int], payload: Callable[[int], bytes], unique: int
    ) -> int:
        n = self._change(inode, call, payload, unique)
        if n >= 0:
            self._reply(unique, 0, payload(n))
        return n

    def look(self) -> None:
        """Free the buffers of read-aheads without a reader. Must be called periodically."""
        for ahead in self.aheads.values():
            ahead.look()

    def _fetch(
        self, wanted: Callable[[], list[int]], unique: int, again: Callable[[int], int]
    ) -> int:
        """Start to read slots, and repeat a call after that; return DEFERRED.

        Args:
            wanted: returns the slots that the call needs at that moment.
            unique: the kernel's number of the request.
            again: the call; it answers the request, or returns -errno, or returns DEFERRED.
        """
        fetch: list[SlotRead] = []

        def done() -> None:
            self._blame(unique)
            try:
                code = again(unique)
                if code < 0 and code != DEFERRED:
                    self._reply(unique, -code, b"")
            except SlotsNeeded:  # a page moved to the disk meanwhile
                self._fetch(wanted, unique, again)
            except Exception as error:  # noqa: BLE001 - the edge, as in `serving`
                self._reply(unique, self.failures.of_the_core("a deferred request", error), b"")
            finally:
                self._transfers.end(fetch[0])
                self._blame(0)

        fetch.append(self._transfers.fetch(wanted(), done))
        self._transfers.kick()
        return DEFERRED

    def _reply(self, unique: int, code: int, payload: bytes | memoryview) -> None:
        self._send(unique, code, b"" if code else payload)
