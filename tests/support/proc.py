# SPDX-License-Identifier: GPL-2.0-or-later
"""A made-up /proc with the free memory and the pressure that a test sets."""

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
        spanned  {managed}
        present  {managed}
        managed  {managed}
        protection: (0, 0, {protected}, {protected})
  pagesets
    cpu: 0
              high:     31
"""


def write_memory(root: Path, *, free: int, low: int, high: int) -> None:
    """Write a zoneinfo: an idle, protected DMA zone, a Normal zone, an empty Device zone.

    The values of the Normal zone are in pages.
    """
    (root / "proc").mkdir(exist_ok=True)
    dma = _ZONE.format(name="DMA", managed=4095, free=3840, low=13, high=16, protected=100_000)
    normal = _ZONE.format(
        name="Normal", managed=1_000_000, free=free, low=low, high=high, protected=0
    )
    empty = _ZONE.format(name="Device", managed=0, free=0, low=0, high=0, protected=0)
    (root / "proc/zoneinfo").write_text(dma + normal + empty)


def write_psi(root: Path, *, some_avg10: float = 0.0, some_total: int = 0) -> None:
    """Write a pressure/memory with totals in µs."""
    (root / "proc/pressure").mkdir(parents=True, exist_ok=True)
    (root / "proc/pressure/memory").write_text(
        f"some avg10={some_avg10:.2f} avg60=0.00 avg300=0.00 total={some_total}\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
