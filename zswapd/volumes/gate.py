# SPDX-License-Identifier: GPL-2.0-or-later
"""How many requests of volumes there may be at once, so that swap's are always heard.

Each takes a task of pyfuse3's while it waits, and if it goes around the page cache (O_DIRECT) one
of the kernel's places for background requests. Both are bounded, and shared with swap. So all
volumes together have a bound (`Places`), of which each gate has a few for itself: files that hang
cannot take the last. A write takes as many as its data has pieces of `PIECE_BYTES`, for that waits
in our memory: one system call that goes around the page cache comes as a thousand requests.

Of the requests that go through one gate, `MOST` are under way; the others wait for their turn,
first come, first served, for as long as the file answers anybody. When none was answered for
`PATIENCE_S`, they fail: threads of a program that pile up at a file that hangs are of no use, and
would take the places of other volumes.
"""

from __future__ import annotations

import collections
import contextlib
from typing import TYPE_CHECKING

import trio

from zswapd.errors import VolumeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from zswapd.volumes.statistics import VolumeCounters

MOST = 128
"""Requests under way at one gate: as many as a loop device has."""
PATIENCE_S = 15.0
"""How long requests wait for a turn while none is answered.

Longer than a device that hangs for 10 s and goes on.
"""
SHARE = 16
"""Places that are each gate's own: for the longest write, or so many reads."""
PIECE_BYTES = 64 << 10
"""Data that takes a place."""


class Places:
    """The bound for all gates together.

    Args:
        total: requests that may wait at once.
        gates: how many there are at most.
    """

    def __init__(self, total: int, gates: int) -> None:
        self._share = min(SHARE, total // max(gates, 1))
        self._spare = total - gates * self._share

    def change(self, held: int, now: int) -> bool:
        """Let a gate have `now` places instead of `held`; return whether there are as many."""
        more = max(now - self._share, 0) - max(held - self._share, 0)
        if more > self._spare:
            return False
        self._spare -= more
        return True


class Gate:
    """Where requests of one kind to one volume pass. Belongs to the event loop's thread.

    Args:
        path: of the backing file, for messages.
        places: from which each takes one.
        counters: of the volume.
    """

    def __init__(self, path: str, places: Places, counters: VolumeCounters) -> None:
        self._path = path
        self._places = places
        self._counters = counters
        self._inside = 0
        self._taken = 0
        self._queue: collections.deque[trio.Event] = collections.deque()
        self._full_since = 0.0  # and nobody has left since then

    @property
    def held(self) -> int:
        """Requests that are under way or wait for their turn."""
        return self._inside + len(self._queue)

    @contextlib.asynccontextmanager
    async def passed(self, size: int) -> AsyncIterator[None]:
        """Around a request; waits for its turn.

        Args:
            size: bytes of data that wait with it.

        Raises:
            VolumeError: there are too many, and none is answered.
        """
        weight = max(-(-size // PIECE_BYTES), 1)
        if not self._places.change(self._taken, self._taken + weight):
            raise self._refusal()
        self._taken += weight
        try:
            await self._enter()
            try:
                yield
            finally:
                self._leave()
        finally:
            self._places.change(self._taken, self._taken - weight)
            self._taken -= weight

    def _refusal(self) -> VolumeError:
        self._counters.turned_away += 1
        return VolumeError(f"{self.held} requests wait for {self._path}")

    async def _enter(self) -> None:
        if self._inside < MOST:
            self._inside += 1
            self._full_since = trio.current_time()
            return
        turn = trio.Event()
        self._queue.append(turn)
        try:
            while not turn.is_set() and trio.current_time() < self._full_since + PATIENCE_S:
                with trio.move_on_at(self._full_since + PATIENCE_S):
                    await turn.wait()
        except BaseException:
            if turn.is_set():  # killed in the turn of the event loop in which its turn came
                self._leave()
            else:
                self._queue.remove(turn)
            raise
        if not turn.is_set():
            refusal = self._refusal()
            self._queue.remove(turn)
            raise refusal

    def _leave(self) -> None:
        self._full_since = trio.current_time()
        if self._queue:
            self._queue.popleft().set()
        else:
            self._inside -= 1

    def open_wide(self) -> None:
        """Let everybody in: the volume was removed, and nobody waits for its file any more."""
        self._inside += len(self._queue)
        while self._queue:
            self._queue.popleft().set()
