# SPDX-License-Identifier: GPL-2.0-or-later
"""The ballast: memory that the supervisor holds, and frees when swap-out is deadlocked.

A page that is swapped out passes through a kernel thread of the loop driver, which is an ordinary
task. The thread allocates memory for each request. At the min watermark it waits for free memory,
which only the requests that it holds could give. All other tasks wait for these requests, callers
of the OOM killer included. The daemon needs no memory, but gets no request. Linux 6.12 did this on
a machine with 448 MiB. A few free pages end the deadlock. The ballast has them: touched, locked,
and not used otherwise.

The supervisor frees PIECE_BYTES at a time, when in STILL_LOOKS looks no zone was above its low
watermark and no request came. It takes them again when memory is plenty. A machine that is only
short of memory sends requests all the time, and keeps its ballast.
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
PIECES = 2
STILL_LOOKS = 2
"""Looks in a row without a request and without free memory, before a piece is freed."""
_MADV_POPULATE_WRITE = 23


class Ballast:
    """Up to PIECES pieces of memory.

    Args:
        pressure: tells how much memory of the system is free.
    """

    def __init__(self, pressure: Pressure) -> None:
        self._pressure = pressure
        self._pieces: list[mmap.mmap] = []
        self._requests = -1
        self._still = 0

    @property
    def bytes_held(self) -> int:
        """Bytes that could be freed."""
        return len(self._pieces) * PIECE_BYTES

    def look(self, requests: int) -> None:
        """Free a piece, or take one again, by the system's free memory.

        Args:
            requests: number of requests that the worker has taken until now.
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
        except OSError:  # the memory is free, but committed (vm.overcommit_memory=2)
            return
        with contextlib.suppress(OSError):  # before Linux 5.14
            piece.madvise(_MADV_POPULATE_WRITE)
        for offset in range(0, PIECE_BYTES, mmap.PAGESIZE):
            piece[offset] = 1
        self._pieces.append(piece)

    def close(self) -> None:
        """Free all pieces."""
        while self._pieces:
            self._pieces.pop().close()
