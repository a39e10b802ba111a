# SPDX-License-Identifier: GPL-2.0-or-later
"""Open text files: each has the content that was made when it was opened.

A handle is the inode's number with a number of the open file in front. A successor, which the
kernel goes on asking by it, knows the inode and has no content: it makes one anew for a reader at
offset 0, says "end" to one behind it, and fails one in the middle with EIO rather than joining two
versions.
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
"""Of a handle, those that name the inode; the others number open files."""
_INODE_MASK = (1 << INODE_BITS) - 1
_OPENS = (1 << 64 - INODE_BITS) - 1
"""Numbers of open files, from 1 on: what a handle of 64 bits has room for besides the inode."""


def inode_of(handle: int) -> int:
    """Return the inode that a handle of any file is of."""
    return handle & _INODE_MASK


class Texts:
    """The contents of open text files."""

    def __init__(self) -> None:
        self._contents: dict[int, bytes] = {}
        self._opens = (
            time.monotonic_ns() % _OPENS
        )  # not where a predecessor began, whose handles may still be in use

    def open(self, inode: int, text: TextFile, flags: int) -> int:
        """Return a new handle.

        Raises:
            FUSEError: it is to be written, and cannot be.
        """
        mode = flags & os.O_ACCMODE
        if (
            mode != os.O_RDONLY and not text.writable
        ):  # root's capabilities let everything through that modes forbid
            raise FUSEError(errno.EACCES)
        self._opens = self._opens % _OPENS + 1
        handle = self._opens << INODE_BITS | inode
        if mode != os.O_WRONLY:
            self._contents[handle] = text.read()
        return handle

    def read(self, handle: int, text: TextFile, offset: int, size: int) -> bytes:
        """Return part of the content.

        Raises:
            FUSEError: it was opened when another worker served, and was read in part.
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
        """Forget the content."""
        self._contents.pop(handle, None)
