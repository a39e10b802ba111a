# SPDX-License-Identifier: GPL-2.0-or-later
"""A box that is short of memory, for as long as a body runs, and in no danger.

A process of its own takes memory, page by page for real, until no zone has more free than its low
watermark, and goes on taking whenever one has again: by what kswapd has reclaimed, or somebody has
given back. So it is short by the kernel's own measure and stays so. Before that,
vm.watermark_scale_factor is raised to its most, which puts the low watermark at 30 % of memory:
what is between that and nothing stays free, and nobody is killed. It is put back at the end.

Limits: others on the box feel it, too, as kswapd takes their page cache; and it takes a box of some
gibibytes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tools.bench.harness.system import MIB, HarnessError, memory_available

if TYPE_CHECKING:
    from types import TracebackType

FACTOR = Path("/proc/sys/vm/watermark_scale_factor")
MOST = 3000
STEP_MIB = 32
KEPT_MIB = 1024
"""What is left of the memory that was available, whatever the watermarks say."""
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
        held.append(mmap.mmap(-1, STEP_MIB << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
        left -= 1
    else:
        print("no more", flush=True)
        break
"""


def pages_above_low(text: str | None = None) -> int:
    """Return by how many pages the zone that is best off is above its low watermark.

    What is protected from us not counted.
    """
    found = _ZONE.findall(Path("/proc/zoneinfo").read_text() if text is None else text)
    return max(
        int(free) - max(map(int, protected.split(",")), default=0) - int(low)
        for free, low, managed, protected in found
        if int(managed)
    )


class Shortage:
    """A context manager: short from some time in its body on (`wait`), to the body's end."""

    def __init__(self) -> None:
        self._before = ""
        self._taker: subprocess.Popen[str] | None = None

    def wait(self) -> float:
        """Wait until it is, once, and say when that began, time.monotonic().

        Raises:
            HarnessError: the box has not got that much.
        """
        assert self._taker is not None
        assert self._taker.stdout is not None
        line = self._taker.stdout.readline()
        if not line or line.startswith("no"):
            raise HarnessError(
                "the box is not short of memory after all that may be taken was",
                hint="stop what else runs",
            )
        return float(line)

    def __enter__(self) -> Self:
        """Raise the watermarks, begin to take.

        Raises:
            HarnessError: there is too little memory to play with.
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
            self._taker = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
            )
        except BaseException:
            FACTOR.write_text(self._before)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give all back, put the watermarks back."""
        try:
            if self._taker is not None:
                self._taker.kill()
                self._taker.wait(END_LIMIT_S)
                assert self._taker.stdout is not None
                self._taker.stdout.close()
        finally:
            FACTOR.write_text(self._before)
            time.sleep(0.1)
