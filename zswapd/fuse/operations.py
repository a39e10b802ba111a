# SPDX-License-Identifier: GPL-2.0-or-later
"""What the mount answers: FUSE requests in terms of files (inodes.py).

And the one place that makes FUSEError.

Each block file behaves as a block device of fixed size does, except that `stat` calls it a regular
file (a loop device wants one): a read across the end is short, a write across the end is short, one
that starts at the end gets ENOSPC; punching and zeroing are clipped with FALLOC_FL_KEEP_SIZE and
EINVAL without; its name, owner, mode, times and size cannot be changed (EPERM). One open file at a
time may change it (writers.py): another open for writing is refused with ETXTBSY, which the kernel
gives for changes of a swap file, after a moment in which the one before may be closed. While the
daemon takes back what is swapped out, to end, it cannot be opened (EBUSY), so
that no program swaps on to it then.

A text file (texts.py) is read as it was when it was opened, by direct I/O, since nobody knows its
size; what is written to it is taken whole, and truncating it means nothing (`echo 1 >` does it). A
handle is the inode's number, which a successor knows.

A cached file goes through the kernel's page cache. Whoever waits for one may be killed meanwhile:
the request then ends with EINTR (interrupts.py). One that was removed while it was open is ESTALE.

There are two ways in. With the hook (`_lowlevel.c`), reads, writes and fallocate call `serve_read`,
`serve_write` and `serve_fallocate`, plain functions that return a length or -errno: the page path.
Everything else, and without the hook reads and writes too, comes as pyfuse3's coroutines. Requests
that are not defined here (xattrs, access, poll) get ENOSYS from pyfuse3's class: the kernel then
stops asking and answers by itself, for xattrs with EOPNOTSUPP.

Invariant: no handler raises anything but FUSEError, which would end the worker; what is not an
Exception (trio.Cancelled, KeyboardInterrupt) passes through. Both decorators and `Failures` exist
for that.
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
"""How long the kernel may remember names and attributes that do not change while the mount lives.
"""

CLOSING_S = 0.25
"""How long an open for writing waits for another open file to be closed: of that,
the kernel tells after close(2) is done, and after a loop device has let go of its file."""

P = ParamSpec("P")
R = TypeVar("R")
AnyOperations = TypeVar("AnyOperations", bound="Operations")


def answering(
    handler: Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Decorate a coroutine handler.

    Any exception becomes a FUSEError, as the invariant above has it.
    """

    @functools.wraps(handler)
    async def guarded(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.other_requests += 1
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: see the invariant in the module's docstring
            raise FUSEError(self.failures.errno_of(handler.__name__, error)) from None

    return guarded


def serving(
    handler: Callable[Concatenate[AnyOperations, P], int], name: str = ""
) -> Callable[Concatenate[AnyOperations, P], int]:
    """Guard a function of the page path.

    Any exception becomes -errno, unless it leaves the core broken (failures.py).

    Ctrl-C is kept for the event loop by `enable_ki_protection`: as an exception in here it would
    fail
    a swap-in.

    Args:
        handler: the function.
        name: its name in the log, if not its own.
    """
    name = name or handler.__name__

    @functools.wraps(handler)
    @trio.lowlevel.enable_ki_protection
    def guarded(self: AnyOperations, /, *args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return handler(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the edge: see the invariant in the module's docstring
            return -self.failures.of_the_core(name, error)

    return guarded


def part_of(error: ZswapdError) -> int:
    """Return how many bytes of a read that has failed may be given to its reader."""
    return 0 if is_internal(error) else error.filled


@dataclass(frozen=True, slots=True)
class OperationsStatistics:
    """Requests that came as coroutines.

    And what went wrong with any (the hook counts what it answers).
    """

    reads: int
    """Reads that came as coroutines."""
    writes: int
    """Writes that came as coroutines."""
    others: int
    """All other coroutines: look-ups, opens, and so on."""
    refused_writes: int
    """Writes that the file turned away; the kernel keeps such pages."""
    refused_writers: int
    """Opens for writing, and changes, that were refused because another open file may change the
    file.
    """
    let_go: int
    """Readers of cached files that were killed while they waited."""
    internal_errors: int
    failed_requests: int


class Operations(pyfuse3.Operations):
    """The handlers of one mount.

    Args:
        directory: names and inodes; its `block_files` are served.
        page_size: what statfs reports as block size, bytes; a loop device takes it as the
            granularity of
        discards.
        takes_part: says whether the reader that is being answered takes part of what it asked for,
        and asks again for the rest. The kernel's page cache (a private mapping of a block file)
        does not: it takes a short answer for the file's end, and would keep the loop device from
        all that is behind it.

    Attributes:
        interrupts: by which readers of cached files are let go when they are killed.
        failures: the counters and the log of what went wrong.
        on_init: called when the kernel has agreed on the protocol, so that requests will be
            answered from now
        on.
        is_closing: block files cannot be opened.
        writers: the open files that may change block files.
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
        self.other_requests = 0
        self._page_size = page_size
        self._files = directory.block_files
        self._refused_writes = 0
        self._reads = 0
        self._writes = 0
        self._texts = Texts()

    def init(self) -> None:
        """Take note that the kernel's first message was understood."""
        if self.on_init is not None:
            self.on_init()

    def statistics(self) -> OperationsStatistics:
        """Return the counters."""
        return OperationsStatistics(
            reads=self._reads,
            writes=self._writes,
            others=self.other_requests - self._reads - self._writes,
            refused_writes=self._refused_writes,
            refused_writers=self.writers.refused,
            let_go=self.interrupts.let_go,
            internal_errors=self.failures.internal_errors,
            failed_requests=self.failures.failed_requests,
        )

    # The page path.

    def _read(self, inode: int, offset: int, out: memoryview) -> int:
        """Fill `out` from `offset` on; return how many bytes the file had for it, or -errno.

        Where a page cannot be read, the pages in front of it are the answer, and the reader asks
        again for the rest.
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
        """Store `data` at `offset`; return how many bytes fitted before the end of the file.

        Or -errno.

        A refused write is an error as a whole, even if some of its pages were stored: the kernel
        keeps them all. To the loop device, any number of bytes is a write that is done: a short
        answer would lose the others.
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

    serve_write = serving(_write, "serve_write")

    def _discard(self, inode: int, mode: int, offset: int, length: int) -> int:
        """Discard a range when that is what `mode` comes to; return 0 or -errno."""
        file = self._files[inode]
        if mode not in _DISCARDING:
            return -errno.EOPNOTSUPP
        if offset < 0 or length <= 0 or offset >= file.size:
            return -errno.EINVAL
        if offset + length > file.size:
            if not mode & FALLOC_FL_KEEP_SIZE:  # would have to grow
                return -errno.EINVAL
            length = file.size - offset
        file.discard(offset, length)
        return 0

    serve_fallocate = serving(_discard, "serve_fallocate")

    @serving
    def admit(self, inode: int, handle: int) -> int:
        """Return 0 if a file may be changed through a handle, else -errno.

        The hook asks once for each handle.
        """
        return 0 if self.writers.admit(inode, handle) else -errno.ETXTBSY

    # Without the hook, the same as coroutines.

    @answering
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return up to `size` bytes from `off` on; fewer at the end of the file."""
        self._reads += 1
        inode = inode_of(fh)
        if inode not in self._files:
            cached = self._known(inode).cached
            if cached is None:
                return self._texts.read(fh, self._text(inode), off, size)
            with self.interrupts.letting_go():
                return await cached.read(off, size)
            raise FUSEError(errno.EINTR)
        out = bytearray(size)
        n = self.serve_read(inode, off, memoryview(out))
        if n < 0:
            raise FUSEError(-n)
        return bytes(memoryview(out)[:n])

    @answering
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Store `buf` at `off` and return how many bytes of it were taken.

        Fewer at the end of the file.
        """
        self._writes += 1
        inode = inode_of(fh)
        if inode not in self._files:
            cached = self._known(inode).cached
            if cached is not None:
                return await cached.write(off, buf)
            self._text(inode).write(buf)
            return len(buf)
        n = self.admit(inode, fh) or self.serve_write(inode, off, memoryview(buf))
        if n < 0:
            raise FUSEError(-n)
        return n

    def _known(self, inode: int) -> Node:
        node = self.directory.node(inode)
        if node is None:  # it was there when the kernel got its number
            raise FUSEError(errno.ESTALE)
        return node

    def _text(self, inode: int) -> TextFile:
        text = self._existing(inode).text
        if text is None:
            raise FUSEError(errno.EISDIR)
        return text

    # The directory.

    @answering
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of what `name` is in a directory; ENOENT if there is nothing."""
        return await self._refreshed(self.directory.lookup(parent_inode, name))

    @answering
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of an inode.

        ESTALE for one that is no more: the kernel asks by a number that it was given.
        """
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
        """Allow what changes nothing; refuse the rest with EPERM, as a block device does not grow."""
        node = self._existing(inode)
        now = await self._refreshed(node)
        # ftruncate asks for new times along with the size; alone, they are refused.
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
        """Give the size of a page: without an answer, a loop device offers no discard.

        The mount has no blocks and no files of its own to run out of, as /proc has none: `df`
        leaves it out, and a monitor has no ratio to alarm at.
        """
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = self._page_size
        data.f_namemax = 255
        return data

    @answering
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Return the inode as handle."""
        node = self._existing(inode)
        if not node.is_directory:
            raise FUSEError(errno.ENOTDIR)
        return inode

    @answering
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the directory from behind `start_id` on; an entry's inode serves as its place."""
        for node in self.directory.entries(fh, start_id):
            if not pyfuse3.readdir_reply(token, node.name, self._attributes(node), node.inode):
                break

    # Files.

    @answering
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open for direct I/O: a second copy of swapped pages in the page cache would defeat the purpose."""
        node = self._existing(inode)
        if node.is_directory:
            raise FUSEError(errno.EISDIR)
        if node.text is not None:
            return pyfuse3.FileInfo(
                fh=self._texts.open(inode, node.text, flags), direct_io=True, keep_cache=False
            )
        if node.cached is not None:
            return await self._open_cached(inode, node.cached, flags)
        if flags & os.O_TRUNC:  # granted, it would make the kernel take the file for empty
            raise FUSEError(errno.EPERM)
        if self.is_closing:
            raise FUSEError(errno.EBUSY)
        is_reader = flags & os.O_ACCMODE == os.O_RDONLY
        handle = inode if is_reader else await self._open_for_writing(node)
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    async def _open_for_writing(self, node: Node) -> int:
        """Return a handle, once no other open file may change the file."""
        # before the first await
        request, process = lowlevel.current() if lowlevel is not None else (0, 0)
        with trio.move_on_after(CLOSING_S):
            await self.writers.until_free(node.inode, request)
        if self.is_closing:
            raise FUSEError(errno.EBUSY)
        handle = self.writers.open(node.inode, request)
        if not handle:
            name = node.name.decode(errors="backslashreplace")
            log.info(
                "%s is attached or open for writing: process %d, which opened it for writing too,"
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
        """Forget an open file: a text's content, a writer's grant; and tell of a cached one."""
        self.writers.close(fh)
        self._texts.close(fh)
        node = self.directory.node(inode_of(fh))
        if node is not None and node.cached is not None:
            node.cached.closed()

    @answering
    async def releasedir(self, fh: int) -> None:
        """Nothing is kept per open directory."""

    @answering
    async def flush(self, fh: int) -> None:
        """Nothing is held back: a write is stored when it is answered."""

    @answering
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Pass it on for a cached file.

        Elsewhere nothing is held back: a write is stored when it is answered.
        """
        cached = self._known(inode_of(fh)).cached
        if cached is not None:
            await cached.sync()

    @answering
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Nothing is held back."""

    async def forget(self, inode_list: Any) -> None:
        """Inodes live as long as the mount."""

    @answering
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        """There are no symbolic links."""
        raise FUSEError(errno.EINVAL)

    @answering
    async def _not_permitted(self, *request: Any) -> Any:
        raise FUSEError(errno.EPERM)

    # What the directory is made of is decided by the configuration.
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
        """Return attributes that are not older than the kernel may believe."""
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
        entry.st_blksize = self._page_size
        entry.st_blocks = node.size // 512  # no holes, as far as anybody outside is concerned
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.born_ns
        entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
        if node.cached is not None:
            entry.st_size, entry.st_blocks = node.cached.size, -(-node.cached.size // 512)
            entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = node.cached.mtime_ns
            entry.entry_timeout = entry.attr_timeout = node.cached.attribute_s
        return entry
