# SPDX-License-Identifier: GPL-2.0-or-later
"""A successor process makes everything from the arena.

What is found, what is dropped, and what is never believed.

The death here is a second Core over the same arena, while the first is not used any more; deaths in
the middle of an operation are tests/model/test_crash_model.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import gc
import itertools
import mmap
import os
import random
import re
import struct
import time
from collections.abc import Iterator

import pytest

from tests.support.strategies import page
from tests.support.successor import check_all, fill, make_config, read, shared_lost, succeed
from zswapd.config import Config
from zswapd.core import crashpoints, sizing
from zswapd.core.allocators.arena import LAYOUT_VERSION, Arena
from zswapd.core.allocators.base import DEAD
from zswapd.core.core import Core, Inherited
from zswapd.core.pam.base import HEADER, HEADER_BYTES
from zswapd.core.tmem import objnodes
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.errors import ArenaError, CorruptedPageError, LostPageError

Q = struct.Struct("=Q")


@pytest.fixture(params=("tmpfs", "memfd"))
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "tmpfs":
        try:
            Arena(1, 4096, kind="tmpfs").close()
        except ArenaError as error:
            pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def config() -> Config:
    return make_config("memory.arena=memfd")


@pytest.fixture
def core(config: Config) -> Iterator[Core]:
    made = Core(config)
    yield made
    made.close()


def _pampd(core: Core, number: int, swap_type: int = 0) -> int:
    return core.frontswap.find_page(0, swap_type << 8 | number & 0xFF, number >> 8)


def _contents(core: Core) -> dict[str, object]:
    """Everything in the statistics that describes what is stored."""
    seen = core.statistics()
    zv = {
        name: value
        for name, value in dataclasses.asdict(seen.zv).items()
        if re.match("curr_(?!.*_max)", name)
    }
    zs = {row.size: (row.used_objects, row.used_frames) for row in seen.zsmalloc.classes}
    tmem = (seen.tmem.curr_obj_count, seen.tmem.curr_objnode_count)
    frames = (seen.frames.used_frames, seen.frames.free_frames)
    devices = [(d.stored_pages, d.lost_pages) for d in seen.devices]
    return {
        **zv,
        "zs": zs,
        "tmem": tmem,
        "frames": frames,
        "devices": devices,
        "objects": seen.zsmalloc.objects,
    }


# What is there stays there.


@pytest.mark.parametrize(
    "size", [4096, *(pytest.param(size, marks=pytest.mark.slow) for size in (16384, 65536))]
)
def test_successor_has_every_page_and_counts_what_its_predecessor_did(kind: str, size: int) -> None:
    config = make_config(f"memory.arena={kind}", f"swap.files.more={64 * size}", page_size=size)
    core = Core(config)
    expected, more = fill(core, 900), fill(core, 60, device="more", seed=5)
    for number in range(0, 900, 3):
        core.devices["swap"].discard(number * size, size)
        del expected[number]
    core.devices["swap"].discard(0, 100 * size)
    expected = {number: data for number, data in expected.items() if number >= 100}
    before, backed = _contents(core), core.arena.backed_bytes()
    core = succeed(core, config)
    check_all(core, expected)
    check_all(core, more, "more")
    assert _contents(core) == before
    assert core.arena.backed_bytes() == backed
    assert core.arena.kind == kind
    seen = core.statistics().recovery
    assert (seen.takeovers, seen.recovered_pages) == (1, len(expected) + len(more))
    assert (seen.recovered_torn, seen.recovered_duplicates, seen.freed_bodies, seen.damaged) == (
        0,
        0,
        0,
        0,
    )
    core.close()


def test_successor_goes_on_working_and_so_does_its_own(core: Core, config: Config) -> None:
    size = core.frames.page_size
    expected = fill(core, 500)
    for generation in range(5):
        core = succeed(core, config)
        for number in range(generation, 700, 7):
            expected[number] = page("half", number * generation, size)
            assert core.devices["swap"].write(number * size, memoryview(expected[number])) is None
            if core.frames.wants_refill():
                core.frames.refill_now()
        for number in range(generation, 700, 11):
            core.devices["swap"].discard(number * size, size)
            expected.pop(number, None)
        core.tmem.compact(core.zv)
        core.frames.trim_now()
        check_all(core, expected)
    core.devices["swap"].invalidate()
    core = succeed(core, config)
    check_all(core, {})
    assert core.frames.used_frames == 0
    core.close()


@pytest.mark.parametrize("allocator", ["zsmalloc", "zbud"])
def test_takeover_gives_signs_of_life_for_every_stretch_of_the_arena(allocator: str) -> None:
    config = make_config(
        "swap.size=32M", "memory.reserve=32M", "memory.arena=memfd", f"pool.allocator={allocator}"
    )
    core = Core(config)
    size = core.frames.page_size
    for number in range(core.devices["swap"].size // size):
        core.devices["swap"].write(number * size, memoryview(page("half", number % 50, size)))
    stretches = core.frames.used_frames // core.frames.chunk_frames
    assert stretches >= 5
    fd = os.dup(core.arena.fd)
    core.close()
    seen: list[tuple[int, int]] = []

    def alive() -> None:
        pages = successor.zv.statistics().curr_pages if hasattr(successor, "zv") else 0
        seen.append((successor.frames.used_frames, pages))

    successor = Core.__new__(Core)
    successor.__init__(config, inherited=Inherited(fd, alive=alive))  # type: ignore[misc] - so that it can be looked at meanwhile
    os.close(fd)
    assert len(seen) >= 3 * stretches, "frames, zspages, pages"
    for books in zip(*seen, strict=True):
        # In each of the two walks that count something, no step is more than some of the whole.
        steps = [after - before for before, after in itertools.pairwise(books)]
        assert max(steps) <= books[-1] // stretches * 2
    seen.clear()
    successor.check()
    assert seen == [], "the takeover is over"
    successor.close()


def test_empty_arena_made_by_somebody_else_is_a_beginning(config: Config) -> None:
    arena = sizing.make_arena(config)
    core = Core(config, inherited=Inherited(arena.fd))
    assert core.frames.table.long_frames >= core.frames.reserve_target * 3 // 4
    expected = fill(core, 100)
    core.close()
    core = Core(config, inherited=Inherited(arena.fd))
    check_all(core, expected)
    core.close()
    os.fstat(arena.fd)  # it is the maker's
    arena.close()


def test_generation_goes_on_after_the_highest(core: Core, config: Config) -> None:
    fill(core, 10)
    newest = max(core.zv.key_of(_pampd(core, number)).generation for number in range(10))
    core = succeed(core, config)
    fill(core, 1)
    assert core.zv.key_of(_pampd(core, 0)).generation == newest + 1
    core.close()


def test_generation_goes_on_across_its_wrap(core: Core, config: Config) -> None:
    core.zv._generation = 0xFFFFFFFF - 5
    expected = fill(core, 10)
    assert sorted(core.zv.key_of(_pampd(core, number)).generation for number in range(10))[:4] == [
        1,
        2,
        3,
        4,
    ]
    core = succeed(core, config)
    expected |= fill(core, 1, seed=3)
    assert core.zv.key_of(_pampd(core, 0)).generation == 6
    check_all(core, expected)
    core.close()


# What a death leaves.


def _copy_object(core: Core, number: int, **changes: int) -> int:
    """Store what the page's object holds once more beside it, with other header fields.

    Return the handle.
    """
    old = _pampd(core, number)
    fields = dict(
        zip(
            ("check", "generation", "oid", "index", "length", "codec", "pool"),
            HEADER.unpack_from(core.arena.view, old),
            strict=True,
        )
    )
    size = HEADER_BYTES + fields["length"]
    new = core.allocator.alloc(size)
    core.arena.view[new + 8 : new + size] = core.arena.view[old + 8 : old + size]
    HEADER.pack_into(core.arena.view, new, *(fields | changes).values())
    return new


def _other_copy(core: Core, number: int, data: bytes, generation: int) -> int:
    """Store another version of a page beside the one that the index names.

    As a store does that dies before it frees.
    """
    before, core.zv._generation = core.zv._generation, generation - 1
    pampd = core.zv.create(0, number & 0xFF, number >> 8, memoryview(data), replacing=True)
    core.zv._generation = before
    assert pampd > 0
    return pampd


@pytest.mark.parametrize("old_kind", ["words", "noise", "same"])
@pytest.mark.parametrize("new_kind", ["words", "noise", "same"])
@pytest.mark.parametrize(
    ("distance", "later"),
    [(1, True), (1000, True), ((1 << 31) - 1, True), (-1, False), (-(1 << 30), False)],
)
def test_of_two_copies_the_later_one_stays(
    core: Core, config: Config, old_kind: str, new_kind: str, distance: int, later: bool
) -> None:
    for base in (1 << 31, 0xFFFFFFF0, 5):
        core.zv._generation = base - 1
        size = core.frames.page_size
        old, new = page(old_kind, 1, size), page(new_kind, 2, size)
        core.devices["swap"].write(7 * size, memoryview(old))
        _other_copy(core, 7, new, (base + distance) % (1 << 32) or 1)
        core = succeed(core, config)
        seen = core.statistics().recovery
        assert (seen.recovered_duplicates, seen.recovered_pages, seen.damaged) == (1, 1, 0)
        check_all(core, {7: new if later else old})
        core.devices["swap"].discard(0, 8 * size)
        assert core.frames.used_frames == 0, "the copy that lost is still there"
    core.close()


@pytest.mark.parametrize("data_kind", ["words", "noise"])
def test_compaction_cut_short_leaves_one_of_two_equal_copies(
    core: Core, config: Config, data_kind: str
) -> None:
    size = core.frames.page_size
    expected = {7: page(data_kind, 1, size)}
    core.devices["swap"].write(7 * size, memoryview(expected[7]))
    _copy_object(core, 7)
    core = succeed(core, config)
    seen = core.statistics().recovery
    assert (seen.recovered_duplicates, seen.damaged, seen.freed_bodies) == (1, 0, 0)
    check_all(core, expected)
    core.close()


def test_store_cut_short_before_its_word_of_life_is_free_room(core: Core, config: Config) -> None:
    expected = fill(core, 20)
    torn = _copy_object(core, 6)
    core.arena.words64[torn >> 3] = DEAD
    core = succeed(core, config)
    seen = core.statistics().recovery
    assert (seen.recovered_torn, seen.recovered_duplicates, seen.damaged) == (0, 0, 0)
    check_all(core, expected)
    core.close()


@pytest.mark.parametrize("life", ["no generation", "no checksum", "nothing"])
def test_half_a_word_of_life_is_damage(core: Core, config: Config, life: str) -> None:
    # It is written by one store, so no death leaves half of it, nor none.
    expected = fill(core, 20)
    word = _pampd(core, 6) >> 2
    for part in {"no generation": [1], "no checksum": [0], "nothing": [0, 1]}[life]:
        core.arena.words32[word + part] = 0
    core = succeed(core, config)
    assert core.statistics().recovery.damaged == 1
    with pytest.raises(LostPageError):
        read(core, 6)
    assert read(core, 5) == expected[5]
    core.close()


def test_body_without_header_is_freed(core: Core, config: Config) -> None:
    expected = fill(core, 20)
    before = core.frames.used_frames
    assert core.allocator.alloc(core.frames.page_size)
    core = succeed(core, config)
    assert core.statistics().recovery.freed_bodies == 1
    assert core.frames.used_frames == before
    check_all(core, expected)
    core.close()


@pytest.mark.parametrize("populate", [True, False], ids=["refill", "trim"])
@pytest.mark.parametrize("done", [0, 1, 99])
def test_frames_of_a_job_are_what_the_kernel_says(kind: str, populate: bool, done: int) -> None:
    config = make_config(f"memory.arena={kind}")
    core = Core(config)
    expected = fill(core, 300)
    core.frames.reserve_target = 2000 if populate else 0
    job = (core.frames.begin_refill if populate else core.frames.begin_trim)(700)
    assert len(job.runs) >= 1
    job.runs = job.runs[:done]
    job.work(core.arena)
    core = succeed(core, config)
    check_all(core, expected)
    core.frames.refill_now()
    core.frames.trim_now()
    check_all(core, expected)
    core.close()


def test_memory_that_was_taken_and_never_touched_goes_back(kind: str) -> None:
    config = make_config(f"memory.arena={kind}")
    core = Core(config)
    expected = fill(core, 300)
    backed = core.arena.backed_bytes()
    size = core.frames.page_size
    os.posix_fallocate(core.arena.fd, (core.frames.end_frame - 40) * size, 30 * size)
    assert core.arena.backed_bytes() == backed + 30 * size
    core = succeed(core, config)
    assert core.arena.backed_bytes() == backed
    check_all(core, expected)
    core.close()


def test_frame_that_is_populated_in_part_is_a_hole() -> None:
    config = make_config("memory.arena=memfd", page_size=65536)
    core = Core(config)
    expected = fill(core, 50)
    backed = core.arena.backed_bytes()
    last = (core.frames.end_frame - 1) * 65536
    for offset in (last + 4096, last - 65536 * 3 + 32768, last - 65536 * 6 - 4096):
        core.arena.populate(offset, 12288)
    core = succeed(core, config)
    check_all(core, expected)
    assert core.arena.backed_bytes() == backed
    core.close()


def test_takeover_touches_no_hole(kind: str) -> None:
    config = make_config("swap.size=256M", f"memory.arena={kind}")
    core = Core(config)
    expected = fill(core, 100)
    backed = core.arena.backed_bytes()
    core = succeed(core, config)
    assert core.arena.backed_bytes() == backed
    assert core.statistics().frames.used_frames > 0
    core.check()
    assert core.arena.backed_bytes() == backed
    assert all(read(core, number) == data for number, data in expected.items())
    core.close()


# Contents of the arena that recovery must not believe.


def test_raw_page_that_imitates_stored_objects_is_only_a_page(core: Core, config: Config) -> None:
    size = core.frames.page_size
    expected = fill(core, 40)
    rng = random.Random(3)
    for number in range(40, 60):
        # Noise full of valid copies of other pages' objects, newer than they are, at every place
        # where an object could begin.
        data = bytearray(rng.randbytes(size))
        for at in range(0, size, size // 4):
            victim = _pampd(core, rng.randrange(40))
            length = min(HEADER_BYTES + HEADER.unpack_from(core.arena.view, victim)[4], 80)
            data[at : at + length] = core.arena.view[victim : victim + length]
            data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "little")
        expected[number] = bytes(data)
        assert core.devices["swap"].write(number * size, memoryview(bytes(data))) is None
        assert HEADER.unpack_from(core.arena.view, _pampd(core, number))[5] == 1, (
            "not raw: the test has lost its point"
        )
    core = succeed(core, config)
    assert core.statistics().recovery.recovered_pages == 60
    check_all(core, expected)
    core.close()


def test_freed_frames_that_imitate_a_zspage_are_free(core: Core, config: Config) -> None:
    size = core.frames.page_size
    expected = fill(core, 40)
    core.devices["swap"].write(50 * size, memoryview(page("words", 1, size)))
    core.devices["swap"].discard(50 * size, size)
    free = next(
        f
        for f in range(core.frames.first_frame, core.frames.end_frame)
        if core.frames.table.words[f * 4] & 7 == 1
    )
    victim = _pampd(core, 3) // size * size
    core.arena.view[(free + 2) * size : (free + 3) * size] = core.arena.view[victim : victim + size]
    core = succeed(core, config)
    check_all(core, expected)
    core.close()


DAMAGE = {
    "codec": {"codec": 77},
    "length 0": {"length": 0},
    "length beyond the object": {"length": 60000},
    "pool": {"pool": 9},
    "type": {"oid": 5 << 8},
    "huge oid": {"oid": 1 << 63},
    "offset beyond the device": {"index": 4},
    "same-filled of odd length": {"codec": 0, "length": 30},
    "raw of odd length": {"codec": 1, "length": 30},
    "raw without a body": {"codec": 1, "length": 8, "check": 0},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_object_is_dropped_and_no_page_reads_as_zeros_any_more(
    core: Core, config: Config, what: str
) -> None:
    size = core.frames.page_size
    expected = fill(core, 40)
    handle = _copy_object(core, 4, generation=99)
    fields = dict(
        zip(
            ("check", "generation", "oid", "index", "length", "codec", "pool"),
            HEADER.unpack_from(core.arena.view, handle),
            strict=True,
        )
    )
    HEADER.pack_into(core.arena.view, handle, *(fields | DAMAGE[what]).values())
    core = succeed(core, config)
    seen = core.statistics()
    assert seen.recovery.damaged == 1
    core.check()
    for number, data in expected.items():
        assert read(core, number) == data
    # It may have been any page, so a missing one is an error until it is written or discarded.
    with pytest.raises(LostPageError):
        read(core, 500)
    assert seen.devices[0].lost_pages == 1024 - 40
    core.devices["swap"].discard(500 * size, size)
    assert read(core, 500) == bytes(size)
    core.devices["swap"].write(501 * size, memoryview(expected[1]))
    assert read(core, 501) == expected[1]
    core.close()


@pytest.mark.parametrize("which", ["old", "new", "body"])
def test_damaged_copy_of_two_never_wins(core: Core, config: Config, which: str) -> None:
    size = core.frames.page_size
    old, new = page("words", 1, size), page("noise", 2, size)
    core.devices["swap"].write(7 * size, memoryview(old))
    newer = _other_copy(core, 7, new, 50)
    body = Q.unpack_from(core.arena.view, newer + HEADER_BYTES)[0] & (1 << 40) - 1
    core.arena.view[
        {"old": _pampd(core, 7) + 60, "new": newer + 16 + 5, "body": body + 9}[which]
    ] ^= 4
    core = succeed(core, config)
    assert core.statistics().recovery.damaged == 1
    assert read(core, 7) == (new if which == "old" else old)
    core.check()
    core.close()


@pytest.mark.parametrize("place", [2, 10, 17, 20, 22, 23, HEADER_BYTES + 2])
def test_damaged_page_that_is_alone_is_an_error_and_no_other_page_changes(
    core: Core, config: Config, place: int
) -> None:
    expected = fill(core, 20)
    core.arena.view[_pampd(core, 6) + place] ^= 1
    with pytest.raises(CorruptedPageError):
        read(core, 6)
    for _ in range(2):
        core = succeed(core, config, {"swap": core.devices["swap"]._lost})
        with pytest.raises(LostPageError):
            read(core, 6)
        assert all(read(core, number) == data for number, data in expected.items() if number != 6)
    core.close()


def test_raw_header_that_was_damaged_costs_no_frame_after_a_takeover(
    core: Core, config: Config
) -> None:
    size = core.frames.page_size
    core.devices["swap"].write(0, memoryview(page("noise", 1, size)))
    core.arena.view[_pampd(core, 0) + HEADER_BYTES] ^= 8  # the handle of its body
    core.devices["swap"].discard(0, size)
    assert core.frames.used_frames > 0
    core = succeed(core, config)
    assert (core.frames.used_frames, core.statistics().recovery.freed_bodies) == (0, 1)
    core.close()


@pytest.mark.parametrize("damage", ["class", "length", "beyond"])
def test_seal_that_makes_no_sense_is_damage(core: Core, config: Config, damage: str) -> None:
    fill(core, 40)
    words, size = core.frames.table.words, core.frames.page_size
    first = _pampd(core, 4) // size
    first = core.frames.table.first_of(first)
    if damage == "class":
        words[first * 4] |= 0x3FF0
    else:
        words[first * 4 + 1] = words[first * 4 + 1] & ~255 | (0 if damage == "length" else 17)
    core = succeed(core, config)
    assert core.statistics().recovery.damaged >= 1
    core.check()
    with pytest.raises(LostPageError):
        read(core, 4)
    core.close()


@pytest.mark.parametrize(
    "point", ["takeover_frames", "takeover_zspages", "takeover_indexed", "takeover_marked"]
)
@pytest.mark.parametrize("damage", ["length", "class"])
def test_damage_is_not_forgotten_when_its_finder_dies(
    config: Config, damage: str, point: str
) -> None:
    arena = sizing.make_arena(config)
    lost = {"swap": memoryview(mmap.mmap(-1, sizing.lost_bitmap_bytes(config)["swap"]))}
    core = Core(config, inherited=Inherited(arena.fd, lost))
    fill(core, 40)
    first = core.frames.table.first_of(_pampd(core, 4) // core.frames.page_size)
    if damage == "length":
        core.frames.table.words[first * 4 + 1] &= ~255
    else:
        core.frames.table.words[first * 4] |= 0x3FF0
    core.close()
    pid = os.fork()
    if not pid:
        crashpoints.arm(point)
        with contextlib.suppress(BaseException):
            Core(config, inherited=Inherited(arena.fd, lost))
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    for _ in range(2):
        core = Core(config, inherited=Inherited(arena.fd, lost))
        core.check()
        for number in (4, 700):
            with pytest.raises(LostPageError):
                read(core, number)
        assert not arena.distrusted
        core.close()
    arena.close()


# The ephemeral half.


@pytest.mark.parametrize("size", [4096, pytest.param(65536, marks=pytest.mark.slow)])
@pytest.mark.parametrize("persistent", ["zsmalloc", "zbud"])
@pytest.mark.parametrize("ephemeral", ["zsmalloc", "zbud"])
def test_successor_has_swaps_pages_and_none_of_the_cache(
    persistent: str, ephemeral: str, size: int
) -> None:
    settings = (f"pool.allocator={persistent}", "cache.limit=25%", f"cache.allocator={ephemeral}")
    config = make_config("memory.arena=memfd", *settings, page_size=size)
    core = Core(config)
    expected = fill(core, 300)
    assert core.cache is not None
    pool = core.cache.cleancache.init_fs()
    for index in range(120):
        data = page("words" if index % 3 else "half", index % 20, size)
        assert core.cache.cleancache.put_page(pool, 1, index, memoryview(data)) is None
        if core.frames.wants_refill():
            core.frames.refill_now()
    assert core.frames.ephemeral_frames == core.statistics().cache.frames > 10  # type: ignore[union-attr]
    core.check()
    held = core.frames.used_frames - core.frames.ephemeral_frames
    core = succeed(core, config)
    assert (core.frames.used_frames, core.frames.ephemeral_frames) == (held, 0)
    assert core.statistics().recovery.damaged == 0
    check_all(core, expected)
    assert core.cache is not None
    pool = core.cache.cleancache.init_fs()
    assert core.cache.cleancache.put_page(pool, 1, 1, memoryview(page("half", 1, size))) is None
    core = succeed(
        core, make_config("memory.arena=memfd", settings[0], "cache.limit=", page_size=size)
    )
    assert core.cache is None
    check_all(core, expected)
    core.close()


def test_arena_of_the_layout_before_is_read_and_stamped(core: Core, config: Config) -> None:
    expected = fill(core, 60)
    core.arena.words32[2] = 2
    core = succeed(core, config)
    check_all(core, expected)
    assert core.arena.words32[2] == LAYOUT_VERSION
    core.close()


# Lost pages.


def test_lost_pages_stay_lost_and_marks_without_meaning_go(config: Config) -> None:
    lost = shared_lost(config)
    arena = sizing.make_arena(config)
    core = Core(config, inherited=Inherited(arena.fd, lost))
    size = core.frames.page_size
    expected = fill(core, 20)
    core.frontswap.freeze()
    assert core.devices["swap"].write(3 * size, memoryview(expected[4])) is not None
    lost["swap"][0] |= 1 << 5  # dead before the older copy went, or after a new one was written
    lost["swap"][1023 >> 3] |= 0x80
    lost["swap"][1024 >> 3] |= 0xFE  # behind the end
    core = succeed(core, config, lost)
    arena.close()
    assert core.statistics().devices[0].lost_pages == 2
    for number in (3, 1023):
        with pytest.raises(LostPageError):
            read(core, number)
    assert read(core, 5) == expected[5]
    core.close()


@pytest.mark.parametrize("frozen", [True, False])
def test_mark_is_set_before_the_older_copy_goes(
    config: Config, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = shared_lost(config)
    arena = sizing.make_arena(config)
    core = Core(config, inherited=Inherited(arena.fd, lost))
    size = core.frames.page_size
    fill(core, 20)
    seen = []
    when_losing = core.devices["swap"]._mark_lost

    def look(number: int) -> None:
        when_losing(number)
        seen.append(
            (number, lost["swap"][number >> 3] >> (number & 7) & 1, core.frontswap.holds(0, number))
        )

    core.frontswap._when_losing[0] = look
    if frozen:
        core.frontswap.freeze()
    else:
        for length in range(size, 31, -16):
            while core.allocator.alloc(length):
                pass
    for number in (4, 6, 900):
        assert (
            core.devices["swap"].write(number * size, memoryview(page("noise", 77, size)))
            is not None
        )
    assert seen == [(4, 1, True), (6, 1, True)]
    assert not core.frontswap.holds(0, 4)
    core.close()
    arena.close()


def test_bitmap_that_is_too_short_is_refused(config: Config) -> None:
    arena = sizing.make_arena(config)
    with pytest.raises(ValueError, match="bitmap"):
        Core(config, inherited=Inherited(arena.fd, {"swap": memoryview(bytearray(3))}))
    arena.close()


# What does not fit together.


@pytest.mark.parametrize(
    "setting",
    [
        f"swap.size={1023 * 4096}",
        "swap.files.more=1M",
        "pool.max_zspage_frames=4",
        "pool.allocator=zbud",
    ],
    ids=lambda s: s.split("=")[0],
)
def test_arena_for_other_settings_is_refused_before_anything_changes(
    core: Core, config: Config, setting: str
) -> None:
    expected = fill(core, 40)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaError, match="other settings") as caught:
        Core(make_config("memory.arena=memfd", setting), inherited=Inherited(core.arena.fd))
    assert caught.value.hint
    assert (
        len(os.listdir("/proc/self/fd")) <= descriptors
    )  # fewer, when an older test's garbage went meanwhile
    with pytest.raises(ArenaError, match="other settings"):
        Core(make_config("memory.arena=memfd", page_size=16384), inherited=Inherited(core.arena.fd))
    check_all(core, expected)


def test_settings_that_may_change_do(core: Core) -> None:
    expected = fill(core, 40)
    cache = ("cache.limit=1G", "cache.allocator=zsmalloc")
    changed = make_config(
        "memory.reserve=8M", "pool.compressor=lzo", "pool.limit=2M", "pool.checksum=false", *cache
    )
    core = succeed(core, changed)
    check_all(core, expected)
    core.close()


class _NoMemory:
    """libc whose madvise says ENOMEM, a number of times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.real = objnodes._libc.madvise

    def madvise(self, *arguments: int) -> int:
        if self.times > 0:
            self.times -= 1
            ctypes.set_errno(errno.ENOMEM)
            return -1
        return int(self.real(*arguments))


def test_index_comes_up_without_a_reserve_when_there_is_no_memory(
    core: Core, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fill(core, 700)
    with monkeypatch.context() as patch:
        patch.setattr(objnodes, "_libc", _NoMemory(1000))
        with pytest.raises(ArenaError, match="no memory for the index"):
            Core(config, inherited=Inherited(core.arena.fd))
    check_all(core := succeed(core, config), expected)
    core.close()


def test_reserve_of_the_index_is_left_for_later_when_there_is_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = _NoMemory(1)
    monkeypatch.setattr(objnodes, "_libc", fake)
    nodes = Objnodes(1000, reserve=100, lenient=True)
    assert nodes.available() == 0
    nodes.refill_now()
    assert nodes.available() >= 100
    fake.times = 1
    with pytest.raises(ArenaError):
        Objnodes(1000, reserve=100)


# Time.


def test_takeover_takes_less_than_storing_the_pages_did() -> None:
    # A third of a store's time is usual, compiled or not, so three times as long as usual would
    # fail.
    config = make_config("swap.size=32M", "memory.reserve=32M", "memory.arena=memfd")
    core = Core(config)
    size = core.frames.page_size
    pages = [memoryview(page("half" if seed % 3 else "words", seed, size)) for seed in range(60)]
    count = core.devices["swap"].size // size
    start = time.perf_counter()
    for number in range(count):
        core.devices["swap"].write(number * size, pages[number % 60])
    a_store = (time.perf_counter() - start) / count
    times = []
    for _ in range(4):
        core = succeed(core, config)
        times.append(core.statistics().recovery.seconds)
    assert core.statistics().recovery.recovered_pages == count
    assert min(times) / count < a_store
    core.close()


def _status_kib(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))


@pytest.mark.bench
def test_takeover_of_a_gibibyte_takes_less_than_a_second_and_no_memory() -> None:
    config = make_config("swap.size=1G", "memory.reserve=64M")
    core = Core(config)
    size = core.frames.page_size
    rng = random.Random(1)
    pages = [page("same", seed, size) for seed in range(20)] + [
        page("noise", seed, size) for seed in range(10)
    ]
    pages += [rng.randbytes(rng.randrange(400, 3200)).ljust(size, b"\0") for _ in range(170)]
    count = core.devices["swap"].size // size
    for number in range(count):
        assert (
            core.devices["swap"].write(number * size, memoryview(pages[number * 7 % 200])) is None
        )
        if core.frames.wants_refill():
            core.frames.refill_now()
        if core.nodes.wants_refill():
            core.nodes.refill_now()
    backed = core.arena.backed_bytes()
    for _ in range(3):
        fd = os.dup(core.arena.fd)
        core.close()
        del core
        gc.collect()
        before = _status_kib("RssAnon"), _status_kib("VmPTE")
        core = Core(config, inherited=Inherited(fd))
        os.close(fd)
        grown = _status_kib("RssAnon") - before[0], _status_kib("VmPTE") - before[1]
        seen = core.statistics()
        seconds = seen.recovery.seconds
        print(
            f"\n{count} pages: {seconds:.3f} s, {seconds / count * 1e6:.2f} us a page; KiB of"
            f" memory, of page tables: {grown}"
        )
        assert seen.recovery.recovered_pages == count
        assert core.arena.backed_bytes() == backed
        assert seconds < 1.0
        assert grown[0] <= (seen.tmem.objnode_bytes >> 10) + 4096
    core.close()
