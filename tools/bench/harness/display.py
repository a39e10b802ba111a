# SPDX-License-Identifier: GPL-2.0-or-later
"""A progress display: a block of lines on a terminal, otherwise one line a second.

It has no thread and no timer. The workload reports its progress several times a second, and each
report may redraw. So the clock stands still while the workload waits for a page.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.harness.system import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

REDRAW_S = 0.25
PLAIN_S = 1.0
BAR = 30


@dataclass(frozen=True, slots=True)
class PoolSample:
    """The daemon's pool at one moment.

    Attributes:
        pages: the stored pages.
        page_bytes: their bytes before compression.
        stored_bytes: their bytes as stored objects.
        pool_bytes: the memory of the pool in bytes.
    """

    pages: int
    page_bytes: int
    stored_bytes: int
    pool_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes of data for each byte of pool memory; 0 while the pool is empty."""
        return self.page_bytes / self.pool_bytes if self.pool_bytes else 0.0


@dataclass(slots=True)
class Traffic:
    """The swap rates of the whole machine, between two readings of /proc/vmstat.

    Attributes:
        page_size: the page size in bytes.
        out: MiB/s swapped out.
        back: MiB/s swapped in.
    """

    page_size: int
    out: float = 0.0
    back: float = 0.0
    _last: tuple[float, int, int] | None = None

    def update(self, now: float, vmstat: str) -> None:
        """Take the counters in `vmstat`, the text of /proc/vmstat at `now` seconds."""
        counters = dict(line.split() for line in vmstat.splitlines())
        pages_out, pages_in = int(counters["pswpout"]), int(counters["pswpin"])
        if self._last is not None and now > self._last[0]:
            then, out, back = self._last
            scale = self.page_size / MIB / (now - then)
            self.out, self.back = (pages_out - out) * scale, (pages_in - back) * scale
        self._last = (now, pages_out, pages_in)


class Display:
    """The progress display of the demo.

    Args:
        sample: returns the state of the pool.
        page_size: the page size in bytes.
        titles: the text for the user, by phase of the workload.
    """

    def __init__(
        self, sample: Callable[[], PoolSample], page_size: int, titles: dict[str, str]
    ) -> None:
        self._sample = sample
        self._titles = titles
        self._traffic = Traffic(page_size)
        self._start = time.monotonic()
        self._next = 0.0
        self._drawn = 0
        self._terminal = sys.stdout.isatty()

    def update(self, phase: str, done: int, total: int) -> None:
        """Redraw if it is time; `done` of `total` pages of `phase` are done."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (REDRAW_S if self._terminal else PLAIN_S)
        self._traffic.update(now, Path("/proc/vmstat").read_text())
        lines = self._lines(phase, done, total, now - self._start)
        if self._terminal:
            self._redraw(lines)
        else:
            print("; ".join(line.strip() for line in lines), flush=True)

    def _lines(self, phase: str, done: int, total: int, elapsed: float) -> list[str]:
        pool = self._sample()
        share = done / total if total else 1.0
        filled = round(share * BAR)
        title = self._titles.get(phase, phase)
        bar = f"[{'#' * filled}{'.' * (BAR - filled)}] " if self._terminal else ""
        return [
            f"  {bar}{share:4.0%} {title}",
            f"  stored {pool.pages:,} pages, {pool.page_bytes / MIB:.0f} MiB of data",
            f"  pool {pool.pool_bytes / MIB:.1f} MiB of memory, ratio {pool.ratio:.2f}",
            (
                f"  out {self._traffic.out:.0f} MiB/s, in {self._traffic.back:.0f} MiB/s,"
                f" {elapsed:.1f} s"
            ),
        ]

    def _redraw(self, lines: list[str]) -> None:
        width = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        print(up + "".join(f"\r\x1b[2K{line[:width]}\n" for line in lines), end="", flush=True)
        self._drawn = len(lines)

    def finished(self, line: str) -> None:
        """Replace the block by one permanent line."""
        if self._drawn:
            print(f"\x1b[{self._drawn}A\x1b[J", end="")
            self._drawn = 0
        print(line, flush=True)
        self._next = 0.0
