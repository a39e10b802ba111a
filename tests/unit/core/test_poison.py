# SPDX-License-Identifier: GPL-2.0-or-later
"""A successor comes up over memory that must not be touched,
loses what lay there and nothing else, and says so.

The kernel's part is played (tests/support/poison.py); tests/vm/test_memory_errors.py has it play
itself.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

import pytest

from tests.support.poison import Poison, in_child
from tests.support.successor import check_books, fill, make_config, read, shared_lost
from zswapd.config import Config
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.frametable import FREE, STATE_MASK, USED
from zswapd.core.core import Core, Inherited
from zswapd.errors import ArenaError, CorruptedPageError, LostPageError

pytestmark = pytest.mark.slow

PAGES = 600
ALLOCATORS = ("zsmalloc", "zbud")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    return Poison(monkeypatch)


def find(core: Core, state: int, fits: Callable[[int, int], bool]) -> int:
    """Return the first frame of a run in a state that fits by its first frame and length."""
    words = core.frames.table.words
    frame = core.frames.first_frame
    while frame < core.frames.end_frame:
        length, found = core.frames.table.run_at(frame, core.frames.end_frame)
        if found == state and fits(frame, length):
            return frame
        frame += length
    raise AssertionError(
        f"no run of state {state} fits; word 0 of the first:"
        f" {words[core.frames.first_frame * 4]:#x}"
    )


def strike(core: Core, poison: Poison, where: str) -> None:
    """Poison a page of an arena by what it is."""
    size, is_body = core.frames.page_size, core.allocator.is_body
    places: dict[str, Callable[[], int]] = {
        "first of a zspage": lambda: find(core, USED, lambda _, length: length > 1) * size,
        "middle of a zspage": lambda: (find(core, USED, lambda _, length: length > 2) + 1) * size,
        "last of a zspage": lambda: (find(core, USED, lambda _, length: length > 1) + 1) * size,
        "one frame": lambda: (
            find(core, USED, lambda frame, length: length == 1 and not is_body(frame)) * size
        ),
        "body": lambda: find(core, USED, lambda frame, _: is_body(frame)) * size,
        "free": lambda: find(core, FREE, lambda _, __: True) * size,
        "table": lambda: core.arena.table_offset(find(core, USED, lambda _, __: True)),
        "superblock": lambda: 0,
    }
    poison.strike(core.arena, places[where]())


def losses(core: Core, expected: dict[int, bytes]) -> int:
    """Return how many pages are errors; no other may be anything but right."""
    lost = 0
    for number, data in expected.items():
        try:
            assert read(core, number) == data, f"page {number}"
        except (LostPageError, CorruptedPageError):
            lost += 1
    return lost


def heir(core: Core, config: Config, lost: dict[str, memoryview]) -> Core:
    return Core(
        config, inherited=Inherited(core.arena.fd, lost, arena_copy=core.arena.description())
    )


def go_on(then: Core, expected: dict[int, bytes]) -> None:
    """Every page can be written and read again, and what was lost is whole memory."""
    size = then.frames.page_size
    for number, data in expected.items():
        assert then.devices["swap"].write(number * size, memoryview(data)) is None
        if then.frames.wants_refill():
            then.frames.refill_now()
    assert losses(then, expected) == 0
    check_books(then)


WHERE = (
    "first of a zspage",
    "middle of a zspage",
    "last of a zspage",
    "one frame",
    "body",
    "free",
    "table",
)


@pytest.mark.parametrize(
    ("page_size", "checksum"), [(4096, "true"), (4096, "false"), (16384, "true")]
)
@pytest.mark.parametrize(
    ("allocator", "where"),
    [
        *(("zsmalloc", where) for where in WHERE),
        *(("zbud", where) for where in WHERE if "zspage" not in where),
    ],
)
def test_poisoned_page_costs_what_lay_in_it(
    poison: Poison, allocator: str, where: str, page_size: int, checksum: str
) -> None:
    config = make_config(
        f"pool.allocator={allocator}",
        f"pool.checksum={checksum}",
        "memory.arena=memfd",
        page_size=page_size,
    )
    core = Core(config)
    expected, lost = fill(core, PAGES), shared_lost(config)
    strike(core, poison, where)

    def take_over() -> None:
        then = heir(core, config, lost)
        check_books(then)
        most = {"body": 1, "free": 0, "table": PAGES, "one frame": page_size // 16}.get(where, 70)
        gone = losses(then, expected)
        assert (gone > 0) == (where != "free")
        assert gone <= most
        assert then.statistics().recovery.poisoned == 1
        with pytest.raises(LostPageError):
            read(then, PAGES + 1)  # no word says that it was not there
        go_on(then, expected)
        last = heir(then, config, lost)
        assert losses(last, expected) == 0
        assert last.statistics().recovery.poisoned == 0
        assert not last.frames.renewed

    in_child(take_over)
    core.close()


@pytest.mark.parametrize("where", ["body", "middle of a zspage"])
def test_what_lay_there_is_known_to_the_next_if_a_takeover_is_cut_short(
    poison: Poison, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Without checksums nothing else would tell zeros from data."""
    config = make_config("pool.checksum=false", "memory.arena=memfd")
    core = Core(config)
    expected, lost = fill(core, PAGES), shared_lost(config)
    strike(core, poison, where)

    def take_over() -> None:
        renew = Arena.renew

        def die(arena: Arena, offset: int) -> None:
            renew(arena, offset)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Arena, "renew", die)
            with pytest.raises(KeyboardInterrupt):
                heir(core, config, lost)
        then = heir(core, config, lost)
        assert losses(then, expected) > 0
        go_on(then, expected)

    in_child(take_over)
    core.close()


def test_poisoned_superblock_is_made_again_from_its_copy(
    poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("memory.arena=memfd")
    core = Core(config)
    expected, lost = fill(core, PAGES), shared_lost(config)
    real = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        if offset < mmap.PAGESIZE and 0 in poison.pages:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, count, offset)

    strike(core, poison, "superblock")

    def take_over() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", pread)
            with pytest.raises(ArenaError):
                Core(config, inherited=Inherited(core.arena.fd, lost))
            then = heir(core, config, lost)
        assert losses(then, expected) == 0
        last = Core(config, inherited=Inherited(then.arena.fd, lost))  # without a copy: it is whole
        assert losses(last, expected) == 0

    in_child(take_over)
    core.close()


def test_memory_that_an_older_kernel_took_out_of_the_file_is_damage() -> None:
    """Before Linux 5.16 a poisoned page leaves a hole in the file."""
    config = make_config("memory.arena=memfd")
    core = Core(config)
    expected, lost = fill(core, PAGES), shared_lost(config)
    frame = find(core, USED, lambda frame, length: length == 1)
    core.arena.punch(frame * core.frames.page_size, core.frames.page_size)
    then = heir(core, config, lost)
    assert then.statistics().recovery.damaged > 0
    assert losses(then, expected) > 0
    check_books(then)
    then.close()
    core.close()


@pytest.mark.parametrize("place", range(17))
def test_poisoned_pages_are_found_one_by_one(poison: Poison, place: int) -> None:
    config = make_config("memory.arena=memfd")
    core = Core(config)
    first = core.frames.first_frame * core.frames.page_size
    struck = {first + place * mmap.PAGESIZE, first + (16 - place) * mmap.PAGESIZE}

    def look() -> None:
        for offset in struck:
            poison.strike(core.arena, offset)
        then = type(core.arena).adopt(core.arena.fd)
        assert then.map_in(first, 17 * mmap.PAGESIZE) == sorted(struck)
        assert then.map_in(first + 17 * mmap.PAGESIZE, 3 * mmap.PAGESIZE) == []

    in_child(look)
    core.close()


def test_free_frames_state_is_the_one_looked_for() -> None:
    """`strike` reads the table as the allocator does."""
    core = Core(make_config("memory.arena=memfd"))
    fill(core, 20)
    assert core.frames.table.words[find(core, FREE, lambda _, __: True) * 4] & STATE_MASK == FREE
    core.close()
