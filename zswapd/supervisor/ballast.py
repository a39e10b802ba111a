# SPDX-License-Identifier: GPL-2.0-or-later
"""A little memory to throw overboard when nothing moves any more.

Between a page that is swapped out and the daemon stands the loop driver's kernel thread, an
ordinary task. It takes some memory for each request, and where free memory has fallen to the min
watermark it waits until there is more: which only the requests that it holds could bring. Everybody
else waits for those, the OOM killer's callers included, and the daemon, which has all it needs,
hears of nothing (seen with Linux 6.12 on a box of 448 MiB). A few pages end it. The supervisor has
them: locked, touched, of no use otherwise.

Thrown are PIECE_BYTES at a time, when in two looks no zone was above its low watermark and no
request had come; taken back when there is plenty. A box that is merely short of memory sends
requests all the time, and keeps its ballast.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zswapd.core.reclaim.pressure import Pressure

log = logging.getLogger(__name__)

PIECE_BYTES = 2 << 20
PIECES = 4
STILL_LOOKS = 2
"""Looks in a row at which nothing had moved."""
_MADV_POPULATE_WRITE = 23


class Ballast:
    """Up to PIECES pieces of memory.

    Args:
        pressure: tells how much memory is free.
    """

    def __init__(self, pressure: Pressure) -> None:
        self._pressure = pressure
        self._pieces: list[mmap.mmap] = []
        self._requests = -1
        self._still = 0

    @property
    def bytes_held(self) -> int:
        """What could be thrown."""
        return len(self._pieces) * PIECE_BYTES

    def look(self, requests: int) -> None:
        """Throw a piece, or take one back, as the system's memory asks for.

        Args:
            requests: how many the worker has taken so far.
        """
        marks = self._pressure.marks()
        if marks is None:
            return
        self._still = self._still + 1 if requests == self._requests and marks.above_low < 0 else 0
        self._requests = requests
        if self._still >= STILL_LOOKS and self._pieces:
            self._pieces.pop().close()
            log.warning(
                "no memory is free and no request comes: 2 MiB given back, %d left",
                self.bytes_held >> 20,
            )
        elif len(self._pieces) < PIECES and marks.above_high * mmap.PAGESIZE > 2 * PIECE_BYTES:
            self._take()

    def _take(self) -> None:
        try:
            piece = mmap.mmap(-1, PIECE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # free, and promised to others (vm.overcommit_memory=2)
            return
        with contextlib.suppress(OSError):  # before Linux 5.14
            piece.madvise(_MADV_POPULATE_WRITE)
        for offset in range(0, PIECE_BYTES, mmap.PAGESIZE):
            piece[offset] = 1
        self._pieces.append(piece)

    def close(self) -> None:
        """Give everything back."""
        while self._pieces:
            self._pieces.pop().close()
