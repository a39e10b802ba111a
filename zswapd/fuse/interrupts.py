# SPDX-License-Identifier: GPL-2.0-or-later
"""Readers that are killed while they wait for a slow file are let go.

A process that waits for an answer from FUSE and gets a signal has the kernel send FUSE_INTERRUPT,
once, and then waits on until it is answered, even if the signal was SIGKILL. Only that may end a
request: a program whose timer has fired does not expect a read of a file to fail with EINTR. So an
interrupted request is remembered, and its task looked at now and then: the kernel turns every fatal
signal into a SIGKILL that is pending in all threads of its process.

Of readers that go around the page cache (O_DIRECT) the kernel says nothing, and they cannot be
killed until they are answered. So whoever waits for long is looked at too, a few at a time.

The hook says which request the handler that runs first was called for, and passes interrupts on.
Without it nobody is let go.
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
"""Time between two looks at whoever was interrupted, or has waited for that long.

And goes on waiting.
"""
REQUESTS_PER_STEP = 32
"""Looks at others than the interrupted in a turn of the event loop: some 20 µs each."""
_SIGKILL_BIT = 1 << 8


@dataclass(slots=True)
class _Waiting:
    scope: trio.CancelScope
    thread: int
    since: float
    is_interrupted: bool = False


class Interrupts:
    """The requests under way that may be let go.

    Args:
        proc: the proc file system.

    Attributes:
        let_go: requests that were ended since their task was killed.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.let_go = 0
        self._proc = proc
        self._waiting: dict[int, _Waiting] = {}
        self._wanted = trio.Event()
        self._asked = trio.Event()

    @contextlib.contextmanager
    def letting_go(self) -> Iterator[trio.CancelScope]:
        """Around what a handler waits for, entered before its first await.

        Cancelled when whoever asked is killed.
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
        """Take note that the kernel has interrupted a request.

        Called by the hook, from its loop.
        """
        waiting = self._waiting.get(number)
        if waiting is not None:
            waiting.is_interrupted = True
            self._wanted.set()

    async def run(self) -> None:
        """Look after those who wait, until cancelled."""
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
            # Where one was killed there may be all threads of its process.
            while self._waiting and self._look_at_some():
                await trio.lowlevel.checkpoint()
            if not self._waiting:
                self._asked = trio.Event()

    def _look_at_some(self) -> bool:
        """Look at those not looked at for longest; return whether any was killed."""
        end, found = trio.current_time() - LOOK_S, False
        for number, waiting in list(itertools.islice(self._waiting.items(), REQUESTS_PER_STEP)):
            if waiting.since > end:
                continue
            self._waiting[number] = self._waiting.pop(number)  # to the end
            # Who is gone has left others to wait for what it asked for, if the request was an
            # asynchronous one.
            if not waiting.scope.cancel_called and self._is_killed(waiting.thread, or_gone=False):
                self._let_go(waiting)
                found = True
        return found

    def _let_go(self, waiting: _Waiting) -> None:
        self.let_go += 1
        waiting.scope.cancel()

    def _is_killed(self, thread: int, *, or_gone: bool) -> bool:
        """Say whether a SIGKILL is pending for a thread, or, if that counts, it is gone."""
        try:
            status = (self._proc / str(thread) / "status").read_text(errors="replace")
        except OSError:
            return or_gone
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
        return bool(pending & _SIGKILL_BIT)
