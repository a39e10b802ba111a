# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounds the processor time that one thread uses, whatever its clients ask for.

A token bucket whose tokens are seconds of processor time, measured rather than estimated: the
kernel's work for the thread (accepting, answering, closing a connection) counts as well as the
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
        share: of the time that passes, for example 0.01.
        most_s: processor time that may be saved up, and then used at once.
        clock: seconds that only go forward.
        used: processor time of the calling thread in seconds.
        sleep: waits for a number of seconds.
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
        """Return how long the thread has to wait before it may go on; 0 if it need not."""
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
