# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters go on in a successor.

Cumulative ones add up, marks keep the highest, what describes contents is counted anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.successor import fill, make_config, read
from zswapd import counters
from zswapd.control.server import ControlStatistics
from zswapd.core.allocators.pageframes import PageFramesStatistics
from zswapd.core.allocators.zbud import ZbudStatistics
from zswapd.core.allocators.zsmalloc import ClassStatistics, ZsStatistics
from zswapd.core.block.device import DeviceStatistics
from zswapd.core.cache import CacheStatistics
from zswapd.core.core import Core, CoreStatistics, Inherited, RecoveryStatistics
from zswapd.core.frontends.frontswap import FrontswapStatistics
from zswapd.core.pam.zbuds import ZbudsStatistics
from zswapd.core.pam.zv import ZvStatistics
from zswapd.core.reclaim.pressure import PressureStatistics
from zswapd.core.reclaim.shrinker import ShrinkerStatistics
from zswapd.core.tmem.objnodes import ObjnodeStatistics
from zswapd.core.tmem.tmem import TmemStatistics
from zswapd.errors import LostPageError
from zswapd.fuse.held import HeldStatistics
from zswapd.fuse.session import LatencyStatistics, SessionStatistics

# Fields that describe the present. A new field has to be put here or be declared as carried.
PRESENT: dict[type, str] = {
    PageFramesStatistics: (
        "page_size total_frames used_frames ephemeral_frames free_frames reserve_frames"
        " reserve_target_frames limit_frames"
    ),
    ClassStatistics: (
        "size by_group objects used_objects used_frames frames_per_zspage freeable_frames"
    ),
    ZbudStatistics: (
        "objects used_frames zbud_curr_raw_pages bodies zbud_buddied_count"
        " zbud_unbuddied_list_counts zbpg_unused_list_count"
    ),
    ZsStatistics: "objects zspages used_frames object_bytes classes",
    ZbudsStatistics: "zbud_curr_zpages zbud_curr_zbytes",
    ZvStatistics: (
        "curr_pages curr_zbytes curr_object_bytes curr_same_filled curr_incompressible"
        " curr_dist_counts"
    ),
    ObjnodeStatistics: "curr_objnode_count reserve populated_bytes",
    TmemStatistics: "curr_obj_count curr_objnode_count objnode_bytes objnode_reserve",
    FrontswapStatistics: "frozen",
    DeviceStatistics: "name size stored_pages object_bytes lost_pages limit_bytes weight",
    RecoveryStatistics: "recovered_pages seconds",
    CacheStatistics: "frames limit_frames zsmalloc zbud zbuds cleancache ages",
    CoreStatistics: (
        "arena_kind arena_backed_bytes frames zsmalloc zbud cache zv tmem frontswap recovery"
        " devices backed transfers writeback recompression store_ages"
    ),
    LatencyStatistics: "",
    HeldStatistics: "waiting",
    SessionStatistics: "read_latency write_latency held max_background",
    ControlStatistics: "clients",
    ShrinkerStatistics: "ceiling_frames limit_frames",
    PressureStatistics: (
        "psi some_avg10 full_avg10 some_seconds full_seconds spare_pages limit_bytes"
        " limit_left_bytes"
    ),
}


@pytest.mark.parametrize("kind", PRESENT, ids=lambda kind: kind.__name__)
def test_every_field_is_of_one_kind(kind: Any) -> None:
    kinds = [*counters._JOINS.get(kind, ()), *PRESENT[kind].split()]
    assert sorted(kinds) == sorted(field.name for field in dataclasses.fields(kind))


@dataclasses.dataclass(frozen=True, slots=True)
class Inner:
    name: str
    hits: int
    seconds: float
    most: int
    now: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outer:
    reasons: Mapping[str, int]
    columns: tuple[int, ...]
    inner: Inner
    parts: tuple[Inner, ...]
    bare: tuple[int, ...]


counters.declare(Inner, cumulative="hits seconds", high_water="most")
counters.declare(Outer, cumulative="reasons columns")


def _outer(*numbers: int, reasons: Mapping[str, int], names: str = "ab") -> Outer:
    hits, most, now = numbers
    inner = Inner("x", hits, hits / 2, most, now)
    parts = tuple(Inner(name, hits, 0.0, most, now) for name in names)
    return Outer(reasons, (hits, 0, now), inner, parts, (1, 2))


def test_sum_of_a_snapshot_and_what_was_kept_of_another() -> None:
    first = _outer(10, 7, 3, reasons={"full": 2, "odd": 1})
    base = json.loads(json.dumps(counters.export(first)))
    assert set(base) == {"reasons", "columns", "inner", "parts"}
    assert set(base["inner"]) == {"hits", "seconds", "most"}
    second = counters.add(_outer(1, 9, 5, reasons={"full": 1, "new": 4}, names="bc"), base)
    assert second.reasons == {"full": 3, "odd": 1, "new": 4}
    assert second.columns == (11, 0, 8)
    assert second.inner == Inner("x", 11, 5.5, 9, 5)
    assert second.parts == (Inner("b", 11, 0.0, 9, 5), Inner("c", 1, 0.0, 9, 5))
    assert second.bare == (1, 2)
    assert counters.add(_outer(1, 2, 5, reasons={}), base).inner.most == 7


@pytest.mark.parametrize(
    "base",
    [
        {},
        {"unknown": 5},
        {"reasons": 5, "columns": [1], "inner": 3, "parts": [1, 2]},
        {"columns": [1, 2, "three"], "inner": {"hits": "many"}, "parts": {"a": None, "z": {}}},
    ],
)
def test_base_of_another_shape_is_left_out(base: dict[str, Any]) -> None:
    own = _outer(1, 2, 3, reasons={"full": 1})
    assert counters.add(own, base).inner == own.inner
    assert counters.add(own, base).parts == own.parts
    assert counters.add(own, base).reasons == own.reasons


def test_core_goes_on_counting_over_three_lives() -> None:
    config = make_config("memory.arena=memfd")
    core = Core(config)
    size = core.frames.page_size
    expected: dict[int, bytes] = {}
    loads = 0
    most = 0
    for life in range(3):
        expected |= fill(core, 100 * (3 - life), seed=life)
        core.frontswap.freeze()
        assert core.devices["swap"].write(0, memoryview(expected[0])) is not None
        with pytest.raises(LostPageError):
            read(core, 0)
        core.frontswap.thaw()
        for number in range(1, 50):
            assert read(core, number) == expected[number]
            loads += 1
        core.devices["swap"].discard(90 * size, 10 * size)
        seen = core.statistics()
        most = max(most, seen.frames.used_frames_max)
        base = json.loads(json.dumps(counters.export(seen)))
        successor = Core(config, inherited=Inherited(core.arena.fd, counters=base))
        core.close()
        core = successor
        again = core.statistics()
        assert again.zv == dataclasses.replace(seen.zv, curr_pages_max=seen.zv.curr_pages_max)
        assert again.frontswap == seen.frontswap
        assert again.frames.used_frames_max == seen.frames.used_frames_max
        expected_device = dataclasses.replace(
            seen.devices[0], lost_pages=0
        )  # this core's bitmap dies with it
        assert again.devices == (expected_device,)
        assert again.recovery.takeovers == life + 1
        assert again.tmem.flush_found == seen.tmem.flush_found
    seen = core.statistics()
    assert seen.frontswap.succ_stores == seen.zv.stores == 600
    assert (seen.frontswap.loads, seen.frontswap.rejects) == (loads, {"frozen": 3})
    assert sum(seen.zv.cumul_dist_counts) == 600
    assert sum(seen.zv.curr_dist_counts) == seen.zv.curr_pages < 300
    assert seen.frames.used_frames_max == most > seen.frames.used_frames
    core.close()


def test_session_counters_add_up() -> None:
    zeros = {field.name: 0 for field in dataclasses.fields(SessionStatistics)}
    first = SessionStatistics(**zeros | {"reads": 5, "poll_seconds": 1.5, "max_background": 64})  # type: ignore[arg-type]
    second = SessionStatistics(**zeros | {"reads": 2, "poll_seconds": 0.25, "writes": 1})  # type: ignore[arg-type]
    both = counters.add(second, counters.export(first))
    assert (both.reads, both.writes, both.poll_seconds) == (7, 1, 1.75)
    assert both.max_background == 0
