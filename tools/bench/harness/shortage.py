# SPDX-License-Identifier: GPL-2.0-or-later
"""A memory shortage for the time of a body, without danger for the machine.

A child process, the taker, populates memory until no zone has more free pages than its low
watermark. It takes more whenever a zone is above it again, because kswapd reclaimed pages or a
process freed some. So the machine is short of memory by the kernel's own measure, and stays so.

Before that, vm.watermark_scale_factor goes to its maximum, which puts the low watermark at 30 % of
memory. All memory below the watermark stays free, so the OOM killer kills no process. The end of
the body restores the factor.

Limits: other programs on the machine lose page cache to kswapd. The machine needs at least 3 GiB of
available memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tools.bench.harness import system
from tools.bench.harness.system import MIB, HarnessError, memory_available

FACTOR = Path("/proc/sys/vm/watermark_scale_factor")
MOST = 3000
STEP_MIB = 32
KEPT_MIB = 1024
"""The MiB of available memory that the taker never takes, whatever the watermarks say."""
END_LIMIT_S = 20.0
_ZONE = re.compile(
    r"pages free +(\d+)\n.*?low +(\d+)\n.*?managed +(\d+)\n.*?protection: \(([\d, ]*)\)", re.DOTALL
)

_TAKER = """
import mmap, os, sys, time
sys.path.insert(0, sys.argv[1])
from tools.bench.harness.shortage import STEP_MIB, pages_above_low
left = int(sys.argv[2])
open("/proc/self/oom_score_adj", "w").write("1000")
held, began, parent = [], False, os.getppid()
while os.getppid() == parent:
    above = pages_above_low()
    if above <= 0 and not began:
        began = True
        print(time.monotonic(), flush=True)
    if above <= -(STEP_MIB << 8):
        time.sleep(0.001)
    elif left:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        held.append(mmap.mmap(-1, STEP_MIB << 20, flags))
        left -= 1
    else:
        print("no more", flush=True)
        break
"""


def pages_above_low(text: str | None = None) -> int:
    """Return the pages above the low watermark, of the zone that has most of them.

    Pages that lowmem_reserve protects from this process do not count.
    """
    found = _ZONE.findall(Path("/proc/zoneinfo").read_text() if text is None else text)
    return max(
        int(free) - max(map(int, protected.split(",")), default=0) - int(low)
        for free, low, managed, protected in found
        if int(managed)
    )


class Shortage:
    """A context manager that makes a shortage; `wait` returns when the shortage has begun."""

    def __init__(self) -> None:
        self._before = ""
        self._taker: subprocess.Popen[str] | None = None

    def wait(self) -> float:
        """Wait for the shortage, once; return its begin as a value of time.monotonic().

        Raises:
            HarnessError: the taker has taken all it may, and the machine is not short.
        """
        assert self._taker is not None
        assert self._taker.stdout is not None
        line = self._taker.stdout.readline()
        if not line or line.startswith("no"):
            raise HarnessError(
                "the machine is not short of memory, though all that may be taken is taken",
                hint="stop other programs",
            )
        return float(line)

    def __enter__(self) -> Self:
        """Raise the watermarks and start the taker.

        Raises:
            HarnessError: too little memory is available.
        """
        available = memory_available() // MIB - KEPT_MIB
        if available < 2 * KEPT_MIB:
            raise HarnessError(
                f"{available + KEPT_MIB} MiB of memory are available, which is too little to take"
                " from"
            )
        self._before = FACTOR.read_text()
        top = str(Path(__file__).resolve().parents[3])
        command = [sys.executable, "-P", "-c", _TAKER, top, str(available // STEP_MIB)]
        try:
            FACTOR.write_text(str(MOST))
            with system.signals_delayed() as in_child:
                self._taker = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    text=True,
                    preexec_fn=in_child,  # noqa: PLW1509 - one system call
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Free the memory and restore the watermarks."""
        try:
            if self._taker is not None:
                self._taker.kill()
                self._taker.wait(END_LIMIT_S)
                assert self._taker.stdout is not None
                self._taker.stdout.close()
        finally:
            FACTOR.write_text(self._before)
            time.sleep(0.1)
