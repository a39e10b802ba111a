# SPDX-License-Identifier: GPL-2.0-or-later
"""At most one open file may change a block file.

A second one would destroy what is swapped out to it.

A loop device keeps the open file that it was given. So while a file is attached, every other open
for writing is refused, a second loop device among them; and while a program has the file open for
writing, no loop device gets it. Opens for reading are not counted. The kernel sends every change
with the handle of the open file: one that comes with another handle is refused too.

The handle of an open for writing is a serial number with the inode behind it, that of an open for
reading the inode alone. A successor gets the handles by `remember` and `recall`. Every grant is
remembered before it is answered, so the kernel knows no handle that the shared state lacks. The
other way round there can be one: the worker has died in between. The kernel then sends the request
again, which gets the same handle; or the process that had asked was killed, and the handle never
comes. Until it is certain, such a handle is a *guess*: the first change through any handle, or the
first look that finds no loop device over the file (`settle`), decides. Where a predecessor has left
no handles at all, each file begins with a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from zswapd.fuse.texts import INODE_BITS, inode_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_SERIALS = (1 << 64 - INODE_BITS) - 1
"""Serial numbers, from 1 on: a handle of 64 bits has room for them beside the inode."""


@dataclass(slots=True)
class _Writer:
    serial: int = 0
    """Of the last handle."""
    handle: int = 0
    """0 if no open file may change the block file."""
    request: int = 0
    """The kernel's number for the request that opened it."""
    is_guess: bool = False


class Writers:
    """The open files that may change the block files of a mount.

    Args:
        inodes: of the block files.

    Attributes:
        refused: opens for writing, and changes, that were refused because another open file may
            change the file.
        when_changed: called after a handle was granted, before the answer, and after one was given
            back.
        when_void: called with an inode when what the hook remembers of its writer is out of date.
        when_closed: called when an open file that may have changed the block file was closed.
    """

    def __init__(self, inodes: Iterable[int]) -> None:
        self.refused = 0
        self.when_changed: Callable[[], object] = lambda: None
        self.when_void: Callable[[int], object] = lambda _inode: None
        self.when_closed: Callable[[], object] = lambda: None
        self._writers = {inode: _Writer() for inode in inodes}
        self._given_back = trio.Event()

    def open(self, inode: int, request: int) -> int:
        """Return a new handle; 0 if another open file may change the file.

        Args:
            inode: of the file.
            request: the kernel's number for the request, 0 if that is not known.
        """
        writer = self._writers[inode]
        if writer.handle:
            if not request or writer.request != request:
                self.refused += 1
                return 0
        else:
            writer.serial = writer.serial % _SERIALS + 1
            writer.handle, writer.request = writer.serial << INODE_BITS | inode, request
        writer.is_guess = True  # should this process die before the answer
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
        """Say whether a handle may change a file, now that it is about to.

        It is certain from then on.
        """
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
        """Take note that an open file was closed."""
        inode = inode_of(handle)
        writer = self._writers.get(inode)
        if writer is None or writer.handle != handle:
            return
        if handle == inode:
            # Handles from before there were numbers: a reader may have had the same. Whether a loop
            # device is left will tell.
            writer.is_guess = True
        else:
            self._give_back(inode, writer)
        self.when_closed()

    def settle(self, inode: int, *, is_attached: bool) -> None:
        """Take note of whether a loop device is over a file: without one, a guess was wrong."""
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
        """Return the handle that may change a file, 0 if none may."""
        return self._writers[inode].handle

    def is_any_open(self) -> bool:
        """Say whether any block file is open for writing."""
        return any(writer.handle for writer in self._writers.values())

    # What a successor has to know.

    def remember(self) -> dict[str, Any]:
        """Return what `recall` takes, in terms of JSON."""
        return {
            str(inode): [w.serial, w.handle, w.request, w.is_guess]
            for inode, w in self._writers.items()
        }

    def recall(self, left: Mapping[str, Any] | None) -> None:
        """Go on with the handles that a predecessor has granted.

        Args:
            left: what its `remember` has returned; None if it has remembered none.
        """
        for inode, writer in self._writers.items():
            if left is None or str(inode) not in left:
                writer.handle, writer.is_guess = inode, True
            else:
                writer.serial, writer.handle, writer.request, writer.is_guess = left[str(inode)]
