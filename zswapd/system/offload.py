# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads for what blocks, started once.

Populating and punching memory, files of the cache, while the event loop serves pages.

trio.to_thread would do, but it lets idle threads go and makes new ones when they are wanted, and a
clone(2) that waits for memory waits with the GIL held: for the very memory that only swapping can
free. These threads are there from the start, and stay. They begin as their maker is, a real-time
task where memory may be short (system/scheduling.py), and are ordinary ones from then on.

Limits: jobs are begun in order, as many at a time as there are threads; one that has begun cannot
be stopped. Whoever waits for it waits until it is done, or leaves it behind (`abandon`): then the
thread is busy until the system call returns, if ever.
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
        name: of the threads, as `ps -L` shows it, at most 15 bytes.
        threads: how many.

    Attributes:
        unfinished: jobs given and not known to be done; of the event loop's thread.
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
        """Make the threads ordinary ones, at once.

        A job that began as an idle task may wait for a processor for seconds.
        """
        for thread in self._threads:
            set_normal(thread.native_id or 0)

    async def run(self, function: Callable[[*Ts], R], *args: *Ts, abandon: bool = False) -> R:
        """Call a function in a thread and return what it returns; what it raises is raised here.

        Args:
            function: must not touch what belongs to the event loop's thread.
            args: its arguments.
            abandon: when the waiting task is cancelled, go without the result; otherwise it waits
                all the same.
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
            except BaseException as error:  # noqa: BLE001 - goes to whoever waits
                errors.append(error)
            with contextlib.suppress(trio.RunFinishedError):  # everybody has left
                token.run_sync_soon(finish)

        self.unfinished += 1
        self._jobs.put(job)
        with trio.CancelScope(shield=not abandon):
            await done.wait()
        if errors:
            raise errors[0]
        return results[0]
