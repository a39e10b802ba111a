# SPDX-License-Identifier: GPL-2.0-or-later
"""A /proc of one's own, with as much free memory and pressure as a test wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_ZONE = """\
Node 0, zone {name:>8}
  pages free     {free}
        boost    0
        min      {low}
        low      {low}
        high     {high}
        spanned  4095
        protection: (0, 0, {protected}, {protected})
  pagesets
    cpu: 0
              high:     31
"""


def write_memory(root: Path, *, free: int, low: int, high: int) -> None:
    """Write a zoneinfo of two zones: DMA, idle and protected as it always is, and Normal with what is given, in pages."""
    (root / "proc").mkdir(exist_ok=True)
    dma = _ZONE.format(name="DMA", free=3840, low=13, high=16, protected=100_000)
    (root / "proc/zoneinfo").write_text(dma + _ZONE.format(name="Normal", free=free, low=low, high=high, protected=0))


def write_psi(root: Path, *, some_avg10: float = 0.0, some_total: int = 0) -> None:
    """Write a pressure/memory, totals in µs."""
    (root / "proc/pressure").mkdir(parents=True, exist_ok=True)
    (root / "proc/pressure/memory").write_text(
        f"some avg10={some_avg10:.2f} avg60=0.00 avg300=0.00 total={some_total}\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
