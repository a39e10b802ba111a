# SPDX-License-Identifier: GPL-2.0-or-later
"""The release of readers that are killed while they wait for a slow file.

If a process gets a signal while it waits for an answer of FUSE, the kernel sends FUSE_INTERRUPT
once. The process then waits until it is answered, even after SIGKILL. Only SIGKILL may end a
request: a program whose timer fires does not expect that a read of a file fails with EINTR.
Therefore an interrupted request is recorded, and its task is checked every LOOK_S. The kernel turns
every fatal signal into a SIGKILL that is pending in all threads of the process.

For readers that bypass the page cache (O_DIRECT) the kernel sends no interrupt, and they cannot be
killed until they are answered. Therefore all readers that have waited for LOOK_S are checked too,
REQUESTS_PER_STEP at a time.

The hook reports the number of a handler's request and the interrupts.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from zswapd.fuse import lowlevel

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOK_S = 0.25
"""Time in seconds between two checks of a reader."""
REQUESTS_PER_STEP = 32
"""Checks of readers without an interrupt in a turn of the event loop; one takes about 20 µs."""
_SIGKILL_BIT = 1 << 8


@dataclass(slots=True)
class _Waiting:
    scope: trio.CancelScope
    thread: int
    since: float
    is_interrupted: bool = False


class Interrupts:
    """The requests in flight that may be released.

    Args:
        proc: the proc file system.

    Attributes:
        let_go: requests that were ended because their task was killed.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.let_go = 0
        self._proc = proc
        self._waiting: dict[int, _Waiting] = {}
        self._wanted = trio.Event()
        self._asked = trio.Event()

    @contextlib.contextmanager
    def letting_go(self) -> Iterator[trio.CancelScope]:
        """Yield a scope that is cancelled when the reader of the present request is killed.

        A handler must enter it before its first await.
        """
        number, thread = lowlevel.current() if lowlevel is not None else (0, 0)
        with trio.CancelScope() as scope:
            if number:
                self._waiting[number] = _Waiting(scope, thread, trio.current_time())
                self._asked.set()
            try:
                yield scope
            finally:
                self._waiting.pop(number, None)

    def interrupt(self, number: int) -> None:
        """Record that the kernel has interrupted a request. The hook calls this from its loop.

        Args:
            number: the kernel's number of the request.
        """
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting.is_interrupted = True
            self._wanted.set()

    async def run(self) -> None:
        """Check the waiting readers until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_at_interrupted)
            nursery.start_soon(self._look_at_others)

    async def _look_at_interrupted(self) -> None:
        while True:
            await self._wanted.wait()
            interrupted = [waiting for waiting in self._waiting.values() if waiting.is_interrupted]
            for waiting in interrupted:
                if self._is_killed(waiting.thread, or_gone=True):
                    waiting.is_interrupted = False
                    self._let_go(waiting)
            if interrupted:
                await trio.sleep(LOOK_S)
            else:
                self._wanted = trio.Event()

    async def _look_at_others(self) -> None:
        while True:
            await self._asked.wait()
            await trio.sleep(LOOK_S)
            # If one reader was killed, other threads of its process may wait too.
            while self._waiting and self._look_at_some():
                await trio.lowlevel.checkpoint()
            if not self._waiting:
                self._asked = trio.Event()

    def _look_at_some(self) -> bool:
        """Check the readers with the oldest checks; return whether any was killed."""
        end, found = trio.current_time() - LOOK_S, False
        for number, waiting in list(itertools.islice(self._waiting.items(), REQUESTS_PER_STEP)):
            if waiting.since > end:
                continue
            self._waiting[number] = self._waiting.pop(number)  # to the end
            # A thread that has gone does not count: other threads may wait for its asynchronous
            # request.
            if not waiting.scope.cancel_called and self._is_killed(waiting.thread, or_gone=False):
                self._let_go(waiting)
                found = True
        return found

    def _let_go(self, waiting: _Waiting) -> None:
        self.let_go += 1
        waiting.scope.cancel()

    def _is_killed(self, thread: int, *, or_gone: bool) -> bool:
        """Return whether a SIGKILL is pending for a thread.

        Args:
            thread: id of the thread.
            or_gone: the result for a thread that no longer exists.
        """
        try:
            status = (self._proc / str(thread) / "status").read_text(errors="replace")
        except OSError:
            return or_gone
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
        return bool(pending & _SIGKILL_BIT)
