# SPDX-License-Identifier: GPL-2.0-or-later
"""The reserve is refilled ahead of demand.

If the system has no free memory, it is refilled only while pages keep coming.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from zswapd.config import load
from zswapd.core import compress
from zswapd.core import core as core_module
from zswapd.host.cgroups import Room
from zswapd.system.offload import Offload
from zswapd.worker.upkeep import REFILL_FRAMES_BYTES, URGENT_BYTES, Upkeep

MIB = 1 << 20
PAGES = 8 * MIB // 4096


@pytest.fixture
def core(tmp_path: Path) -> Iterator[core_module.Core]:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        1048576 kB\n")
    assignments = [("swap.size", "64M", "--size"), ("memory.reserve", "8M", "--set")]
    core = core_module.Core(load(codecs=compress.names(), assignments=assignments, root=tmp_path))
    yield core
    core.close()


def store(core: core_module.Core, first: int, count: int) -> int:
    """Store pages that take a frame each; return how many were taken."""
    write = core.devices["swap"].write
    return sum(
        write(number * 4096, memoryview(os.urandom(4096))) is None
        for number in range(first, first + count)
    )


async def run_refill(core: core_module.Core, spare: int, monkeypatch: pytest.MonkeyPatch) -> Upkeep:
    monkeypatch.setattr("zswapd.worker.upkeep.spare_pages", lambda: spare)
    monkeypatch.setattr("zswapd.worker.upkeep.free_bytes", lambda: spare * 4096)
    monkeypatch.setattr("zswapd.worker.upkeep.RETRY_S", 0.02)
    return Upkeep(
        core, Offload(), yields=False, has_small_heaps=False, needs_large_heaps=lambda: False
    )


@pytest.mark.trio
async def test_reserve_is_refilled_while_memory_is_to_spare(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep = await run_refill(core, 1 << 20, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        assert store(core, 0, PAGES - 256) == PAGES - 256
        with trio.fail_after(10):
            while core.frames.wants_refill():
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.parametrize(("free", "pieces"), [(1 << 20, "large"), (1 << 15, "small")])
async def test_what_is_urgent_is_little_only_where_memory_is_scarce(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch, free: int, pieces: str
) -> None:
    upkeep = await run_refill(core, free, monkeypatch)
    asked: list[int] = []
    begin = core.frames.begin_refill
    monkeypatch.setattr(
        type(core.frames),
        "begin_refill",
        lambda _frames, most: asked.append(most * 4096) or begin(most),
    )
    store(core, 0, PAGES - 256)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        with trio.fail_after(10):
            while not asked:
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert asked[0] == (URGENT_BYTES if pieces == "small" else REFILL_FRAMES_BYTES)


@pytest.mark.trio
async def test_last_memory_is_taken_in_small_pieces_and_only_while_pages_come(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log(
        "the reserve cannot be refilled: the system's free memory is at its watermarks",
        level=logging.WARNING,
        count=None,
    )
    upkeep = await run_refill(core, 0, monkeypatch)
    store(core, 0, PAGES - 256)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        before = core.arena.backed_bytes()
        await trio.sleep(0.2)
        first = core.arena.backed_bytes() - before
        await trio.sleep(0.2)
        assert core.arena.backed_bytes() - before == first, "nobody asked for more"
        assert 0 < first <= 2 * URGENT_BYTES
        store(core, PAGES, 16)
        await trio.sleep(0.2)
        assert core.arena.backed_bytes() - before > first
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_reserve_that_came_back_by_itself_is_refilled_the_next_time(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    expect_log(
        "the reserve cannot be refilled: the system's free memory is at its watermarks",
        level=logging.WARNING,
        count=None,
    )
    upkeep = await run_refill(core, 0, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        store(core, 0, PAGES // 2)  # low, but not so that the last memory is taken
        await trio.sleep(0.05)
        assert core.frames.wants_refill()
        store(core, 0, 1)  # says so again, between two attempts
        core.devices["swap"].discard(0, PAGES // 2 * 4096)
        await trio.sleep(0.05)
        assert not core.frames.wants_refill()
        monkeypatch.setattr("zswapd.worker.upkeep.spare_pages", lambda: 1 << 20)
        store(core, 0, PAGES // 2)
        with trio.fail_after(10):
            while core.frames.wants_refill():
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


class Starved(Offload):
    """Whose thread gets no processor until it is hurried."""

    def __init__(self) -> None:
        super().__init__()
        self.hurried = trio.Event()

    async def run(self, function: Callable[..., Any], *args: Any, abandon: bool = False) -> Any:
        await self.hurried.wait()
        return await super().run(function, *args, abandon=abandon)

    def hurry(self) -> None:
        self.hurried.set()


@pytest.mark.trio
async def test_refill_at_leisure_is_hurried_when_the_reserve_has_nearly_run_out(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zswapd.worker.upkeep.spare_pages", lambda: 1 << 20)
    offload = Starved()
    upkeep = Upkeep(
        core, offload, yields=False, has_small_heaps=False, needs_large_heaps=lambda: False
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        store(core, 0, PAGES // 2)
        await trio.sleep(0.05)
        assert not offload.hurried.is_set()
        store(core, PAGES // 2, PAGES // 3)
        assert offload.hurried.is_set()
        with trio.fail_after(10):
            while core.frames.wants_refill():
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_heaps_grow_once_in_an_idle_moment_when_requests_may_wait_for_a_disk(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown: list[int] = []
    volumes: list[str] = []
    monkeypatch.setattr("zswapd.system.grow_heaps", lambda: grown.append(1))
    monkeypatch.setattr("zswapd.worker.upkeep.spare_pages", lambda: 1 << 20)
    monkeypatch.setattr("zswapd.worker.upkeep.IDLE_S", 0.01)
    upkeep = Upkeep(
        core, Offload(), yields=False, has_small_heaps=True, needs_large_heaps=lambda: bool(volumes)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.keep_house, lambda: None)
        await trio.sleep(0.1)
        assert not grown, "nobody needs them"
        volumes.append("disk")
        await trio.sleep(0.1)
        assert grown == [1]
        nursery.cancel_scope.cancel()


@pytest.mark.trio
@pytest.mark.slow
async def test_what_is_discarded_goes_back_to_the_system_in_a_moment(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    upkeep = await run_refill(core, 1 << 20, monkeypatch)
    monkeypatch.setattr("zswapd.worker.upkeep.IDLE_S", 0.02)
    stored = 0
    while stored < 4 * PAGES:
        stored += store(core, stored, 256)
        core.frames.refill_now()
    full = core.arena.backed_bytes()
    assert full > 4 * PAGES * 4096
    core.devices["swap"].discard(0, 64 * MIB)
    assert core.arena.backed_bytes() == full, "the page path gives nothing back itself"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.keep_house, lambda: None)
        with trio.fail_after(10):
            while core.frames.wants_trim():
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    target = core.frames.reserve_target * 4096
    assert core.arena.backed_bytes() < target + target // 2 + 6 * MIB


class FakeLimits:
    """A limit of 64 MiB, and what others have taken below it beside the core's frames."""

    def __init__(self, core: core_module.Core, others: int) -> None:
        self.core, self.others = core, others

    def room(self) -> Room:
        frames = self.core.frames
        held = (frames.used_frames + frames.table.free_frames) * frames.page_size
        return Room(64 * MIB, 64 * MIB - self.others - held, "/sys/fs/cgroup/box/memory.max")


def bounded(core: core_module.Core, others: int) -> tuple[Upkeep, FakeLimits]:
    limits = FakeLimits(core, others)
    return (
        Upkeep(
            core,
            Offload(),
            yields=False,
            has_small_heaps=False,
            needs_large_heaps=lambda: False,
            limits=limits,  # type: ignore[arg-type]
        ),
        limits,
    )


async def store_slowly(core: core_module.Core, pages: int) -> int:
    """Store pages with time between them for the reserve to be refilled;
    return how many were taken.
    """
    taken = 0
    for first in range(0, pages, 64):
        taken += store(core, first, 64)
        await trio.sleep(0.01)
    return taken


@pytest.mark.trio
@pytest.mark.slow
async def test_pool_below_a_memory_limit_is_full_before_the_limit_is_met(
    core: core_module.Core,
) -> None:
    upkeep, limits = bounded(core, 20 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        taken = await store_slowly(core, 64 * MIB // 4096)
        nursery.cancel_scope.cancel()
    # 64 MiB, less those of others, the headroom of 16 and the reserve of 8.
    assert 18 * MIB <= taken * 4096 <= 20 * MIB
    assert limits.room().left >= 16 * MIB - MIB
    rejects = core.statistics().frontswap.rejects
    assert rejects["pool_limit_hit"] > 0
    assert core.frames.table.free_frames * 4096 >= 6 * MIB, "a full pool leaves the reserve full"


@pytest.mark.trio
async def test_reserve_goes_back_where_others_have_taken_what_was_left(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[..., None]
) -> None:
    expect_log(r"memory.max leaves no more memory", level=logging.WARNING)
    monkeypatch.setattr("zswapd.worker.upkeep.IDLE_S", 0.01)
    upkeep, limits = bounded(core, 20 * MIB)
    assert core.frames.reserve_target * 4096 == 8 * MIB
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upkeep.refill)
        nursery.start_soon(upkeep.keep_house, lambda: None)
        limits.others = 52 * MIB
        with trio.fail_after(10):
            while core.frames.reserve_target * 4096 > MIB:
                await trio.sleep(0.01)
        assert core.frames.limit_frames == 0
        assert store(core, 0, 8) == 0
        limits.others = 20 * MIB
        with trio.fail_after(10):
            while core.frames.reserve_target * 4096 < 8 * MIB or core.frames.limit_frames == 0:
                await trio.sleep(0.01)
        assert store(core, 0, 8) == 8
        nursery.cancel_scope.cancel()


def test_bound_of_the_limits_is_none_without_one(core: core_module.Core) -> None:
    before = core.frames.limit_frames
    core.bound(10)
    assert core.frames.limit_frames == 10
    core.apply(core._config)
    assert core.frames.limit_frames == 10, "a change of settings does not lift it"
    core.bound(1 << 62)
    assert core.frames.limit_frames == before
