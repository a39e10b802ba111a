# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads for blocking work, such as to populate and punch memory, while the event loop serves.

They are made at the start of a worker, and stay. trio.to_thread is no choice: it ends idle threads
and makes new ones. A clone(2) that waits for memory holds the GIL while it waits, and only this
process could free the memory, by swapping. The threads begin with the scheduling of their maker,
which is real-time where memory may be short (system/scheduling.py). Then they become ordinary.

Limits: jobs begin in order, one for each thread at a time. A job that has begun cannot be stopped.
Its caller waits for its end, or leaves it (`abandon`). Then the thread is busy until the system
call returns, which may be never.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import trio

from zswapd.system import set_normal

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Offload:
    """Threads with one queue. They end with the process.

    Args:
        name: name of the threads in `ps -L`, at most 15 bytes.
        threads: number of threads.

    Attributes:
        unfinished: number of jobs that are not known to be done. Only the event loop's thread may
            use it.
    """

    def __init__(self, name: str = "offload", threads: int = 1) -> None:
        self.unfinished = 0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/thread-self/comm").write_text(threading.current_thread().name)
        set_normal()
        while True:
            self._jobs.get()()

    def hurry(self) -> None:
        """Give the threads ordinary scheduling at once.

        A job that began with a lower priority may wait for a processor for seconds.
        """
        for thread in self._threads:
            set_normal(thread.native_id or 0)

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, abandon: bool = False) -> R:
        """Call a function in a thread; return its result, or raise its exception.

        Args:
            function: the function. It must not touch objects of the event loop's thread.
            args: its arguments.
            abandon: if the waiting task is cancelled, leave without the result. Otherwise the task
                waits for the end even then.
        """
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        results: list[R] = []
        errors: list[BaseException] = []

        def finish() -> None:
            self.unfinished -= 1
            done.set()

        def job() -> None:
            try:
                results.append(function(*args))
            except BaseException as error:  # noqa: BLE001 - the waiting task raises it
                errors.append(error)
            with contextlib.suppress(trio.RunFinishedError):  # the event loop has ended
                token.run_sync_soon(finish)

        self.unfinished += 1
        self._jobs.put(job)
        with trio.CancelScope(shield=not abandon):
            await done.wait()
        if errors:
            raise errors[0]
        return results[0]
