# SPDX-License-Identifier: GPL-2.0-or-later
"""The handlers of FUSE requests for the files of the mount (inodes.py).

**Block files.** A block file behaves like a block device of fixed size. But `stat` reports a
regular file, because a loop device requires one.

- A read or a write across the end is short. A write that starts at the end gets ENOSPC.
- Punching and zeroing across the end is clipped with FALLOC_FL_KEEP_SIZE, otherwise it gets EINVAL.
- Name, owner, mode, times and size cannot change (EPERM).
- One open file at a time may change it (writers.py). Another open for writing waits CLOSING_S for
  the close of the first, and then gets ETXTBSY, the kernel's errno for changes of a swap file.
- While the daemon swaps off in order to end, an open gets EBUSY, so that no program swaps on to it.

**Text files** (texts.py). A read returns the content of the moment of the open. It uses direct I/O,
because the size is unknown. The data of one write is applied as a whole. Truncation has no effect
(`echo 1 >` truncates). The low bits of a handle are the inode, which a successor knows.

**Cached files** use the kernel's page cache. If a client is killed while it waits, its request ends
with EINTR (interrupts.py). A file that was removed while it was open gets ESTALE.

**Two ways in.** For block files, the hook (`_lowlevel.c`) calls `serve_read`, `serve_write` and
`serve_fallocate`: the page path. These are plain functions that return a length or -errno. All
other requests arrive as pyfuse3's coroutines. For requests without a handler here (xattrs, access,
poll) pyfuse3's class returns ENOSYS. The kernel then sends no more of them and answers them itself,
xattrs with EOPNOTSUPP.

Invariants: a handler raises no Exception but FUSEError, because another one would end the worker.
trio.Cancelled and KeyboardInterrupt pass through, because they are no Exceptions. Both decorators
and `Failures` enforce this. Only this module and texts.py make FUSEErrors.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import FUSEError

from zswapd.errors import ZswapdError
from zswapd.fuse import lowlevel
from zswapd.fuse.failures import Failures, is_internal
from zswapd.fuse.interrupts import Interrupts
from zswapd.fuse.texts import Texts, inode_of
from zswapd.fuse.writers import Writers
from zswapd.pages import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from zswapd.fuse.held import HeldWrites
    from zswapd.fuse.inodes import CachedFile, Directory, Node, TextFile

log = logging.getLogger(__name__)

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
_DISCARDING = {
    FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_ZERO_RANGE,
    FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
}

CACHE_SECONDS = 3600.0
"""Time in seconds for which the kernel may cache names and attributes that never change."""

CLOSING_S = 0.25
"""Longest wait in seconds of an open for writing for the close of another open file.

The kernel reports a close only after close(2) has returned, or after a loop device is detached.
"""

P = ParamSpec("P")
R = TypeVar("R")
AnyOperations = TypeVar("AnyOperations", bound="Operations")


def answering(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Return a coroutine handler whose exceptions become FUSEErrors (see the invariants)."""

    @functools.wraps(handler)
    async def guarded(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - see the module's invariants
            raise FUSEError(self.failures.errno_of(handler.__name__, error)) from None

    return guarded


def serving(
    handler: Callable[Concatenate[AnyOperations, P], int], name: str = ""
) -> Callable[Concatenate[AnyOperations, P], int]:
    """Return a function of the page path whose exceptions become -errno.

    An exception that leaves the core broken ends the process instead (failures.py).
    `enable_ki_protection` leaves Ctrl-C to the event loop. As an exception here it would make a
    swap-in fail.

    Args:
        handler: the function.
        name: name for the log; the function's own name if empty.
    """
    name = name or handler.__name__

    @functools.wraps(handler)
    @trio.lowlevel.enable_ki_protection
    def guarded(self: AnyOperations, /, *args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return handler(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - see the module's invariants
            return -self.failures.of_the_core(name, error)

    return guarded


def part_of(error: ZswapdError) -> int:
    """Return the number of bytes of a failed read that the reader may still get."""
    return 0 if is_internal(error) else error.filled


@dataclass(frozen=True, slots=True)
class OperationsStatistics:
    """Counts of the requests that arrive as coroutines, and of all failures.

    The hook counts the requests that it answers.
    """

    reads: int
    """Reads that arrived as coroutines."""
    writes: int
    """Writes that arrived as coroutines."""
    refused_writes: int
    """Writes that the file refused; the kernel keeps their pages."""
    refused_writers: int
    """Opens for writing and changes that were refused because of another writer."""
    let_go: int
    """Readers of cached files that were killed while they waited."""
    internal_errors: int
    """Unexpected exceptions, which are bugs."""
    failed_requests: int
    """Requests that failed with an expected error."""


class Operations(pyfuse3.Operations):
    """The handlers of one mount.

    Args:
        directory: names and inodes; its `block_files` are served.
        page_size: block size in bytes that statfs reports; a loop device uses it as the granularity
            of discards.
        takes_part: returns whether the present reader accepts a short answer and requests the rest
            again. The kernel's page cache (a private mapping of a block file) does not. It takes a
            short answer for the end of the file, and the loop device would lose all data behind it.

    Attributes:
        interrupts: releases killed readers of cached files.
        failures: counts and logs the failures.
        on_init: called when the kernel has agreed on the protocol; from then on requests are
            answered.
        is_closing: True while block files cannot be opened.
        writers: the open files that may change block files.
        page_size: as above.
        held: the writes that wait for memory; None if none should wait.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        directory: Directory,
        *,
        page_size: int = PAGE_SIZE,
        takes_part: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__()
        self._takes_part = takes_part
        self.interrupts = Interrupts()
        self.directory = directory
        self.failures = Failures()
        self.on_init: Callable[[], object] | None = None
        self.is_closing = False
        self.writers = Writers(directory.block_files)
        self.held: HeldWrites | None = None
        self.page_size = page_size
        self._files = directory.block_files
        self._refused_writes = 0
        self._reads = 0
        self._writes = 0
        self._texts = Texts()

    def init(self) -> None:
        """Call `on_init`: the kernel has agreed on the protocol."""
        if self.on_init is not None:
            self.on_init()

    def add_block_file(self, inode: int) -> None:
        """Serve a block file that was added to the directory."""
        self.writers.add(inode)

    def remove_block_file(self, inode: int) -> None:
        """Serve a block file no more; it is not in the directory, and not open for writing."""
        self.writers.remove(inode)

    def statistics(self) -> OperationsStatistics:
        """Return the counters."""
        return OperationsStatistics(
            reads=self._reads,
            writes=self._writes,
            refused_writes=self._refused_writes,
            refused_writers=self.writers.refused,
            let_go=self.interrupts.let_go,
            internal_errors=self.failures.internal_errors,
            failed_requests=self.failures.failed_requests,
        )

    def _read(self, inode: int, offset: int, out: memoryview) -> int:
        """Fill `out` with the bytes from `offset` on; return the number of bytes or -errno.

        If a page cannot be read, the answer has the pages before it. The reader then requests the
        rest again.
        """
        file = self._files[inode]
        length = len(out)
        if offset + length > file.size:
            length = max(file.size - offset, 0)
            out = out[:length]
            if not length:
                return 0
        try:
            file.read_into(offset, out)
        except ZswapdError as error:
            length = part_of(error)
            if not length or not self._takes_part():
                raise
        return length

    serve_read = serving(_read, "serve_read")

    def _write(self, inode: int, offset: int, data: memoryview) -> int:
        """Store `data` at `offset`; return the number of bytes inside the file or -errno.

        A refused write is an error as a whole, even if a part of its pages was stored. The kernel
        then keeps all its pages. The answer is never short: the loop device takes any number of
        bytes as a complete write and would lose the rest.
        """
        file = self._files[inode]
        length = len(data)
        if offset + length > file.size:
            length = max(file.size - offset, 0)
            data = data[:length]
            if not length:
                return -errno.ENOSPC
        reason = file.write(offset, data)
        if reason is None:
            return length
        self._refused_writes += 1
        return -reason.errno_

    @serving
    def serve_write(self, inode: int, offset: int, data: memoryview) -> int:
        """Store a write as `_write` does, or hold it until there is memory (held.py)."""
        return (self.held and self.held.hold(inode, offset, data)) or self._write(
            inode, offset, data
        )

    @serving
    def store_held(self, unique: int, inode: int, offset: int, data: memoryview) -> int:
        """Store a write that was held."""
        return self._write(inode, offset, data)

    def _discard(self, inode: int, mode: int, offset: int, length: int) -> int:
        """Discard a range if `mode` punches or zeroes it; return 0 or -errno."""
        file = self._files[inode]
        if mode not in _DISCARDING:
            return -errno.EOPNOTSUPP
        if offset < 0 or length <= 0 or offset >= file.size:
            return -errno.EINVAL
        if offset + length > file.size:
            if not mode & FALLOC_FL_KEEP_SIZE:  # the file would have to grow
                return -errno.EINVAL
            length = file.size - offset
        file.discard(offset, length)
        return 0

    serve_fallocate = serving(_discard, "serve_fallocate")

    @serving
    def admit(self, inode: int, handle: int) -> int:
        """Return 0 if a handle may change a file, otherwise -errno.

        The hook remembers the last admitted handle of each file.
        """
        return 0 if self.writers.admit(inode, handle) else -errno.ETXTBSY

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return `size` bytes from `off` on, or fewer at the end of the file."""
        self._reads += 1
        inode = inode_of(fh)
        cached = self._known(inode).cached
        if cached is None:
            return self._texts.read(fh, self._text(inode), off, size)
        with self.interrupts.letting_go():
            return await cached.read(off, size)
        raise FUSEError(errno.EINTR)

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Store `buf` at `off`; return the number of stored bytes, fewer at the end of the file."""
        self._writes += 1
        inode = inode_of(fh)
        cached = self._known(inode).cached
        if cached is not None:
            return await cached.write(off, buf)
        self._text(inode).write(buf)
        return len(buf)

    def _known(self, inode: int) -> Node:
        node = self.directory.node(inode)
        if node is None:  # it existed when the kernel got its number
            raise FUSEError(errno.ESTALE)
        return node

    def _text(self, inode: int) -> TextFile:
        text = self._existing(inode).text
        if text is None:
            raise FUSEError(errno.EISDIR)
        return text

    @answering
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a name in a directory; raise ENOENT if it does not exist."""
        return await self._refreshed(self.directory.lookup(parent_inode, name))

    @answering
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode; raise ESTALE if it was removed."""
        return await self._refreshed(self._known(inode))

    @answering
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Accept a request that changes nothing. Refuse others with EPERM: the size is fixed."""
        node = self._existing(inode)
        now = await self._refreshed(node)
        # ftruncate sets new times together with the size. New times alone are refused.
        times = fields.update_atime or fields.update_mtime or fields.update_ctime
        is_allowed = (
            (not fields.update_size or attr.st_size == now.st_size or node.text is not None)
            and (not fields.update_mode or attr.st_mode & 0o7777 == now.st_mode & 0o7777)
            and (not fields.update_uid or attr.st_uid == now.st_uid)
            and (not fields.update_gid or attr.st_gid == now.st_gid)
            and (not times or fields.update_size)
        )
        if not is_allowed:
            raise FUSEError(errno.EPERM)
        return now

    @answering
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the page size as block size. Without an answer, a loop device offers no discard.

        The numbers of blocks and files are 0, as those of /proc. `df` therefore omits the mount,
        and a monitor computes no ratio for an alarm.
        """
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = self.page_size
        data.f_namemax = 255
        return data

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Return the inode as the handle."""
        node = self._existing(inode)
        if not node.is_directory:
            raise FUSEError(errno.ENOTDIR)
        return inode

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory after the entry with inode `start_id`."""
        for node in self.directory.entries(fh, start_id):
            if not pyfuse3.readdir_reply(token, node.name, self._attributes(node), node.inode):
                break

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file. A block file uses direct I/O: the page cache would copy swapped pages."""
        node = self._existing(inode)
        if node.is_directory:
            raise FUSEError(errno.EISDIR)
        if node.text is not None:
            return pyfuse3.FileInfo(
                fh=self._texts.open(inode, node.text, flags), direct_io=True, keep_cache=False
            )
        if node.cached is not None:
            return await self._open_cached(inode, node.cached, flags)
        if flags & os.O_TRUNC:  # otherwise the kernel would take the file for empty
            raise FUSEError(errno.EPERM)
        if self.is_closing:
            raise FUSEError(errno.EBUSY)
        is_reader = flags & os.O_ACCMODE == os.O_RDONLY
        handle = inode if is_reader else await self._open_for_writing(node)
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    async def _open_for_writing(self, node: Node) -> int:
        """Return a handle after no other open file may change the file."""
        # lowlevel.current() is this handler's request only before the first await.
        request, process = lowlevel.current() if lowlevel is not None else (0, 0)
        with trio.move_on_after(CLOSING_S):
            await self.writers.until_free(node.inode, request)
        if self.is_closing:
            raise FUSEError(errno.EBUSY)
        if self.directory.node(node.inode) is None:  # it was removed meanwhile
            raise FUSEError(errno.ESTALE)
        handle = self.writers.open(node.inode, request)
        if not handle:
            name = node.name.decode(errors="backslashreplace")
            log.info(
                "%s is attached or open for writing: process %d, which also opened it for writing,"
                " got ETXTBSY",
                name,
                process,
                extra={"rate_limit": 5},
            )
            raise FUSEError(errno.ETXTBSY)
        return handle

    async def _open_cached(self, inode: int, cached: CachedFile, flags: int) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY and not cached.writable:
            raise FUSEError(errno.EROFS)
        if flags & os.O_TRUNC:
            raise FUSEError(errno.EPERM)
        with self.interrupts.letting_go():
            await cached.opened()
            return pyfuse3.FileInfo(fh=inode, direct_io=False, keep_cache=True)
        raise FUSEError(errno.EINTR)

    @answering
    async def release(self, fh: int) -> None:
        """Close an open file: drop its text and its right to write, or tell the cached file."""
        self.writers.close(fh)
        self._texts.close(fh)
        node = self.directory.node(inode_of(fh))
        if node is not None and node.cached is not None:
            node.cached.closed()

    @answering
    async def releasedir(self, fh: int) -> None:
        """Do nothing: an open directory has no state."""

    @answering
    async def flush(self, fh: int) -> None:
        """Do nothing: a write is stored when it is answered."""

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Flush a cached file. Writes to other files are stored when they are answered."""
        cached = self._known(inode_of(fh)).cached
        if cached is not None:
            await cached.sync()

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Do nothing: directories have no data."""

    async def forget(self, inode_list: Any) -> None:
        """Do nothing: inodes live as long as the mount."""

    @answering
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """Raise EINVAL: there are no symbolic links."""
        raise FUSEError(errno.EINVAL)

    @answering
    async def _not_permitted(self, *request: Any) -> Any:
        raise FUSEError(errno.EPERM)

    # Only the configuration decides which files exist.
    create: Any = _not_permitted
    mknod: Any = _not_permitted
    mkdir: Any = _not_permitted
    symlink: Any = _not_permitted
    link: Any = _not_permitted
    rename: Any = _not_permitted
    unlink: Any = _not_permitted
    rmdir: Any = _not_permitted

    def _existing(self, inode: int) -> Node:
        node = self.directory.node(inode)
        if node is None:
            raise FUSEError(errno.ENOENT)
        return node

    async def _refreshed(self, node: Node | None) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode; check the backing file of a cached file first."""
        if node is not None and node.cached is not None:
            with self.interrupts.letting_go() as scope:
                await node.cached.refresh()
            if scope.cancelled_caught:
                raise FUSEError(errno.EINTR)
        return self._attributes(node)

    def _attributes(self, node: Node | None) -> pyfuse3.EntryAttributes:
        if node is None:
            raise FUSEError(errno.ENOENT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_mode = node.mode
        entry.st_nlink = (
            2 + len(list(self.directory.subdirectories(node.inode))) if node.is_directory else 1
        )
        entry.st_size = node.size
        entry.st_blksize = self.page_size
        entry.st_blocks = node.size // 512  # a block file reports no holes
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.born_ns
        entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
        if node.cached is not None:
            entry.st_size, entry.st_blocks = node.cached.size, -(-node.cached.size // 512)
            entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.cached.mtime_ns
            entry.entry_timeout = entry.attr_timeout = node.cached.attribute_s
        return entry
