# SPDX-License-Identifier: GPL-2.0-or-later
"""Recompression: which pages, when, how many a second; the pages keep their contents.

A page that gained too little is not tried again.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.backed import Files
from tests.support.strategies import KINDS, page
from tests.support.successor import check_all, fill, make_config, read, succeed
from zswapd.core import compress
from zswapd.core.compress.base import RAW, SAME_FILLED
from zswapd.core.core import Core, Inherited
from zswapd.core.pam.base import HEADER, NO_NEED, NO_ROOM
from zswapd.core.reclaim.recompress import BATCH, NO_ROOM_S, RATE, Recompression
from zswapd.core.sizing import lost_bitmap_bytes
from zswapd.handover.areas import marks_areas, marks_bytes, marks_in, marks_of
from zswapd.handover.state import SharedState

PAGE = 4096
ZSTD = compress.get("zstd").codec


class Pages:
    """A device that is nothing but serial numbers and what recompressing gives."""

    def __init__(self, count: int) -> None:
        self.pages = count
        self.generations = [0] * count
        self.outcomes = [1] * count
        self.epochs = [0] * count
        self.done: list[int] = []

    def generation(self, number: int) -> int:
        return self.generations[number]

    def in_use(self, number: int, epoch: int) -> bool:
        return self.epochs[number] > epoch

    def recompress(self, number: int, _compressor: object, _gain: int) -> int:
        self.done.append(number)
        return self.outcomes[number]


class World:
    def __init__(self, *counts: int, marks: list[memoryview] | None = None) -> None:
        self.devices = [Pages(count) for count in counts]
        self.marks = marks or [memoryview(bytearray(count)) for count in counts]
        self.now, self.newest, self.epoch, self.room = 0.0, 0, 0, True
        self.job = Recompression(
            self.devices,  # type: ignore[arg-type]
            self.marks,
            compress.get("zstd"),
            newest=lambda: self.newest,
            epoch_before=lambda _s: self.epoch,
            has_room=lambda: self.room,
            clock=lambda: self.now,
        )

    def store(self, *numbers: int, device: int = 0) -> None:
        for number in numbers:
            self.newest += 1
            self.devices[device].generations[number] = self.newest

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 1, end)
            self.job.look()

    def run(self) -> list[int]:
        """Do what is to be done; return the pages of the first device that were tried, in order."""
        before = len(self.devices[0].done)
        while self.job.is_running:
            self.job.step()
        return self.devices[0].done[before:]


def test_only_pages_old_enough_are_taken_in_order_and_once() -> None:
    world = World(50)
    world.job.age_s = 100
    world.job.look()
    world.store(*range(10, 20))
    world.wait(60)
    world.store(12, 30)
    world.wait(20)
    assert not world.job.is_running
    world.wait(30)
    assert world.run() == [10, 11, 13, 14, 15, 16, 17, 18, 19]
    world.wait(100)
    assert world.run() == [*range(10, 20), 30], "what is left of the others is for zv to say"


def test_nothing_is_done_when_it_is_off_but_by_command() -> None:
    world = World(8, 8)
    world.store(1, 2)
    world.store(5, device=1)
    world.wait(1000)
    assert not world.job.is_running
    world.job.command()
    assert world.run() == [1, 2]
    assert world.devices[1].done == [5]
    assert world.job.statistics().passes == 1


def test_used_pages_are_left_alone() -> None:
    world = World(8)
    world.store(*range(8))
    world.devices[0].epochs = [0, 9, 3, 9, 9, 0, 0, 0]
    world.epoch = 3
    world.job.age_s = 10
    world.wait(30)
    assert world.run() == [0, 2, 5, 6, 7]


def test_a_page_in_vain_is_marked_until_it_changes_also_for_a_successor() -> None:
    world = World(6)
    world.store(*range(6))
    world.devices[0].outcomes = [1, 0, NO_NEED, 0, 1, 1]
    world.job.command()
    assert world.run() == [0, 1, 2, 3, 4, 5]
    seen = world.job.statistics()
    assert (seen.tried, seen.in_vain) == (5, 2)
    successor = World(6, marks=world.marks)
    successor.devices, successor.newest = world.devices, world.newest
    successor.job._devices = world.devices
    successor.job.command()
    assert successor.run() == [0, 4, 5]
    successor.store(1)
    successor.job.command()
    assert successor.run() == [0, 1, 4, 5]


def test_serial_numbers_that_begin_again_are_still_compared() -> None:
    world = World(4)
    world.newest = 0xFFFFFFFD
    world.store(0, 1)
    world.newest = 0
    world.store(2)
    world.job.age_s = 10
    world.wait(20)
    assert world.run() == [0, 1, 2]


def test_rate_is_kept_and_a_step_is_short() -> None:
    world = World(1000)
    world.store(*range(1000))
    world.job.command()
    waited = 0.0
    while world.job.is_running:
        before = len(world.devices[0].done)
        waited += world.job.step()
        assert len(world.devices[0].done) - before <= BATCH
    assert waited == pytest.approx(1000 / RATE, rel=0.05)


def test_without_room_it_waits_and_forgets_nothing() -> None:
    world = World(40)
    world.store(*range(40))
    world.job.command()
    world.room = False
    assert world.job.step() == NO_ROOM_S
    assert world.devices[0].done == []
    world.room = True
    world.devices[0].outcomes[3] = NO_ROOM
    assert world.job.step() == NO_ROOM_S
    assert world.run() == list(range(4, 40))
    assert world.marks[0][3] == 0, "it is not to blame"


# In a core.


def codec_of(core: Core, number: int) -> int:
    pool, oid, index = core.frontswap._pool, number & 255, number >> 8
    pampd = core.tmem.find(pool, oid, index)
    return int(HEADER.unpack_from(core.arena.view, pampd)[5]) if pampd else -1


def recompress_all(core: Core) -> None:
    core.recompression.command()
    while core.recompression.is_running:
        core.recompression.step()


@pytest.mark.parametrize("allocator", ["zsmalloc", "zbud"])
@pytest.mark.parametrize("checksum", ["true", "false"])
def test_pages_of_every_kind_stay_the_same_and_a_successor_reads_them(
    allocator: str, checksum: str
) -> None:
    config = make_config(
        f"pool.allocator={allocator}", f"pool.checksum={checksum}", "memory.reserve=4M"
    )
    core = Core(config)
    written = fill(core, 300)
    before = core.statistics().zv
    recompress_all(core)
    check_all(core, written)
    after = core.statistics().zv
    assert after.recompressed > 100
    assert before.curr_zbytes - after.curr_zbytes == after.recompress_saved_bytes > 300 * 100
    assert after.stores == before.stores
    assert (after.loads, after.curr_pages) == (before.loads + 300, before.curr_pages)
    seen = {KINDS[number % len(KINDS)]: codec_of(core, number) for number in range(len(KINDS))}
    assert seen["words"] == seen["pointers"] == ZSTD
    assert seen["zeros"] == SAME_FILLED
    assert seen["noise"] == RAW
    assert seen["half"] == compress.get("lz4").codec, "a gain of less than GAIN_PERCENT"
    successor = succeed(core, config)
    check_all(successor, written)
    recompress_all(successor)
    assert successor.statistics().recovery.damaged == 0
    successor.close()


def test_raw_pages_give_their_frames_back_if_zstd_helps() -> None:
    core = Core(make_config("memory.reserve=2M"))
    pages = {number: page("letters", number, PAGE) for number in range(100)}
    for number, data in pages.items():
        core.devices["swap"].write(number * PAGE, memoryview(data))
    assert core.statistics().zv.curr_incompressible == 100
    used = core.frames.used_frames
    recompress_all(core)
    assert core.statistics().zv.curr_incompressible == 0
    assert core.frames.used_frames < used * 0.85
    check_all(core, pages)
    core.close()


def test_marks_outlive_a_core_where_they_can() -> None:
    config = make_config("pool.recompress_age=1000")
    areas = {name: memoryview(bytearray(size)) for name, size in marks_areas(config).items()}
    core = Core(config)
    fd = core.arena.fd
    core = Core(config, inherited=Inherited(fd, tried=marks_in(areas)))
    fill(core, 90)
    recompress_all(core)
    tried = core.statistics().recompression.tried
    assert tried > 60
    successor = Core(config, inherited=Inherited(fd, tried=marks_in(areas)))
    recompress_all(successor)
    assert successor.statistics().recompression.tried == 0
    core.close()
    successor.close()


def test_a_damaged_page_stays_damaged_for_its_reader_and_is_tried_once() -> None:
    core = Core(make_config())
    written = fill(core, 40)
    pampd = core.tmem.find(core.frontswap._pool, 4, 0)
    core.arena.view[pampd + 40] ^= 1
    recompress_all(core)
    recompress_all(core)
    assert core.statistics().recompression.damaged == 1
    assert core.statistics().zv.corrupted == 1
    assert read(core, 5) == written[5]
    core.close()


def test_below_half_of_the_reserve_it_leaves_memory_to_swap() -> None:
    core = Core(make_config("memory.reserve=1M"))
    fill(core, 60)
    core.frames.reserve_target = 4 * core.frames.table.free_frames
    core.recompression.command()
    assert core.recompression.step() == NO_ROOM_S
    assert core.statistics().zv.recompressed == 0
    core.close()


def test_used_pages_and_those_on_their_way_to_the_disk_stay_as_they_are() -> None:
    files = Files(64)
    pages = {number: page("words", number, PAGE) for number in range(64)}
    for number, data in pages.items():
        files.put(number, data)
    core, job = files.core, files.core.recompression
    files.device.epoch = 9
    files.get(5)
    files.write_back([7])
    job._begin(core.zv.newest, 8)
    while job.is_running:
        job.step()
    assert [number for number in range(64) if codec_of(core, number) != ZSTD] == [5, 7]
    files.settle()
    assert codec_of(core, 7) == -1, "the page that was on its way has left"
    assert core.statistics().backed[0].kept_pages == 0
    for number, data in pages.items():
        assert files.get(number) == data
    core.check()
    files.close()


# What must not happen on the page path.

NO_MEMORY = """
import ctypes, gc, resource
from tests.support.strategies import KINDS, page
from zswapd.core import compress
from zswapd.system import heap
libc = ctypes.CDLL(None)
assert heap.grow_libc_heap(libc, 4 << 20)
heap.grow_python_heap(4 << 20)
zstd = compress.get("zstd")
pages = [page(kind, seed, 4096) for kind in KINDS for seed in range(40)]
packed = [zstd.compress(memoryview(one)) for one in pages]
first = zstd.decompress(memoryview(packed[0]), 4096)
gc.disable()
for turn in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for data in packed:
        zstd.decompress(memoryview(data), 4096)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_reading_a_page_asks_the_kernel_for_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY], check=True, capture_output=True, text=True, timeout=60
    )
    first, second = map(int, done.stdout.split())
    assert first <= 24, "its context was not all there: 96 KiB"
    assert second == 0


def test_marks_that_nobody_made_at_start_take_memory_when_a_pass_begins() -> None:
    config = make_config()
    assert marks_areas(config) == {}
    core = Core(config)
    assert not core.recompression.is_prepared
    fill(core, 40)
    core.recompression.gain_percent = 5  # lower: forgets marks, which are not there
    core.recompression.prepare()
    assert core.recompression.is_prepared
    recompress_all(core)
    tried = core.statistics().recompression.tried
    assert tried > 20
    recompress_all(core)
    assert core.statistics().recompression.tried == tried, "what was in vain is not tried again"
    core.close()


def test_marks_of_an_older_program_are_used_though_recompression_is_off() -> None:
    """Layout 1 of the shared state has them always."""
    config = make_config()
    state = SharedState.new(
        {"page_size": 4096},
        lost=lost_bitmap_bytes(config),
        max_io=1 << 20,
        kind="memfd",
        areas=marks_bytes(config),
    )
    core = Core(config)
    successor = Core(
        config, inherited=Inherited(core.arena.fd, state.lost(), marks_in(state.areas))
    )
    assert successor.recompression.is_prepared
    fill(successor, 40)
    recompress_all(successor)
    assert any(state.area("tried:swap"))
    successor.close()
    core.close()


def test_marks_that_are_made_later_outlive_a_core() -> None:
    config = make_config()
    shape = {"page_size": 4096}
    state = SharedState.new(shape, lost=lost_bitmap_bytes(config), max_io=1 << 20, kind="memfd")
    assert marks_of(state.extension, config) == {}
    size = sum(marks_bytes(config).values())
    core = Core(config)
    if core.arena.kind != "tmpfs":
        pytest.skip("marks beside a memfd do not outlive a core; a tmpfs needs root and Linux 6.4")
    fd = core.arena.fd
    core = Core(
        config, inherited=Inherited(fd, more_marks=lambda: marks_of(state.extend(size), config))
    )
    fill(core, 90)
    core.recompression.prepare()
    recompress_all(core)
    assert core.statistics().recompression.tried > 60
    later = SharedState(os.dup(state.fd))
    marks = marks_of(later.extension, config)
    assert [len(view) for view in marks.values()] == [1024]
    successor = Core(config, inherited=Inherited(fd, tried=marks))
    assert successor.recompression.is_prepared
    recompress_all(successor)
    assert successor.statistics().recompression.tried == 0
