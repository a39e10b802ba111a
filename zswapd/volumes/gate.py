# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounds on the waiting requests of volumes, so that swap's requests are always served.

Each waiting request takes a task of pyfuse3. A request that bypasses the page cache (O_DIRECT) also
takes one of the kernel's slots for background requests. Both are bounded and shared with swap. So
all volumes together have a bound (`Places`). Each gate has a few places of its own, which a hanging
file of another volume cannot take. A write takes one place for every `PIECE_BYTES` of its data,
because the data waits in our memory. A single O_DIRECT system call can arrive as a thousand
requests.

`MOST` requests of a gate are under way at once. The others wait in order, as long as the file
answers any request. They fail after `PATIENCE_S` without an answer. More threads of a program that
wait for a hanging file are of no use, and would take the places of other volumes.
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
"""Maximum of requests under way at one gate: as many as a loop device has."""
PATIENCE_S = 15.0
"""Seconds that requests wait for a turn while none is answered.

The time is longer than the stall of a device that hangs for 10 s and then goes on.
"""
SHARE = 16
"""Places reserved for each gate: for the longest write, or 16 reads."""
PIECE_BYTES = 64 << 10
"""Bytes of data per place."""


class Places:
    """The bound on all gates together.

    Args:
        total: requests that may wait at once.
        gates: maximum number of gates.
    """

    def __init__(self, total: int, gates: int) -> None:
        self._share = min(SHARE, total // max(gates, 1))
        self._spare = total - gates * self._share

    def change(self, held: int, now: int) -> bool:
        """Change a gate's places from `held` to `now`; return False if there are too few."""
        more = max(now - self._share, 0) - max(held - self._share, 0)
        if more > self._spare:
            return False
        self._spare -= more
        return True


class Gate:
    """The entrance for requests of one kind to one volume, used in the event loop's thread only.

    Args:
        path: of the backing file, for messages.
        places: the places that requests take.
        counters: of the volume.
    """

    def __init__(self, path: str, places: Places, counters: VolumeCounters) -> None:
        self._path = path
        self._places = places
        self._counters = counters
        self._inside = 0
        self._taken = 0
        self._queue: collections.deque[trio.Event] = collections.deque()
        self._full_since = 0.0  # no request has left since then

    @property
    def held(self) -> int:
        """Requests that are under way or wait for their turn."""
        return self._inside + len(self._queue)

    @contextlib.asynccontextmanager
    async def passed(self, size: int) -> AsyncIterator[None]:
        """Hold a place around a request, and wait for the request's turn.

        Args:
            size: bytes of data that wait with the request.

        Raises:
            VolumeError: too many requests wait, or no request is answered.
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
            if turn.is_set():  # the turn came in the same step of the event loop as the kill
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
        """Admit all waiting requests, because the volume was removed."""
        self._inside += len(self._queue)
        while self._queue:
            self._queue.popleft().set()
