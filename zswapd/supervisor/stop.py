# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of a stop request: whether the worker was told, and whether it refused.

A worker refuses a stop when the swapped-out data does not fit into memory. The request is then
over: a worker that is forked days later must not obey it. If a service manager waits for the end,
the request stays, and is sent again every STOP_AGAIN_S.
"""

from __future__ import annotations

from zswapd.handover.state import Word

STOP_AGAIN_S = 15.0
"""Time between two attempts, s, while a service manager waits for the end.

Memory may have become free meanwhile.
"""


class StopRequest:
    """The stop request of one supervisor.

    Args:
        words: the words of the shared state.
        is_awaited: a service manager waits for the end, and does not ask twice.

    Attributes:
        is_wanted: the daemon is to stop.
    """

    def __init__(self, words: memoryview[int], *, is_awaited: bool) -> None:
        self.is_wanted = False
        self._words = words
        self._is_awaited = is_awaited
        self._sent: float | None = None
        self._refusals = 0  # the counter of refused stops, at the last request

    def want(self) -> None:
        """Request a stop. The worker is told at the next look."""
        self.forget_worker()
        self.is_wanted = True

    def forget_worker(self) -> None:
        """Note that a new worker serves, which was told nothing.

        A stop that the predecessor has refused stays refused.
        """
        self._note_refusal()
        self._sent = None
        self._refusals = self._words[Word.STOPS_REFUSED]

    def is_under_way(self) -> bool:
        """Say whether the worker may end by this request. A spare is then not needed."""
        return self.is_wanted and self._words[Word.STOPS_REFUSED] == self._refusals

    def is_due(self, now: float) -> bool:
        """Say whether the worker is to be told now, and note that it is told.

        A request that the worker has refused is dropped.

        Args:
            now: time.monotonic, s.
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
