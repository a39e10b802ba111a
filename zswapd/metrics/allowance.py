# SPDX-License-Identifier: GPL-2.0-or-later
"""A bound on the processor time of one thread, independent of the number of requests.

It is a token bucket. A token is a second of processor time. The time is measured, not estimated:
the kernel's work for the thread (to accept, answer and close a connection) counts as well as the
interpreter's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Allowance:
    """The processor time that the calling thread may use.

    Args:
        share: processor time per second of elapsed time, for example 0.01.
        most_s: limit of processor time that can be saved and used at once, in seconds.
        clock: returns a monotonic time in seconds.
        used: returns the processor time of the calling thread in seconds.
        sleep: sleeps for a number of seconds.
    """

    def __init__(
        self,
        share: float,
        most_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.thread_time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._share, self._most_s = share, most_s
        self._clock, self._used, self._sleep = clock, used, sleep
        self._left_s = most_s
        self._looked_at, self._used_then = clock(), used()

    def debt_s(self) -> float:
        """Return the time in seconds that the thread must wait before it may go on, or 0."""
        now, used = self._clock(), self._used()
        saved = min(self._left_s + (now - self._looked_at) * self._share, self._most_s)
        self._left_s = saved - (used - self._used_then)
        self._looked_at, self._used_then = now, used
        return max(-self._left_s / self._share, 0.0)

    def wait(self) -> None:
        """Sleep until the thread may go on."""
        debt_s = self.debt_s()
        if debt_s:
            self._sleep(debt_s)
