# SPDX-License-Identifier: GPL-2.0-or-later
"""Open text files. Each has the content that was made when it was opened.

A handle has the inode's number in its low bits and the number of the open file in its high bits.
After a takeover the kernel continues to use the handle. The successor knows the inode but not the
content. It makes a new content for a read at offset 0, and returns no data for a read at the end or
beyond. A read in the middle gets EIO, because it would join two versions.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from pyfuse3 import FUSEError

if TYPE_CHECKING:
    from zswapd.fuse.inodes import TextFile

INODE_BITS = 42
"""Low bits of a handle that hold the inode. The other bits hold the number of the open file."""
_INODE_MASK = (1 << INODE_BITS) - 1
_OPENS = (1 << 64 - INODE_BITS) - 1
"""Highest number of an open file; the lowest is 1."""


def inode_of(handle: int) -> int:
    """Return the inode of a handle of any file."""
    return handle & _INODE_MASK


class Texts:
    """The contents of open text files."""

    def __init__(self) -> None:
        self._contents: dict[int, bytes] = {}
        # Not the start of the predecessor's numbers, because its handles may still be in use.
        self._opens = time.monotonic_ns() % _OPENS

    def open(self, inode: int, text: TextFile, flags: int) -> int:
        """Return a new handle.

        Raises:
            FUSEError: the flags ask for writing, and the file is read only.
        """
        mode = flags & os.O_ACCMODE
        # The kernel does not refuse this: root's capabilities override the mode.
        if mode != os.O_RDONLY and not text.writable:
            raise FUSEError(errno.EACCES)
        self._opens = self._opens % _OPENS + 1
        handle = self._opens << INODE_BITS | inode
        if mode != os.O_WRONLY:
            self._contents[handle] = text.read()
        return handle

    def read(self, handle: int, text: TextFile, offset: int, size: int) -> bytes:
        """Return part of the content.

        Raises:
            FUSEError: another worker opened the file, and the offset is in the middle.
        """
        content = self._contents.get(handle)
        if content is None:
            content = text.read()
            if 0 < offset < len(content):
                raise FUSEError(errno.EIO)
            if not offset:
                self._contents[handle] = content
        return content[offset : offset + size]

    def close(self, handle: int) -> None:
        """Drop the content."""
        self._contents.pop(handle, None)
