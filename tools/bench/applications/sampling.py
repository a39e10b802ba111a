# SPDX-License-Identifier: GPL-2.0-or-later
"""The cost of a contender during a run: its peak memory and its processor time.

A thread reads the memory once a second, the same way for all contenders. A reading is the sum of
the PSS of a daemon's processes, or the kernel's figure for its device. A peak between two readings
is missed. zram records its own peak, which no daemon does; mem_used_max is in the JSON, and is not
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
    """A context manager whose thread reads a contender's memory while the body runs.

    Args:
        contender: a contender that is started before the body and stopped after it.

    Attributes:
        peak: the largest reading in bytes; the last reading is at the end of the body.
        cpu_s: processor seconds in the body, of the processes that live at its end.
        readings: the number of readings.
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
        """Start the thread."""
        self._cpu_before = self._cpu()
        self.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Stop the thread and take the last reading."""
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
        # If the contender has died, the workload reports it.
        with contextlib.suppress(system.HarnessError, OSError):
            self.peak = max(self.peak, self._contender.memory_now())
            self.readings += 1

    def _cpu(self) -> dict[int, float]:
        return {pid: system.processor_seconds(pid) for pid in self._contender.processes()}
