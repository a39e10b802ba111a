# SPDX-License-Identifier: GPL-2.0-or-later
"""One thread for what blocks, started once: populating and punching memory while the event loop serves pages.

trio.to_thread would do, but it lets idle threads go and makes new ones when they are wanted, and a clone(2) that waits for
memory waits with the GIL held: for the very memory that only swapping can free. This thread is there from the start, and
stays.

Limits: one job at a time, in order; a job cannot be cancelled, whoever waits for it waits until it is done.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class Offload:
    """The thread. Ends with the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="offload", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    async def run(self, function: Callable[[*Ts], R], *args: *Ts) -> R:
        """Call a function in the thread and return what it returns; what it raises is raised here.

        Args:
            function: must not touch what belongs to the event loop's thread.
            args: its arguments.
        """
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        results: list[R] = []
        errors: list[BaseException] = []

        def job() -> None:
            try:
                results.append(function(*args))
            except BaseException as error:  # noqa: BLE001 - goes to whoever waits
                errors.append(error)
            token.run_sync_soon(done.set)

        self._jobs.put(job)
        with trio.CancelScope(shield=True):
            await done.wait()
        if errors:
            raise errors[0]
        return results[0]
