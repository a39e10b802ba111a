# SPDX-License-Identifier: GPL-2.0-or-later
"""What the supervisor knows of a stop that was asked for.

Whether the worker was told, and whether it goes on all the same.

A stop that is refused (the data has nowhere to go) is over: days later, a worker that follows a
dead one must not take it for an order. Where a service manager waits for the end, it stays one, and
is tried again.
"""

from __future__ import annotations

from zswapd.handover.state import Word

STOP_AGAIN_S = 15.0
"""Time between two attempts, where a service manager waits for the end.

What did not fit into memory may fit by now.
"""


class StopRequest:
    """A stop, wanted or not.

    Args:
        words: of the shared state.
        is_awaited: somebody waits for the end who cannot ask twice.

    Attributes:
        is_wanted: we are to stop.
    """

    def __init__(self, words: memoryview[int], *, is_awaited: bool) -> None:
        self.is_wanted = False
        self._words = words
        self._is_awaited = is_awaited
        self._sent: float | None = None
        self._refusals = 0  # of earlier stops

    def want(self) -> None:
        """Have the worker told at the next look."""
        self.forget_worker()
        self.is_wanted = True

    def forget_worker(self) -> None:
        """Take note that whoever serves now was told nothing yet.

        What its predecessor has refused stays so.
        """
        self._note_refusal()
        self._sent = None
        self._refusals = self._words[Word.STOPS_REFUSED]

    def is_under_way(self) -> bool:
        """Say whether the worker may end as it is told.

        So that nothing needs to be made ready for later.
        """
        return self.is_wanted and self._words[Word.STOPS_REFUSED] == self._refusals

    def is_due(self, now: float) -> bool:
        """Say whether the worker is to be told now, and take note that it is.

        Forget a stop that it has refused.

        Args:
            now: by time.monotonic.
        """
        self._note_refusal()
        is_time = self._sent is None or (self._is_awaited and now - self._sent >= STOP_AGAIN_S)
        if not self.is_wanted or not is_time:
            return False
        self._refusals = self._words[Word.STOPS_REFUSED]
        self._sent = now
        return True

    def _note_refusal(self) -> None:
        if self._sent is not None and not self._is_awaited and not self.is_under_way():
            self.is_wanted = False
