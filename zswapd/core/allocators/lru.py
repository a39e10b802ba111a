# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of use of runs of frames, as a doubly linked ring of frame numbers.

The ring has two machine words a frame number, 8 bytes, so an entry needs no allocation. Entry 0,
which no frame has, is both ends of the ring. The words are anonymous memory of the process, so the
order does not outlive it. They are populated chunk by chunk together with the frames that they
describe (`PageFrames.accompany`), so never on the page path.

The user adds the first frame of each run that it takes, and removes it before it frees the run.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING, Final

from zswapd.errors import ArenaError, InvariantError
from zswapd.pages import ADDRESS_SPACE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENTRY_BYTES: Final = 8
_MADV_POPULATE_WRITE: Final = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Lru:
    """Frame numbers from 1 to `end_frame` - 1 in the order of their last use.

    Each number is in the order at most once.

    Args:
        end_frame: the first frame number that does not exist.

    Attributes:
        entries: number of frame numbers in the order.
        end: a frame number above all frames with populated words. Frames below it may be
            unpopulated.

    Raises:
        ArenaError: the kernel has no address space.
    """

    def __init__(self, end_frame: int) -> None:
        self._length = round_up(end_frame * _ENTRY_BYTES, mmap.PAGESIZE)
        try:
            self._map = mmap.mmap(-1, self._length, ADDRESS_SPACE)
        except (OSError, ValueError) as error:
            raise ArenaError(
                f"no address space for an order of {end_frame} frames: {error}"
            ) from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Even words: the next more recently used frame. Odd words: the next less recently used
        # frame.
        self._words = memoryview(self._map).cast("I")
        self.entries = self.end = 0
        self.populate(0, 1)

    def populate(self, first: int, count: int) -> None:
        """Populate the words of `count` frames from `first` on.

        May block. Safe in any thread.

        Raises:
            ArenaError: no memory.
        """
        begin = first * _ENTRY_BYTES // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(round_up((first + count) * _ENTRY_BYTES, mmap.PAGESIZE), self._length)
        self.end = max(self.end, min(first + count, self._length // _ENTRY_BYTES))
        if _libc.madvise(self._address + begin, end - begin, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        # Linux before 5.14 lacks this advice. The words then get their memory at their first use.
        if code != errno.EINVAL:
            raise ArenaError(
                f"no memory for the order of use of {count} frames: {os.strerror(code)}"
            )

    # The page path.

    def add(self, frame: int) -> None:
        """Add a frame as the most recently used one; it must not be in the order."""
        words = self._words
        newest = words[1]
        words[newest * 2] = frame
        words[frame * 2] = 0
        words[frame * 2 + 1] = newest
        words[1] = frame
        self.entries += 1

    def touch(self, frame: int) -> None:
        """Mark a frame as the most recently used one; it must be in the order."""
        words = self._words
        if words[1] == frame:
            return
        newer, older = words[frame * 2], words[frame * 2 + 1]
        words[older * 2] = newer
        words[newer * 2 + 1] = older
        newest = words[1]
        words[newest * 2] = frame
        words[frame * 2] = 0
        words[frame * 2 + 1] = newest
        words[1] = frame

    def remove(self, frame: int) -> None:
        """Remove a frame; it must be in the order."""
        words = self._words
        newer, older = words[frame * 2], words[frame * 2 + 1]
        words[older * 2] = newer
        words[newer * 2 + 1] = older
        self.entries -= 1

    def oldest(self) -> int:
        """Return the least recently used frame, or 0 if there is none."""
        return self._words[0]

    # Off the page path.

    def __contains__(self, frame: int) -> bool:
        """Return whether a frame below `end` is in the order: its older neighbour names it."""
        return bool(frame and self._words[self._words[frame * 2 + 1] * 2] == frame)

    def __iter__(self) -> Iterator[int]:
        """Yield the frames, the least recently used one first.

        The frame yielded last may be removed or touched meanwhile.
        """
        frame = self._words[0]
        while frame:
            newer = self._words[frame * 2]
            yield frame
            frame = newer

    def check(self) -> None:
        """Verify that the links agree in both directions, and the count.

        Raises:
            InvariantError: they do not.
        """
        older = count = 0
        for frame in self:
            if self._words[frame * 2 + 1] != older or count == self.entries:
                raise InvariantError(
                    f"the order of use is broken at frame {frame}, entry {count} of {self.entries}"
                )
            if frame not in self:
                raise InvariantError(
                    f"frame {frame} is in the order of use, but its links do not say so"
                )
            older = frame
            count += 1
        if count != self.entries or self._words[1] != older:
            raise InvariantError(f"the order of use has {count} frames and counts {self.entries}")
