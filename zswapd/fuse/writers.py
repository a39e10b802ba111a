# SPDX-License-Identifier: GPL-2.0-or-later
"""The open files that may change block files: at most one for each block file.

A second writer would overwrite swapped-out pages.

A loop device keeps its open file. While a file is attached, all other opens for writing are
refused, also that of a second loop device. While a program has the file open for writing, no loop
device can be attached. Opens for reading are not limited. The kernel sends each change with the
handle of the open file. A change with another handle is refused.

The handle of an open for writing is a serial number in the high bits and the inode in the low bits.
The handle of an open for reading is the inode. A successor gets the handles with `remember` and
`recall`.

Each grant is stored in the shared state before it is answered. The kernel therefore knows no handle
that the shared state lacks. If the worker dies in between, the shared state has a handle that the
kernel does not know. Either the kernel resends the request, which gets the same handle, or the
client was killed, and the handle is never used. Until this is decided, the handle is a *guess*. The
first change through any handle decides it. So does the first check that finds no loop device over
the file (`settle`). If a predecessor has left no handles, each file starts with a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from zswapd.fuse.texts import INODE_BITS, inode_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_SERIALS = (1 << 64 - INODE_BITS) - 1
"""Highest serial number; the lowest is 1."""


@dataclass(slots=True)
class _Writer:
    serial: int = 0
    """Serial number of the last handle."""
    handle: int = 0
    """Handle of the open file that may change the block file, or 0."""
    request: int = 0
    """The kernel's number for the request that opened it."""
    is_guess: bool = False


class Writers:
    """The open files that may change the block files of a mount.

    Args:
        inodes: inodes of the block files.

    Attributes:
        refused: opens for writing and changes that were refused because of another writer.
        when_changed: called after a grant, before its answer, and after a release.
        when_void: called with an inode when the handle that the hook remembers is out of date.
        when_closed: called after the close of an open file that may have changed the block file.
    """

    def __init__(self, inodes: Iterable[int]) -> None:
        self.refused = 0
        self.when_changed: Callable[[], object] = lambda: None
        self.when_void: Callable[[int], object] = lambda _inode: None
        self.when_closed: Callable[[], object] = lambda: None
        self._writers = {inode: _Writer() for inode in inodes}
        self._given_back = trio.Event()

    def add(self, inode: int) -> None:
        """Add a new block file, which is open nowhere."""
        self._writers[inode] = _Writer()

    def remove(self, inode: int) -> None:
        """Remove a block file, which has no open file for writing."""
        del self._writers[inode]

    def open(self, inode: int, request: int) -> int:
        """Return a new handle, or 0 if another open file may change the file.

        Args:
            inode: inode of the file.
            request: the kernel's number for the request, 0 if it is unknown.
        """
        writer = self._writers[inode]
        if writer.handle:
            if not request or writer.request != request:
                self.refused += 1
                return 0
        else:
            writer.serial = writer.serial % _SERIALS + 1
            writer.handle, writer.request = writer.serial << INODE_BITS | inode, request
        writer.is_guess = True  # for a successor, if this process dies before the answer
        self.when_void(inode)
        self.when_changed()
        writer.is_guess = False
        return writer.handle

    async def until_free(self, inode: int, request: int) -> None:
        """Wait until `open` would return a handle."""
        writer = self._writers[inode]
        while writer.handle and not (request and writer.request == request):
            await self._given_back.wait()

    def admit(self, inode: int, handle: int) -> bool:
        """Return whether a handle may change a file. This decides a guess."""
        writer = self._writers[inode]
        if writer.is_guess or not writer.handle:
            if writer.handle != handle:
                writer.handle, writer.request = handle, 0
                self.when_void(inode)
            writer.is_guess = False
        if writer.handle == handle:
            return True
        self.refused += 1
        return False

    def close(self, handle: int) -> None:
        """Release the handle of an open file that was closed."""
        inode = inode_of(handle)
        writer = self._writers.get(inode)
        if writer is None or writer.handle != handle:
            return
        if handle == inode:
            # A handle without a serial number, from an older program. A reader may have the same
            # handle, so `settle` decides by the loop device.
            writer.is_guess = True
        else:
            self._give_back(inode, writer)
        self.when_closed()

    def settle(self, inode: int, *, is_attached: bool) -> None:
        """Decide a guess: it was wrong if no loop device is attached to the file."""
        writer = self._writers[inode]
        if writer.is_guess and not is_attached:
            self._give_back(inode, writer)

    def _give_back(self, inode: int, writer: _Writer) -> None:
        writer.handle, writer.request, writer.is_guess = 0, 0, False
        self.when_void(inode)
        self.when_changed()
        self._given_back.set()
        self._given_back = trio.Event()

    def handle_of(self, inode: int) -> int:
        """Return the handle that may change a file, or 0."""
        return self._writers[inode].handle

    def is_any_open(self) -> bool:
        """Return whether any block file is open for writing."""
        return any(writer.handle for writer in self._writers.values())

    def remember(self) -> dict[str, Any]:
        """Return the handles for `recall` in a successor, as JSON values."""
        return {
            str(inode): [w.serial, w.handle, w.request, w.is_guess]
            for inode, w in self._writers.items()
        }

    def recall(self, left: Mapping[str, Any] | None) -> None:
        """Restore the handles that a predecessor has granted.

        Args:
            left: the result of its `remember`, or None.
        """
        for inode, writer in self._writers.items():
            if left is None or str(inode) not in left:
                writer.handle, writer.is_guess = inode, True
            else:
                writer.serial, writer.handle, writer.request, writer.is_guess = left[str(inode)]
