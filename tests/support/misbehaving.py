# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations that break the rules of the hook, and two files that pyfuse3 serves beside them."""

from __future__ import annotations

import errno
import stat
from typing import Any

from tests.support.blockfile import PAGE
from zswapd.fuse.inodes import ROOT_INODE, Directory
from zswapd.fuse.operations import Operations

# isort: split
import pyfuse3  # after zswapd.fuse, which loads the hook first

RAISES, TOO_MUCH, NO_INT, NO_ERRNO, KEEPS_VIEW, KEEPS_SLICE, CHECKS_KEPT = range(7)
"""Pages of the block file; an access to each fails in a way of its own."""

NOTES = {b"note": 70, b"far": 1 << 20}
"""Files that coroutines serve: inode 70 is in the range of block files, the other one above it."""

NOTE_SIZE = 2 << 20


class MisbehavingOperations(Operations):
    """A block file whose functions misbehave page by page."""

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        self.kept: list[memoryview] = []
        self.notes = {inode: bytearray(NOTE_SIZE) for inode in NOTES.values()}

    def serve_read(self, inode: int, offset: int, out: memoryview) -> Any:
        """Misbehave, or read."""
        return (
            self._misbehave(offset, out)
            if offset // PAGE <= CHECKS_KEPT
            else super().serve_read(inode, offset, out)
        )

    def serve_write(self, inode: int, offset: int, data: memoryview) -> Any:
        """Misbehave, or write."""
        return (
            self._misbehave(offset, data)
            if offset // PAGE <= CHECKS_KEPT
            else super().serve_write(inode, offset, data)
        )

    def serve_fallocate(self, inode: int, mode: int, offset: int, length: int) -> Any:
        """Misbehave, or discard."""
        if offset // PAGE > CHECKS_KEPT:
            return super().serve_fallocate(inode, mode, offset, length)
        return self._misbehave(offset, memoryview(b""))

    def _misbehave(self, offset: int, view: memoryview) -> Any:
        match offset // PAGE:
            case 0:
                raise RuntimeError("out of a function that must not raise")
            case 1:
                return len(view) + 1
            case 2:
                return "three"
            case 3:
                return -100_000
            case 4:
                self.kept.append(view)
            case 5:
                self.kept.append(view[1:2])
            case _:
                self.check_kept()
        return len(view)

    def check_kept(self) -> None:
        """Read every kept view: this must be safe, or Python must refuse it."""
        for view in self.kept:
            try:
                view.tobytes()
            except ValueError:
                continue

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        """Find the notes, too."""
        if parent_inode == ROOT_INODE and name in NOTES:
            return await self.getattr(NOTES[name], ctx)
        return await super().lookup(parent_inode, name, ctx)

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        """Know the notes, too."""
        if inode not in self.notes:
            return await super().getattr(inode, ctx)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_size = inode, stat.S_IFREG | 0o600, NOTE_SIZE
        return entry

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        """Open the notes, too."""
        if inode not in self.notes:
            return await super().open(inode, flags, ctx)
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Read a note; the block file must not come here."""
        if fh not in self.notes:
            raise pyfuse3.FUSEError(errno.EBADF)
        return bytes(self.notes[fh][off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Write a note; the block file must not come here."""
        if fh not in self.notes:
            raise pyfuse3.FUSEError(errno.EBADF)
        self.notes[fh][off : off + len(buf)] = buf
        return len(buf)
