# SPDX-License-Identifier: GPL-2.0-or-later
"""What `zswapctl top` makes of two reports."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.backed import Files
from tests.support.snapshots import make, make_core, make_snapshot
from tests.support.strategies import page
from zswapd.cli.top import screen, within
from zswapd.worker.reports import plain


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    core = make_core()
    yield json.loads(json.dumps(plain(make_snapshot(core))))
    core.close()


def test_rates_are_those_between_two_reports(report: dict[str, Any]) -> None:
    now = copy.deepcopy(report)
    now["core"]["frontswap"]["succ_stores"] += 500
    lines = list(screen(now, report, 2.0))
    row = next(line.split() for line in lines if line.startswith("stored"))
    assert row[:3] == ["stored", "250", "564"]


def test_it_fits_and_says_what_is_off(report: dict[str, Any]) -> None:
    loud = copy.deepcopy(report)
    loud["worker"] |= {
        "supervised": False,
        "deaths": 7,
        "protections": {f"protection_{number}": False for number in range(9)},
    }
    loud["core"]["frontswap"] |= {
        "frozen": True,
        "rejects": {f"some_reason_{number}": 1 << 40 for number in range(9)},
    }
    lines = list(screen(loud, report, 1.0))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 26
    text = "\n".join(lines)
    for word in (
        "FROZEN",
        "7 died",
        "WITHOUT a supervisor",
        "off: protection_0",
        "refused because",
    ):
        assert word in text


@pytest.mark.parametrize("files", [1, 2, 3, 9])
@pytest.mark.parametrize("rows", [24, 40])
def test_whatever_there_is_it_has_room_for_what_is_wrong(
    report: dict[str, Any], files: int, rows: int
) -> None:
    now = copy.deepcopy(report)
    now["worker"] |= {"supervised": False, "protections": {"lock_memory": False}}
    now["core"]["frontswap"]["rejects"] = {"pool_limit_hit": 3}
    (device,) = now["core"]["devices"]
    now["core"]["devices"] = [device | {"name": f"file{number}"} for number in range(files)]
    classes = [
        {"size": 32 * number, "used_frames": 9, "objects": 9, "used_objects": 5}
        for number in range(1, 12)
    ]
    now["core"]["zsmalloc"]["classes"] = classes
    now["core"]["writeback"] = {"sampled_ages": [1, 2, 3, 4, 5]}
    now["core"]["backed"] = [
        {"name": "file0", "bd_count": 1, "written_back_pages": 1, "written_through_pages": 0}
    ]
    lines = screen(now, now, 1.0, rows=rows)
    assert len(lines) <= rows
    text = "\n".join(lines)
    for word in (
        "WITHOUT a supervisor",
        "off: lock_memory",
        "refused because: 3 pool_limit_hit",
        "Cache",
        "Disk",
        "Unused",
    ):
        assert word in text
    shown = sum(line.startswith("file") for line in lines)
    assert shown == files or (shown >= 2 and f"and {files - shown} more files" in text)
    assert ("Size class" in text) or rows == 24
    assert sum(bool(re.match(r"\d+ +36.0 KiB", line)) for line in lines) <= 5


def test_zbud_has_a_table_too() -> None:
    core = make(pool__allocator="zbud")
    # Twice two share a frame; one shares its with the header of the last, which has a frame of its
    # own; one is alone.
    for number, size in enumerate((1800, 1800, 1800, 1800, 2700, 2700, 4096)):
        core.devices["swap"].write(number * 4096, memoryview(os.urandom(size).ljust(4096, b"0")))
    now = json.loads(json.dumps(plain(make_snapshot(core))))
    core.close()
    lines = screen(now, now, 1.0)
    (place,) = (
        number for number, line in enumerate(lines) if line.startswith("Page frames of zbud")
    )
    table = {
        " ".join(line.split()[:-3]): line.split()[-3:] for line in lines[place + 1 : place + 4]
    }
    assert table["two objects"] == ["12.0", "KiB", "6"]
    assert table["one object of up to three quarters"] == ["4.0", "KiB", "1"]
    assert table["a whole page"] == ["4.0", "KiB", "1"]


def test_an_ordinary_pool_tells_how_long_ago_its_pages_were_stored(report: dict[str, Any]) -> None:
    now = copy.deepcopy(report)
    now["core"]["store_ages"] = [1, 0, 2, 0, 1]
    assert "Age       <1 min 25%  <10 min 0%  <1 h 50%  <1 d 0%  longer 25%" in screen(
        now, now, 1.0
    )
    del now["core"]["store_ages"]
    assert not [line for line in screen(now, now, 1.0) if line.startswith("Age")]


def test_a_cache_tells_how_long_ago_its_pages_were_put(report: dict[str, Any]) -> None:
    now = copy.deepcopy(report)
    now["core"]["cache"]["ages"] = [3, 0, 0, 1, 0]
    assert "Cached    <1 min 75%  <10 min 0%  <1 h 0%  <1 d 25%  longer 0%" in screen(now, now, 1.0)
    del now["core"]["cache"]["ages"]
    assert not [line for line in screen(now, now, 1.0) if line.startswith("Cached")]


def test_a_restarted_daemon_has_no_negative_rates(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    before["core"]["frontswap"]["succ_stores"] = 10**9
    before["fuse"]["read_latency"]["counts"][3] = 10**6
    lines = "\n".join(screen(report, before, 1.0))
    assert "stored" in lines
    assert " -1" not in lines


def test_the_cache_has_a_line_when_it_has_something(report: dict[str, Any]) -> None:
    now = copy.deepcopy(report)
    cache = now["core"]["cache"]
    cache["cleancache"]["succ_gets"] += 30
    cache["cleancache"]["failed_gets"] += 10
    cache["zbuds"]["evicted_zpages"] += 14
    (line,) = (line for line in screen(now, report, 2.0) if line.startswith("Cache "))
    assert re.fullmatch(r"Cache +[\d.]+ KiB   of 4\.0 MiB, \d+ pages; 75% hits; 7 evicted/s", line)
    cache["cleancache"]["frozen"] = True
    assert any(line.endswith("evicted/s, FROZEN") for line in screen(now, report, 2.0))
    now["core"]["cache"] = None
    assert not [line for line in screen(now, report, 2.0) if line.startswith("Cache")]


def test_a_disk_has_a_line_and_pages_their_ages() -> None:
    files, other = Files(64), make_core(1)
    for number in range(12):
        files.put(number, page("words", number, 4096))
    snapshot = dataclasses.replace(make_snapshot(other), core=files.core.statistics())
    before = json.loads(json.dumps(plain(snapshot)))
    files.write_back(range(4))
    files.settle()
    now = json.loads(json.dumps(plain(dataclasses.replace(snapshot, core=files.core.statistics()))))
    lines = screen(now, before, 2.0)
    assert "Disk        16.0 KiB   4 pages; 2 written/s" in lines
    assert "Unused    <1 min 100%  <10 min 0%  <1 h 0%  <1 d 0%  longer 0%" in lines
    assert len(lines) <= 24
    del now["core"]["writeback"]["sampled_ages"]
    assert not [line for line in screen(now, before, 2.0) if line.startswith("Unused")]
    files.close()
    other.close()


@pytest.mark.parametrize(
    ("counts", "share", "bound"),
    [
        ([0] * 21, 0.5, "-"),
        ([5, 5] + [0] * 19, 0.5, "1 µs"),
        ([5, 6] + [0] * 19, 0.5, "2 µs"),
        ([0] * 12 + [1] + [0] * 8, 0.99, "4.1 ms"),
        ([99] + [0] * 19 + [1], 0.99, "1 µs"),
        ([1] + [0] * 19 + [99], 0.99, "longer"),
    ],
)
def test_bounds_within_which_a_share_lies(counts: list[int], share: float, bound: str) -> None:
    assert within(counts, share) == bound
