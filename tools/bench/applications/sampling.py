# SPDX-License-Identifier: GPL-2.0-or-later
"""What a contender costs while something runs: the most memory it had, and its processor time.

Memory is read by a thread once a second, of all contenders alike: a reading is the sum of the PSS
of a daemon's processes, or what the kernel says of its device. A peak between two readings is seen
of nobody; zram's own record of it, which no daemon has, is in the JSON (mem_used_max) and not
compared.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

from tools.bench.harness import system

if TYPE_CHECKING:
    from tools.bench.contenders import Contender

SAMPLE_S = 1.0


class Sampling(threading.Thread):
    """Reads while its body runs; a context manager.

    Args:
        contender: one that is on, from the beginning of the body to its end.

    Attributes:
        peak: bytes, the most of the readings; the last one is at the end of the body.
        cpu_s: processor time of its processes in the body, seconds; of those that live at its end.
        readings: how many there were.
    """

    def __init__(self, contender: Contender) -> None:
        super().__init__(daemon=True)
        self._contender = contender
        self._done = threading.Event()
        self._cpu_before: dict[int, float] = {}
        self.peak = 0
        self.cpu_s = 0.0
        self.readings = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._cpu_before = self._cpu()
        self.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Take the last reading."""
        self._done.set()
        self.join()
        self._read()
        self.cpu_s = sum(
            seconds - self._cpu_before.get(pid, 0.0) for pid, seconds in self._cpu().items()
        )

    def run(self) -> None:
        """Read until the body ends."""
        while not self._done.wait(SAMPLE_S):
            self._read()

    def _read(self) -> None:
        with contextlib.suppress(
            system.HarnessError, OSError
        ):  # it may have died, which its workload will tell
            self.peak = max(self.peak, self._contender.memory_now())
            self.readings += 1

    def _cpu(self) -> dict[int, float]:
        return {pid: system.processor_seconds(pid) for pid in self._contender.processes()}
