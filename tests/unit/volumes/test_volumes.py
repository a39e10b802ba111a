# SPDX-License-Identifier: GPL-2.0-or-later
"""Cache volumes without a mount: the pages read, their source, the number of reads.

No stale page ever comes back.
"""

# ruff: noqa: ASYNC240 - files of a few pages in a temporary directory

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.volumes import PAGE, Box, Device, make_file
from zswapd.errors import ConfigError, VolumeError
from zswapd.fuse.inodes import Directory
from zswapd.volumes import file_io as files
from zswapd.volumes import gate, watch
from zswapd.volumes.fetches import FileRead, Want
from zswapd.volumes.mounted import VolumeDirectory
from zswapd.volumes.volume import GAP_BYTES, RUN_BYTES, Volume

GAP, RUN = GAP_BYTES // PAGE, RUN_BYTES // PAGE


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def box(device: Device) -> Box:
    return Box(device)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "backing"


async def until(condition: Callable[[], object]) -> None:
    """Wait for threads."""
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


@contextlib.asynccontextmanager
async def one(box: Box, path: Path, mode: str = "ro") -> AsyncIterator[Volume]:
    """Run volumes with one volume."""
    async with box.running() as volumes:
        yield await volumes.add("disk", str(path), mode)


# Reading.


async def test_second_read_comes_from_the_cache(box: Box, path: Path) -> None:
    data = make_file(path, 64)
    async with one(box, path) as volume:
        assert await volume.read(0, len(data)) == data
        assert box.device.reads == [(0, 64)]
        assert await volume.read(0, len(data)) == data
        assert await volume.read(5 * PAGE + 7, 9000) == data[5 * PAGE + 7 : 5 * PAGE + 7 + 9000]
        assert box.device.reads == [(0, 64)]
        statistics = volume.statistics()
    assert (statistics.misses, statistics.hits, statistics.pages) == (1, 2, 64)
    assert statistics.backing_read_bytes == len(data)


async def test_read_that_lacks_one_page_of_many_is_a_miss(box: Box, path: Path) -> None:
    make_file(path, 16)
    async with one(box, path) as volume:
        await volume.read(0, 15 * PAGE)
        for size in (15, 16, 16):
            await volume.read(0, size * PAGE)
        statistics = volume.statistics()
        assert (statistics.misses, statistics.hits) == (2, 2)
        assert statistics.backing_read_bytes == 16 * PAGE


@pytest.mark.parametrize("pages", [0.001, 0.5, 1, 2.25, 3])
async def test_end_of_the_file_is_where_the_backing_file_has_it(
    box: Box, path: Path, pages: float
) -> None:
    data = make_file(path, pages)
    async with one(box, path) as volume:
        for _ in range(2):
            for offset in (0, 1, PAGE - 1, PAGE, len(data) - 1, len(data), len(data) + PAGE):
                for size in (1, PAGE, 20 * PAGE):
                    assert await volume.read(offset, size) == data[offset : offset + size]
        assert volume.size == len(data)


@pytest.mark.parametrize("is_direct", [True, False])
async def test_backing_file_leaves_no_second_copy_in_the_page_cache(
    box: Box, path: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_file(path, 64)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not is_direct:  # as on a file system that has none
        real = os.open
        monkeypatch.setattr(
            os,
            "open",
            lambda name, flags, *more, **named: real(name, _buffered(flags), *more, **named),
        )
    async with one(box, path) as volume:
        assert await volume.read(0, len(data)) == data
        assert resident_pages(path) == 0


def _buffered(flags: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return flags


def resident_pages(path: Path) -> int:
    """Count a file's pages in the page cache (mincore)."""
    with (
        path.open("rb") as file,
        mmap.mmap(
            file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE
        ) as view,
    ):
        length = len(view)
        vector = (ctypes.c_ubyte * (-(-length // PAGE)))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert (
            ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.c_void_p(address), ctypes.c_size_t(length), vector
            )
            == 0
        )
        pages = sum(byte & 1 for byte in vector)
        gc.collect()
        return pages


async def test_missing_pages_are_read_together_over_small_gaps_and_in_long_runs(
    box: Box, path: Path
) -> None:
    data = make_file(path, 3 * RUN)
    async with one(box, path) as volume:
        for page in (10, 11, 40):
            await volume.read(page * PAGE, PAGE)
        box.device.reads.clear()
        assert await volume.read(0, 20 * PAGE) == data[: 20 * PAGE]
        assert box.device.reads == [(0, 20)], "two pages that are there are read over"
        box.device.reads.clear()
        assert await volume.read(0, len(data)) == data
        # From behind the twenty to the end, in pieces as long as a buffer.
        assert sorted(box.device.reads) == [(20, RUN), (20 + RUN, RUN), (20 + 2 * RUN, RUN - 20)]


async def test_gap_that_is_cached_and_long_is_not_read_again(box: Box, path: Path) -> None:
    data = make_file(path, 4 * GAP)
    async with one(box, path) as volume:
        await volume.read(PAGE, (GAP + 1) * PAGE)
        box.device.reads.clear()
        assert await volume.read(0, (GAP + 4) * PAGE) == data[: (GAP + 4) * PAGE]
        assert sorted(box.device.reads) == [(0, 1), (GAP + 2, 2)]


async def test_readers_of_one_page_share_one_read(box: Box, path: Path) -> None:
    data = make_file(path, 32)
    async with one(box, path) as volume:
        box.device.answering.clear()
        results: dict[int, bytes] = {}

        async def read(number: int, first: int, count: int) -> None:
            results[number] = await volume.read(first * PAGE, count * PAGE)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, 0, 0, 16)
            await until(lambda: box.device.reads)
            for number in range(1, 6):
                nursery.start_soon(read, number, 4, 8)
            nursery.start_soon(read, 6, 12, 12)
            await until(lambda: len(box.device.reads) == 2)
            box.device.answering.set()
        assert box.device.reads == [(0, 16), (16, 8)]
        assert all(results[number] == data[4 * PAGE : 12 * PAGE] for number in range(1, 6))
        assert results[6] == data[12 * PAGE : 24 * PAGE]
        assert volume.statistics().shared_reads == 6


async def test_queue_depth_is_bounded(box: Box, path: Path) -> None:
    make_file(path, 400)
    async with one(box, path) as volume, trio.open_nursery() as nursery:
        box.device.answering.clear()
        for number in range(20):
            nursery.start_soon(volume.read, number * 20 * PAGE, PAGE)
        await until(lambda: len(box.device.reads) == 3)
        await trio.sleep(0.05)
        assert len(box.device.reads) == 3
        box.device.answering.set()


async def test_sequential_stream_over_the_cutoff_is_read_and_not_kept(box: Box, path: Path) -> None:
    data = make_file(path, 64)
    async with one(box, path) as volume:
        box.volumes.apply(check_s=0.0, cutoff=16 * PAGE)
        for page in range(0, 64, 8):
            assert await volume.read(page * PAGE, 8 * PAGE) == data[page * PAGE : (page + 8) * PAGE]
        await until(lambda: volume.statistics().pages == 16)
        assert volume.statistics().bypassed_bytes == 48 * PAGE
        await volume.read(60 * PAGE, PAGE)
        await until(lambda: volume.statistics().pages == 17)


# Errors.


async def test_bad_page_fails_its_readers_alone(box: Box, path: Path) -> None:
    data = make_file(path, 32)
    async with one(box, path) as volume:
        box.device.bad = {20}
        box.device.answering.clear()
        outcome: dict[str, object] = {}

        async def read(name: str, first: int, count: int) -> None:
            try:
                outcome[name] = await volume.read(first * PAGE, count * PAGE)
            except VolumeError as error:
                outcome[name] = error.errno_

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "all", 0, 32)
            await until(lambda: box.device.reads)
            nursery.start_soon(read, "good", 3, 2)  # joins a read that will fail
            await trio.sleep(0.02)
            box.device.answering.set()
        assert outcome == {"all": errno.EIO, "good": data[3 * PAGE : 5 * PAGE]}
        assert volume.statistics().read_errors == 1
        box.device.bad = set()
        assert await volume.read(0, 32 * PAGE) == data, "an error is not remembered"


async def test_any_number_of_readers_of_a_slow_device_are_served(box: Box, path: Path) -> None:
    data = make_file(path, 2000)
    box.device.after = lambda: time.sleep(0.003)
    async with one(box, path) as volume, trio.open_nursery() as nursery:
        box.volumes.apply(check_s=1000, cutoff=None)
        got: dict[int, bytes] = {}

        async def read(page: int) -> None:
            got[page] = await volume.read(page * PAGE, PAGE)

        for number in range(200):
            nursery.start_soon(read, number * 10)
        await until(lambda: volume.statistics().pending == 200)
        with trio.fail_after(0.1):
            await volume.refresh()
    assert got == {page: data[page * PAGE : (page + 1) * PAGE] for page in range(0, 2000, 10)}
    assert volume.statistics().turned_away == 0
    assert volume.statistics().pending == 0


async def test_read_that_nobody_shares_is_not_tried_again(box: Box, path: Path) -> None:
    """A device that takes ten seconds to fail would hold its reader for twenty."""
    make_file(path, 64)
    async with one(box, path) as volume:
        box.device.bad = {20}
        for first, count in ((20, 1), (16, 8)):
            box.device.reads.clear()
            with pytest.raises(VolumeError) as raised:
                await volume.read(first * PAGE, count * PAGE)
            assert raised.value.errno_ == errno.EIO
            assert box.device.reads == [(first, count)]
        # Over a gap, which may be what cannot be read.
        await volume.read(19 * PAGE, PAGE)
        await volume.read(21 * PAGE, PAGE)
        box.device.reads.clear()
        box.device.bad = {19}
        assert await volume.read(18 * PAGE, 3 * PAGE)
        assert sorted(box.device.reads) == [(18, 1), (18, 3), (20, 1)]


@pytest.mark.slow
async def test_hung_device_holds_up_its_own_readers_and_turns_away_the_many(
    box: Box, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST", 10)
    monkeypatch.setattr(gate, "PATIENCE_S", 1.0)
    make_file(path, 64)
    data = make_file(tmp_path / "other", 4, seed=1)
    async with box.running() as volumes, trio.open_nursery() as nursery:
        volume = await volumes.add("disk", str(path), "ro")
        other = await volumes.add("other", str(tmp_path / "other"), "ro")
        assert await other.read(0, PAGE) == data[:PAGE]
        box.device.answering.clear()
        for number in range(10):
            nursery.start_soon(volume.read, number * PAGE, PAGE)
        await until(lambda: len(box.device.reads) >= 3)
        begin = trio.current_time()
        for expected in (1.0, 0.0):  # a later read does not wait again
            with pytest.raises(VolumeError, match="11 requests wait"):
                await volume.read(0, PAGE)
            assert expected - 0.1 <= trio.current_time() - begin < expected + 0.8
            begin = trio.current_time()
        with trio.fail_after(1):
            assert await other.read(0, PAGE) == data[:PAGE]
        assert volume.statistics().turned_away == 2
        assert volume.statistics().pending == 10
        box.device.answering.set()
    assert volume.statistics().pending == 0


async def test_hung_volumes_leave_every_other_a_place(
    box: Box, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "SHARE", 4)
    make_file(path, 64)
    data = make_file(tmp_path / "other", 4, seed=1)
    async with box.running(most_waiting=20) as volumes, trio.open_nursery() as nursery:
        volume = await volumes.add("disk", str(path), "ro")
        other = await volumes.add("other", str(tmp_path / "other"), "ro")
        for _ in range(2):
            box.device.answering.clear()
            for number in range(4 + 20 - 2 * 2 * 4):
                nursery.start_soon(volume.read, number * PAGE, PAGE)
            await until(lambda: volume.statistics().pending == 8)
            with pytest.raises(VolumeError, match="8 requests wait"):
                await volume.read(0, PAGE)
            await volume.refresh()
            box.device.answering.set()
            assert await other.read(0, PAGE) == data[:PAGE]
            await until(lambda: volume.statistics().pending == 0)
            volume.drop()


async def test_data_that_waits_to_be_written_takes_places_by_its_size(box: Box, path: Path) -> None:
    """It waits in our memory; one system call comes as a thousand writes of a MiB."""
    make_file(path, 3000)
    longest = 1 << 20
    outcomes: list[int] = []

    async def write(volume: Volume) -> None:
        try:
            outcomes.append(await volume.write(0, bytes(longest)))
        except VolumeError as error:
            outcomes.append(-error.errno_)

    async with box.running(most_waiting=300) as volumes:
        volume = await volumes.add("disk", str(path), "writethrough")
        other = await volumes.add("other", str(path), "writethrough")
        box.device.answering.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(write, volume)
            await until(lambda: len(outcomes) == 20 - (1 + (300 - 4 * 16) // 16))
            assert set(outcomes) == {-errno.EIO}
            nursery.start_soon(write, other)  # has places of its own
            await until(lambda: other.statistics().pending)
            assert await volumes.find("other").source.look() is None
            box.device.answering.set()
        assert outcomes.count(longest) == 15 + 1
        outcomes.clear()
        async with trio.open_nursery() as nursery:  # all were given back
            for _ in range(15):
                nursery.start_soon(write, volume)
        assert outcomes == [longest] * 15


async def test_turn_of_whoever_was_killed_is_the_next_one_s_and_removal_ends_all_waiting(
    box: Box, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST", 2)
    data = make_file(path, 64)
    outcomes: dict[int, object] = {}

    async def read(number: int) -> None:
        try:
            outcomes[number] = await volume.read(number * 16 * PAGE, PAGE)
        except VolumeError as error:
            outcomes[number] = error.errno_

    async with box.running() as volumes:
        volume = await volumes.add("disk", str(path), "ro")
        box.device.answering.clear()
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as killed:
                for number in (0, 1, 2):
                    killed.start_soon(read, number)
                await until(lambda: volume.statistics().pending == 3)
                nursery.start_soon(read, 3)
                await until(lambda: volume.statistics().pending == 4)
                killed.cancel_scope.cancel()  # two requests under way, and the next in line
            await until(lambda: volume._requests._inside == 1)
            assert volume.statistics().pending == 1
            nursery.start_soon(read, 1)
            nursery.start_soon(read, 2)
            await until(lambda: volume.statistics().pending == 3)
            box.device.answering.set()
        assert outcomes == {number: data[number * 16 * PAGE :][:PAGE] for number in (1, 2, 3)}
        volume.drop()
        box.device.answering.clear()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(read, number)
            await until(lambda: volume.statistics().pending == 4)
            with trio.fail_after(2):
                await volumes.remove("disk")
        assert outcomes == dict.fromkeys(range(4), errno.ESTALE)
        assert volume.statistics().pending == 0


async def test_killed_readers_leave_nothing_behind(box: Box, path: Path) -> None:
    data = make_file(path, 64)
    async with one(box, path) as volume:
        box.device.answering.clear()
        for _ in range(20):
            with trio.move_on_after(0.01) as scope:
                await volume.read(0, 40 * PAGE)
            assert scope.cancelled_caught
        for number in range(20):
            with trio.move_on_after(0.002):
                await volume.read((40 + number) * PAGE, PAGE)
        assert volume.statistics().pending == 0
        assert len(box.device.reads) == 3, "those that nobody waits for any more are not begun"
        box.device.answering.set()
        assert await volume.read(0, 64 * PAGE) == data
        await until(lambda: not volume._fetches)
        assert volume.lane.is_idle


# What changes underneath.


async def test_changed_backing_file_drops_what_was_cached_everywhere(box: Box, path: Path) -> None:
    make_file(path, 8)
    async with one(box, path) as volume:
        await volume.read(0, 8 * PAGE)
        born = volume.mtime_ns
        await until(lambda: not volume._untold)
        box.told.clear()
        new = make_file(path, 8, seed=1)
        assert await volume.read(0, 8 * PAGE) == new
        await until(lambda: box.told == [volume.inode])
        assert volume.mtime_ns > born
        assert volume.statistics().drops == 2, "once when it was first seen"


@pytest.mark.parametrize(
    "how", ["in place, times set back", "replaced", "by a link", "longer", "shorter", "emptied"]
)
async def test_every_way_to_change_a_file_is_seen(
    box: Box, path: Path, tmp_path: Path, how: str
) -> None:
    old = make_file(path, 8)
    link = tmp_path / "link"
    link.symlink_to(path)
    async with one(box, link) as volume:
        assert await volume.read(0, 8 * PAGE) == old
        before = path.stat()
        if how == "in place, times set back":
            new = make_file(path, 8, seed=2)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif how == "replaced":
            new = make_file(tmp_path / "new", 8, seed=2)
            (tmp_path / "new").rename(path)
        elif how == "by a link":
            new = make_file(tmp_path / "new", 8, seed=2)
            link.unlink()
            link.symlink_to(tmp_path / "new")
        else:
            new = make_file(path, {"longer": 12, "shorter": 3.5, "emptied": 0}[how], seed=2)
        assert await volume.read(0, 20 * PAGE) == new
        assert volume.size == len(new)


async def test_change_within_the_clock_s_tick_is_not_missed(
    box: Box, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes after we have looked, and its times stay what they were."""
    make_file(path, 4)
    frozen = path.stat()
    async with one(box, path) as volume:
        monkeypatch.setattr(time, "time_ns", lambda: frozen.st_ctime_ns + 1000)
        await volume.read(0, 4 * PAGE)
        new = make_file(path, 4, seed=1)
        # As if the clock had stood still meanwhile.
        stat = os.stat_result
        monkeypatch.setattr(
            Path, "stat", lambda self, **_: _with_times(stat, os.stat(self), frozen)
        )
        monkeypatch.setattr(time, "time_ns", lambda: frozen.st_ctime_ns + 10**9)
        assert await volume.read(0, 4 * PAGE) == new


def _with_times(_: object, now: os.stat_result, then: os.stat_result) -> object:
    class Stat:
        st_mode, st_dev, st_ino, st_rdev = now.st_mode, now.st_dev, now.st_ino, now.st_rdev
        st_size, st_mtime_ns, st_ctime_ns = now.st_size, then.st_mtime_ns, then.st_ctime_ns

    return Stat()


async def test_looks_are_no_more_frequent_than_asked_for_but_at_open(box: Box, path: Path) -> None:
    old = make_file(path, 4)
    async with one(box, path) as volume:
        box.volumes.apply(check_s=0.2, cutoff=None)
        await volume.source.look()
        assert await volume.read(0, PAGE) == old[:PAGE]
        new = make_file(path, 4, seed=1)
        assert await volume.read(0, PAGE) == old[:PAGE], "looked at less than 0.2 s ago"
        await trio.sleep(0.2)
        assert await volume.read(0, PAGE) == new[:PAGE]
        newest = make_file(path, 4, seed=2)
        await volume.opened()
        assert await volume.read(0, PAGE) == newest[:PAGE]


@pytest.mark.parametrize("is_inherited", [False, True])
@pytest.mark.slow
async def test_file_that_is_open_is_looked_at_without_being_asked_and_one_that_is_not_is_not(
    box: Box, path: Path, is_inherited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that reads a mapping makes no request."""
    monkeypatch.setattr(watch, "LEAST_S", 0.02)
    make_file(path, 4)
    left: dict[str, Any] = {}
    if is_inherited:  # opens are not known to a successor
        async with one(box, path):
            left = box.volumes.remember()
        assert left["volumes"]
        left["volumes"][0]["signature"] = None  # nor can it be vouched for
    async with box.running(left=left) as volumes:
        volume = (
            volumes.find("disk") if is_inherited else await volumes.add("disk", str(path), "ro")
        )
        box.volumes.apply(check_s=0.05, cutoff=None)

        async def is_change_seen(seed: int) -> bool:
            await until(lambda: volume.vouched)
            box.told.clear()
            make_file(path, 4, seed=seed)
            with trio.move_on_after(0.5):
                while not box.told:
                    await trio.sleep(0.01)
            return bool(box.told)

        await volume.renew()  # by command
        assert await is_change_seen(1) == is_inherited
        await volume.opened()
        await volume.opened()
        assert await is_change_seen(2)
        volume.closed()
        assert await is_change_seen(3)
        volume.closed()
        await trio.sleep(0.1)
        assert await is_change_seen(4) == is_inherited
        for _ in range(3):
            volume.closed()
        await volume.opened()
        assert await is_change_seen(5)


async def test_open_waits_until_the_kernel_has_forgotten_and_reads_do_not(
    box: Box, path: Path
) -> None:
    """Its readers' pages are locked until they are answered.

    A read that waited for it would wait for itself.
    """
    make_file(path, 4)
    async with one(box, path) as volume:
        await volume.opened()
        box.telling.clear()
        new = make_file(path, 4, seed=1)
        with trio.fail_after(5):
            assert await volume.read(0, PAGE) == new[:PAGE]
        with trio.move_on_after(0.05) as scope:
            await volume.opened()
        assert scope.cancelled_caught
        assert volume.vouched is None, "a successor has to have the kernel forget once more"
        box.telling.set()
        with trio.fail_after(5):
            await volume.opened()
        assert volume.vouched is not None


async def test_read_begun_before_a_change_does_not_bring_its_data_back(
    box: Box, path: Path
) -> None:
    make_file(path, 8)
    new = b""
    async with one(box, path) as volume:
        await volume.source.look()

        def change() -> None:
            nonlocal new
            box.device.after = lambda: None
            new = make_file(path, 8, seed=1)
            trio.from_thread.run(volume.source.look, trio_token=token)

        token = trio.lowlevel.current_trio_token()
        box.device.after = change  # between the device's data and our knowing of it
        await volume.read(0, 8 * PAGE)  # old or new: it was asked before
        await until(lambda: not volume._fetches)
        assert volume.statistics().pages == 0, "stale pages were kept"
        assert await volume.read(0, 8 * PAGE) == new


async def test_later_reader_does_not_join_a_read_begun_before_a_change(
    box: Box, path: Path
) -> None:
    make_file(path, 8)
    async with one(box, path) as volume, trio.open_nursery() as nursery:
        box.volumes.apply(check_s=1000, cutoff=None)
        await volume.source.look()
        has_data, may_answer = threading.Event(), threading.Event()

        def hold() -> None:
            box.device.after = lambda: None
            has_data.set()
            may_answer.wait(10)

        box.device.after = hold
        nursery.start_soon(volume.read, 0, 8 * PAGE)
        await until(has_data.is_set)
        new = make_file(path, 8, seed=1)
        await volume.source.look()
        try:
            with trio.fail_after(2):
                assert await volume.read(0, 8 * PAGE) == new
        finally:
            may_answer.set()


async def test_file_that_shrinks_while_it_is_read_is_short_and_never_made_up(
    box: Box, path: Path
) -> None:
    data = make_file(path, 64)
    async with one(box, path) as volume:
        box.volumes.apply(check_s=1000, cutoff=None)
        await volume.source.look()
        os.truncate(path, 5 * PAGE + 100)
        assert await volume.read(2 * PAGE, 62 * PAGE) == data[2 * PAGE : 5 * PAGE + 100]
        assert await volume.read(60 * PAGE, PAGE) == b""
        assert volume.size == 5 * PAGE + 100


async def test_shrinking_seen_by_another_while_a_read_is_under_way_makes_nothing_up(
    box: Box, path: Path
) -> None:
    """The reader asked for more than there is by the time its read is over.

    Its buffer has held other pages before.
    """
    data = make_file(path, 64)
    async with one(box, path) as volume, trio.open_nursery() as nursery:
        box.volumes.apply(check_s=1000, cutoff=None)
        await volume.source.look()
        for first in range(0, 36, 12):  # all three buffers
            await volume.read((first + 8) * PAGE, 8 * PAGE)
        volume.drop()
        got: list[bytes] = []
        box.device.reads.clear()
        box.device.answering.clear()

        async def read() -> None:
            got.append(await volume.read(0, 8 * PAGE))

        nursery.start_soon(read)
        await until(lambda: box.device.reads)
        os.truncate(path, 2 * PAGE + 100)
        await volume.source.look()
        box.device.answering.set()
        await until(lambda: got)
        assert got == [data[: 2 * PAGE + 100]]


async def test_page_that_the_file_ends_in_by_now_is_not_filled_up_with_zeros(
    box: Box, path: Path
) -> None:
    """What is behind it was cached and is older.

    A reader gets what there was, or what there is, and nothing between.
    """
    data = make_file(path, 8)
    async with one(box, path) as volume, trio.open_nursery() as nursery:
        box.volumes.apply(check_s=1000, cutoff=None)
        await volume.read(3 * PAGE, 5 * PAGE)
        got: list[bytes] = []
        box.device.answering.clear()

        async def read() -> None:
            got.append(await volume.read(0, 8 * PAGE))

        nursery.start_soon(read)
        await until(lambda: len(box.device.reads) == 2)
        os.truncate(path, 2 * PAGE + 10)
        await volume.source.look()
        box.device.answering.set()
        await until(lambda: got)
        assert got == [data[: 2 * PAGE + 10]]


def test_fetch_gives_nothing_from_behind_its_end_however_short_the_file_is_by_now() -> None:
    want, fetch = Want(0, memoryview(bytearray(4 * PAGE)), range(4)), FileRead(0, 4, (), keep=True)
    fetch.wants.append(want)
    fetch.load(memoryview(bytearray(b"o" * 4 * PAGE)), PAGE + 100, PAGE, PAGE + 100)
    assert want.is_short
    assert bytes(want.out[2 * PAGE :]) == bytes(2 * PAGE), "what the buffer held before"


async def test_missing_file_fails_its_readers_until_it_is_back(
    box: Box, path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log("a cache volume cannot be used: .*No such file")
    data = make_file(path, 4)
    async with one(box, path) as volume:
        await volume.read(0, 4 * PAGE)
        path.rename(path.with_name("away"))
        for _ in range(3):
            with pytest.raises(VolumeError, match="No such file") as raised:
                await volume.read(0, PAGE)
            assert raised.value.errno_ == errno.ENOENT
        assert volume.statistics().pages == 0
        path.with_name("away").rename(path)
        assert await volume.read(0, 4 * PAGE) == data


@pytest.mark.parametrize(
    "name", ["é x", "日本\n\t", "back\\slash", "a\\040b", "line\u2028end", "byte\udce9"]
)
def test_our_own_mount_is_found_by_any_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel writes it: blanks, tabs, line ends and backslashes in octal."""
    written = (
        name.replace("\\", "\\134")
        .replace(" ", "\\040")
        .replace("\n", "\\012")
        .replace("\t", "\\011")
    )
    table = tmp_path / "mountinfo"
    lines = (
        f"35 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n36 35 0:45 / /mnt/{written} rw -"
        " fuse.zswapd zswapd rw\n"
    )
    table.write_text(lines, errors="surrogateescape")
    real = files._mounts
    monkeypatch.setattr(files, "_mounts", lambda: real(table))
    assert files._site(Path("/mnt") / name).device == os.makedev(0, 45)


# Writing.


async def test_write_goes_to_the_backing_file_and_lets_go_of_what_was_cached(
    box: Box, path: Path
) -> None:
    data = bytearray(make_file(path, 16))
    async with one(box, path, "writethrough") as volume:
        await volume.read(0, 16 * PAGE)
        await until(lambda: volume.statistics().pages == 16)
        await until(lambda: not volume._untold)
        box.told.clear()
        assert await volume.write(3 * PAGE + 5, b"x" * PAGE) == PAGE
        data[3 * PAGE + 5 : 4 * PAGE + 5] = b"x" * PAGE
        assert path.read_bytes() == data
        assert volume.statistics().pages == 14
        assert await volume.read(0, 16 * PAGE) == data
        await volume.sync()
        assert await volume.read(0, 16 * PAGE) == data
        assert not box.told, "what we wrote ourselves is no change underneath"
        assert volume.statistics().drops == 1


async def test_write_at_the_end_is_short_or_has_no_space(box: Box, path: Path) -> None:
    make_file(path, 2)
    async with one(box, path, "writethrough") as volume:
        assert await volume.write(2 * PAGE - 3, b"abcdef") == 3
        with pytest.raises(VolumeError) as raised:
            await volume.write(2 * PAGE, b"x")
        assert raised.value.errno_ == errno.ENOSPC
        assert path.stat().st_size == 2 * PAGE


@pytest.mark.parametrize("bad", [4, 6])
async def test_write_that_fails_or_is_short_leaves_nothing_stale(
    box: Box, path: Path, bad: int
) -> None:
    make_file(path, 16)
    async with one(box, path, "writethrough") as volume:
        await volume.read(0, 16 * PAGE)
        await until(lambda: volume.statistics().pages == 16)
        box.device.bad = {bad}
        if bad == 4:
            with pytest.raises(VolumeError) as raised:
                await volume.write(4 * PAGE, b"y" * 4 * PAGE)
            assert raised.value.errno_ == errno.EIO
        else:
            assert await volume.write(4 * PAGE, b"y" * 4 * PAGE) == 2 * PAGE
        box.device.bad = set()
        assert await volume.read(0, 16 * PAGE) == path.read_bytes()
        assert volume.statistics().write_errors == 1


async def test_read_during_a_write_does_not_bring_the_old_data_back(box: Box, path: Path) -> None:
    make_file(path, 8)
    async with one(box, path, "writethrough") as volume, trio.open_nursery() as nursery:
        box.volumes.apply(check_s=1000, cutoff=None)
        await volume.source.look()
        box.device.answering.clear()
        nursery.start_soon(volume.read, 0, 8 * PAGE)
        await until(lambda: box.device.reads)
        nursery.start_soon(volume.write, 0, b"z" * PAGE)
        await until(lambda: box.device.writes)
        box.device.answering.set()
        await until(lambda: volume.statistics().pending == 0 and not volume._fetches)
        assert await volume.read(0, 8 * PAGE) == path.read_bytes()


async def test_somebody_else_s_change_is_seen_although_we_write(box: Box, path: Path) -> None:
    make_file(path, 8)
    async with one(box, path, "writethrough") as volume:
        box.volumes.apply(check_s=1000, cutoff=None)
        await volume.read(0, 8 * PAGE)
        await until(lambda: volume.statistics().pages == 8)
        with path.open("r+b") as file:
            file.seek(6 * PAGE)
            file.write(b"somebody else")
        await volume.write(0, b"ourselves")
        assert await volume.read(0, 8 * PAGE) == path.read_bytes()


async def test_read_only_volume_is_not_written(box: Box, path: Path) -> None:
    data = make_file(path, 2)
    async with one(box, path) as volume:
        assert not volume.writable
        with pytest.raises(VolumeError) as raised:
            await volume.write(0, b"x")
        assert raised.value.errno_ == errno.EROFS
    assert path.read_bytes() == data


# Volumes come and go.


async def test_backing_that_can_be_none_is_refused_with_its_errno(
    box: Box, path: Path, tmp_path: Path
) -> None:
    make_file(path, 2)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "/nowhere/at/all": errno.ENOENT,
        str(tmp_path): errno.EISDIR,
        str(path / "below"): errno.ENOTDIR,
        str(tmp_path / "loop"): errno.ELOOP,
        str(tmp_path / "pipe"): errno.EINVAL,
        "relative/path": errno.EIO,
        "/a\0b": errno.EIO,
        "/dev/null": errno.EINVAL,
    }
    async with box.running() as volumes:
        for number, (backing, expected) in enumerate(cases.items()):
            with pytest.raises(VolumeError) as raised:
                await volumes.add(f"v{number}", backing, "ro")
            assert raised.value.errno_ == expected, backing
        assert not box.entries.files
        assert volumes.volumes() == []
        await until(lambda: all(lane.is_idle for lane in volumes._lanes))
        with pytest.raises(VolumeError, match="no mode 'rw'"):
            await volumes.add("disk", str(path), "rw")
        await volumes.add("disk", str(path), "ro")
        with pytest.raises(VolumeError, match="already"):
            await volumes.add("disk", str(path), "ro")


@pytest.mark.parametrize("name", ["a/b", "/", "", ".", "..", "x" * 256, "line\nend", "a\0b"])
async def test_name_that_can_be_no_file_s_is_refused_and_leaves_nothing(
    box: Box, path: Path, name: str
) -> None:
    data = make_file(path, 2)
    directory = Directory()
    box.entries = VolumeDirectory(directory)  # type: ignore[assignment]
    nodes = len(directory)
    async with box.running(most=1) as volumes:
        with pytest.raises(ConfigError, match="cannot be the name") as raised:
            await volumes.add(name, str(path), "ro")
        assert raised.value.hint
        assert (volumes.volumes(), len(directory), volumes.remember()["volumes"]) == ([], nodes, [])
        await until(lambda: all(lane.is_idle for lane in volumes._lanes))
        volume = await volumes.add("disk", str(path), "ro")
        assert await volume.read(0, 2 * PAGE) == data


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EROFS, errno.ENXIO])
@pytest.mark.parametrize("call", ["stat", "open"])
async def test_backing_that_cannot_be_opened_is_refused_with_the_reason(
    box: Box,
    path: Path,
    code: int,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[..., None],
) -> None:
    """Root may open everything, but not on every file system."""
    data = make_file(path, 2)

    def refuse(name: object, *_: object, **__: object) -> object:
        raise OSError(code, os.strerror(code), str(name))

    monkeypatch.setattr(*{"stat": (Path, "stat"), "open": (files.os, "open")}[call], refuse)  # type: ignore[attr-defined]
    expect_log(f"cache volume configured cannot be used yet: .*{os.strerror(code)}")
    async with box.running(configured={"configured": (str(path), "writethrough")}) as volumes:
        with pytest.raises(VolumeError, match=os.strerror(code)) as raised:
            await volumes.add("added", str(path), "writethrough")
        assert raised.value.errno_ == code
        assert [volume.name for volume in volumes.volumes()] == ["configured"]
        with pytest.raises(VolumeError, match=os.strerror(code)) as raised:
            await volumes.find("configured").opened()
        assert raised.value.errno_ == code
        monkeypatch.undo()
        assert await volumes.find("configured").read(0, 2 * PAGE) == data


async def test_no_more_volumes_than_there_are_threads_for(box: Box, path: Path) -> None:
    make_file(path, 2)
    async with box.running(most=2) as volumes:
        await volumes.add("one", str(path), "ro")
        await volumes.add("two", str(path), "ro")
        with pytest.raises(VolumeError, match="threads for 2 volumes"):
            await volumes.add("three", str(path), "ro")
        await volumes.remove("one")
        await until(lambda: all(lane.is_idle for lane in volumes._lanes))
        await volumes.add("three", str(path), "ro")
        with pytest.raises(VolumeError, match="no volume one"):
            await volumes.remove("one")


async def test_removed_while_it_is_read_its_readers_get_estale_at_once(
    box: Box, path: Path
) -> None:
    make_file(path, 16)
    async with box.running() as volumes:
        volume = await volumes.add("disk", str(path), "writethrough")
        await volume.read(8 * PAGE, 8 * PAGE)
        box.device.reads.clear()
        box.device.answering.clear()
        outcomes: list[int] = []

        async def read() -> None:
            with pytest.raises(VolumeError) as raised:
                await volume.read(0, 4 * PAGE)
            outcomes.append(raised.value.errno_)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(read)
            await until(lambda: box.device.reads)
            await until(lambda: not volume._untold)
            box.told.clear()
            with trio.fail_after(2):
                await volumes.remove("disk")
        assert outcomes == [errno.ESTALE] * 2
        assert not box.entries.files
        await until(lambda: set(box.told) == {volume.inode, "disk"})
        for attempt in (
            volume.read(8 * PAGE, PAGE),
            volume.write(0, b"x"),
            volume.opened(),
            volume.refresh(),
            volume.sync(),
        ):
            with pytest.raises(VolumeError) as raised:
                await attempt
            assert raised.value.errno_ == errno.ESTALE
        # Another of the same name has another number, other pages, and other threads while those of
        # the first hang.
        again = await volumes.add("disk", str(path), "ro")
        assert again.inode != volume.inode
        assert again.lane is not volume.lane
        box.device.answering.set()
        await until(lambda: volume.lane.is_idle)
        assert again.statistics().pages == 0, "what the old one's read brought is not the new one's"


async def test_successor_has_the_same_volumes_and_forgets_only_what_has_changed(
    device: Device, tmp_path: Path
) -> None:
    same, other, late = tmp_path / "same", tmp_path / "other", tmp_path / "late"
    for path in (same, other, late):
        make_file(path, 4)
    configured = {"same": (str(same), "ro"), "gone": (str(same), "ro")}
    first = Box(device)
    async with first.running(configured=configured, most=4) as volumes:
        await volumes.add("other", str(other), "writethrough")
        await volumes.remove("gone")
        for volume in volumes.volumes():
            await volume.source.look()
            await until(lambda: volume.vouched is not None)  # noqa: B023
        numbers = {volume.name: volume.inode for volume in volumes.volumes()}
        left = volumes.remember()
    data = make_file(other, 4, seed=1)
    second = Box(device)
    async with second.running(
        left=left, configured={**configured, "late": (str(late), "ro")}, most=4
    ) as volumes:
        assert {
            volume.name: volume.inode for volume in volumes.volumes() if volume.name != "late"
        } == numbers
        assert volumes.find("late").inode not in numbers.values()
        assert volumes.find("other").mode == "writethrough"
        assert await volumes.find("same").read(0, PAGE) == same.read_bytes()[:PAGE]
        assert await volumes.find("other").read(0, PAGE) == data[:PAGE]
        await until(lambda: len(second.told) == 2)
        assert set(second.told) == {numbers["other"], volumes.find("late").inode}
        again = await volumes.add("again", str(late), "ro")
        assert again.inode not in {*numbers.values(), volumes.find("late").inode}


async def test_configured_volume_without_a_file_is_there_and_says_so(
    box: Box, path: Path, expect_log: Callable[..., None]
) -> None:
    expect_log("cache volume disk cannot be used yet: .*No such file")
    async with box.running(configured={"disk": (str(path), "ro")}) as volumes:
        volume = volumes.find("disk")
        with pytest.raises(VolumeError, match="No such file"):
            await volume.opened()
        data = make_file(path, 2)
        assert await volume.read(0, 5 * PAGE) == data


async def test_invalidate_drops_everything_and_says_how_much(box: Box, path: Path) -> None:
    make_file(path, 8)
    async with one(box, path) as volume:
        await volume.read(0, 8 * PAGE)
        await until(lambda: volume.statistics().pages == 8)
        await until(lambda: not volume._untold)
        box.told.clear()
        assert volume.drop() == 8
        await until(lambda: box.told == [volume.inode])


@pytest.mark.parametrize("how", ["drop", "remove"])
async def test_many_pages_go_a_few_at_a_time_and_none_is_given_out_again(
    box: Box, path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zswapd.volumes.volume.EMPTIED_PAGES", 4)
    data = make_file(path, 32)
    left: list[int] = []

    async def sample() -> None:
        while True:
            left.append(box.cache.statistics().pages)
            await trio.lowlevel.checkpoint()

    async with box.running() as volumes, trio.open_nursery() as nursery:
        volume = await volumes.add("disk", str(path), "ro")
        await volume.read(0, 32 * PAGE)
        await until(lambda: box.cache.statistics().pages == 32)
        nursery.start_soon(sample)
        await until(lambda: left)
        if how == "drop":
            assert volume.drop() == 32
            assert volume.statistics().pages == 0
            box.device.reads.clear()
            assert await volume.read(0, PAGE) == data[:PAGE]
            assert box.device.reads
        else:
            await volumes.remove("disk")
        await until(lambda: box.cache.statistics().pages == (how == "drop"))
        nursery.cancel_scope.cancel()
    assert max(before - after for before, after in itertools.pairwise(left)) <= 2 * 4, (
        "the order of tasks is any"
    )


@pytest.mark.parametrize("how", ["drop", "remove"])
async def test_pages_of_a_huge_sparse_file_go_as_quickly_as_those_of_a_small_one(
    box: Box, path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs is what is there, not how far apart it lies."""
    monkeypatch.setattr("zswapd.volumes.volume.EMPTIED_PAGES", 4)
    make_file(path, 1)
    os.truncate(path, 15 << 40)
    await trio.sleep(2 * files.RACY_NS / 1e9)
    async with box.running() as volumes:
        volume = await volumes.add("disk", str(path), "ro")
        for page in (*range(20), (5 << 40) // PAGE, (15 << 40) // PAGE - 1):
            await volume.read(page * PAGE, PAGE)
        await until(lambda: box.cache.statistics().pages == 22)
        turns = 0
        if how == "drop":
            volume.drop()
        else:
            await volumes.remove("disk")
        while box.cache.statistics().pages and turns < 1000:
            await trio.lowlevel.checkpoint()
            turns += 1
        assert turns < 30


async def test_frozen_or_full_cache_only_makes_reads_slower(box: Box, path: Path) -> None:
    data = make_file(path, 8)
    async with one(box, path) as volume:
        box.cache.freeze()
        for _ in range(2):
            assert await volume.read(0, 8 * PAGE) == data
        assert box.device.reads == [(0, 8)] * 2
        box.cache.thaw()
        await volume.read(0, 8 * PAGE)
        await volume.read(0, 8 * PAGE)
        assert len(box.device.reads) == 3
