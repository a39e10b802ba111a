# SPDX-License-Identifier: GPL-2.0-or-later
"""spare_pages: free pages above the high watermarks, from a zoneinfo in a tree of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd.reclaim.pressure import spare_pages

if TYPE_CHECKING:
    from pathlib import Path

ZONEINFO = """\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 12
  pages free     3840
        boost    0
        min      13
        low      16
        high     19
        spanned  4095
  pagesets
    cpu: 0
              count:    0
              high:     31
Node 0, zone   Normal
  pages free     1000
        boost    0
        min      900
        low      1100
        high     1300
Node 1, zone   Normal
  pages free     5000
        boost    0
        min      900
        low      1100
        high     1300
Node 1, zone  Movable
  pages free     0
        boost    0
        min      0
        low      0
        high     0
"""


def test_spare_pages_adds_up_zones_above_their_high_watermark(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/zoneinfo").write_text(ZONEINFO)
    # 3840 - 19 and 5000 - 1300; the zone that is below its mark has nothing to spare and takes nothing from the others.
    assert spare_pages(tmp_path) == 3821 + 3700


def test_spare_pages_of_an_unreadable_zoneinfo_are_none(tmp_path: Path) -> None:
    assert spare_pages(tmp_path) == 0


def test_spare_pages_of_this_machine_are_some() -> None:
    assert spare_pages() > 0
