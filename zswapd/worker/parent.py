# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker's connection to its supervisor: signs of life, calls, and whether it lives."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from zswapd.handover.state import Word

if TYPE_CHECKING:
    from zswapd.handover.state import SharedState


class Parent:
    """The supervisor that forked this process.

    Args:
        state: the shared state, whose words the supervisor reads.
        pid: process id of the supervisor.
    """

    def __init__(self, state: SharedState, pid: int) -> None:
        self._words = state.words
        self.pid = pid

    def is_alive(self) -> bool:
        """Say whether the supervisor lives: then it is still this process's parent."""
        return os.getppid() == self.pid

    def call(self) -> None:
        """Have the supervisor look at the words of the shared state."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has just died
                os.kill(self.pid, signal.SIGUSR1)

    def heartbeat(self) -> None:
        """Give a sign of life."""
        self._words[Word.TICKS] += 1
