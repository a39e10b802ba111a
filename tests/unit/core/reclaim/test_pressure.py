# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory pressure: free pages against the watermarks, and PSI.

PSI is read from files of the test and from the kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.cgrouptree import MIB, second, write_system
from tests.support.descriptors import is_readable
from tests.support.proc import write_memory, write_psi
from zswapd.core.reclaim.pressure import Marks, Pressure, spare_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    # 3840 - 19 and 5000 - 1300; the zone that is below its mark has nothing to spare and takes
    # nothing from the others.
    assert spare_pages(tmp_path) == 3821 + 3700


def test_spare_pages_of_an_unreadable_zoneinfo_are_none(tmp_path: Path) -> None:
    assert spare_pages(tmp_path) == 0


def test_spare_pages_of_this_machine_are_some() -> None:
    assert spare_pages() > 0


@pytest.fixture
def pressure(tmp_path: Path) -> Iterator[Pressure]:
    write_memory(tmp_path, free=5000, low=1000, high=1500)
    write_psi(tmp_path, some_avg10=1.25, some_total=3_000_000)
    opened = Pressure(tmp_path)
    opened.arm()
    yield opened
    opened.close()


def test_marks_are_those_of_the_zone_that_is_best_off_without_what_is_protected(
    pressure: Pressure,
) -> None:
    # The idle DMA zone of write_memory has 3840 pages free, all of them protected: it must not hide
    # that Normal has few.
    assert pressure.marks() == Marks(above_low=4000, above_high=3500, spare=3500)


def test_marks_follow_the_file(pressure: Pressure, tmp_path: Path) -> None:
    write_memory(tmp_path, free=900, low=1000, high=1500)
    assert pressure.marks() == Marks(above_low=-100, above_high=-600, spare=0)


def test_statistics_have_what_psi_says(pressure: Pressure) -> None:
    seen = pressure.statistics()
    assert (seen.some_avg10, seen.some_seconds, seen.full_avg10, seen.spare_pages) == (
        1.25,
        3.0,
        0.0,
        3500,
    )


def test_an_ordinary_file_takes_no_trigger_and_is_polled(pressure: Pressure) -> None:
    # epoll refuses it, as a kernel without triggers refuses the write
    assert pressure.psi == "polling"
    assert pressure.descriptor == -1


def test_nothing_of_it_there_is_no_pressure(tmp_path: Path) -> None:
    absent = Pressure(tmp_path)
    absent.arm()
    assert (absent.psi, absent.marks(), absent.statistics().some_avg10) == ("absent", None, 0.0)
    absent.close()


def test_this_kernel_has_marks_and_a_trigger_that_did_not_fire_at_once() -> None:
    real = Pressure()
    before = real.statistics().some_seconds
    real.arm()
    try:
        marks = real.marks()
        assert marks is not None
        assert marks.above_low >= marks.above_high
        if real.psi == "trigger":
            has_fired = is_readable(real.descriptor, 0.2)
            assert not has_fired or real.statistics().some_seconds > before, (
                "nobody waited, and it fired"
            )
        elif Path("/proc/pressure/memory").exists():
            assert real.psi == "polling"
    finally:
        real.close()
        real.close()


def test_without_triggers_the_totals_tell_who_waited(tmp_path: Path) -> None:
    now = [100.0]
    write_memory(tmp_path, free=5000, low=1000, high=1500)
    write_psi(tmp_path, some_total=7_000_000)
    polled = Pressure(tmp_path, lambda: now[0])
    polled.arm()
    try:
        assert polled.statistics().triggers == 0
        now[0] += 1
        assert not polled.has_stalled()  # the seven seconds were before
        now[0] += 1
        write_psi(tmp_path, some_total=7_149_000)
        assert not polled.has_stalled()
        now[0] += 1
        write_psi(tmp_path, some_total=7_300_000)
        assert polled.has_stalled()
        assert polled.statistics().triggers == 1
    finally:
        polled.close()


@pytest.mark.parametrize(
    ("left", "low", "high"), [(900, True, True), (40, True, False), (10, False, False)]
)
def test_a_memory_limit_counts_like_a_watermark(
    tmp_path: Path, left: int, low: bool, high: bool
) -> None:
    write_system(tmp_path, "0::/box", mounts=("/ /sys/fs/cgroup 2",))
    second(tmp_path, "/sys/fs/cgroup/box", 1 << 30, usage=(1 << 30) - left * MIB)
    write_memory(tmp_path, free=500_000, low=1000, high=1500)
    limited = Pressure(tmp_path)
    marks = limited.marks()
    assert marks is not None
    assert (marks.above_low > 0, marks.above_high > 0, marks.spare > 0) == (low, high, high)
    seen = limited.statistics()
    assert (seen.limit_bytes, seen.limit_left_bytes) == (1 << 30, left * MIB)
    limited.close()
