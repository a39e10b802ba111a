# SPDX-License-Identifier: GPL-2.0-or-later
"""What swapoff leaves in a file goes, and nothing that means anything goes with it."""

from __future__ import annotations

import builtins
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.backed import Files
from tests.support.stack import build
from tests.support.strategies import page
from zswapd.core.block.device import Device
from zswapd.core.pam.base import HEADER_BYTES
from zswapd.errors import LostPageError
from zswapd.fuse.inodes import Directory
from zswapd.fuse.writers import Writers
from zswapd.worker import emptying as emptying_module
from zswapd.worker.emptying import SWAP_MAGIC, Emptying, FileState, make_emptying, read_first_page

FILE, OTHER = 2, 3
PAGE = 4096
PAGES = 12
STEP = 2
"""Pages that are let go in one turn of the event loop."""

HEADER = bytes(PAGE - len(SWAP_MAGIC)) + SWAP_MAGIC
ALL = set(range(PAGES))


def data(number: int, seed: int = 0) -> bytes:
    """Return what a page holds; the first one is a swap header."""
    return page("half", 100 * seed + number, PAGE) if number or seed else HEADER


class Box:
    """A full file, the kernel's view of it, and the worker that empties it.

    Attributes:
        left: the newest document for a successor.
        meanwhile: called once, between the look at the kernel's tables and what follows from it.
        void: pages stored whenever the hook had to forget its writer.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.stack = build(PAGE, frames=64)
        self.device = Device("swap", PAGES * PAGE, self.stack.frontswap, 0, page_size=PAGE)
        for number in range(PAGES):
            self.write(number)
        self.state = FileState(is_attached=False, is_swapped_on=False)
        self.handle = 0
        self.left: dict[str, Any] = {"writers": None, "swapped_on": {}}
        self.meanwhile: Callable[[], object] = lambda: None
        self.void: list[int] = []
        self._request = 0
        self.begin()

    def begin(self) -> None:
        """Start a worker that goes on with what the one before has left."""
        self._scope = trio.CancelScope()
        self.writers = Writers([FILE, OTHER])
        self.emptying = Emptying(
            {FILE: self.device},
            {FILE: Path("/mnt/swap")},
            self.writers,
            page_size=PAGE,
            look=lambda _path: self.state,
            first_page=partial(read_first_page, transfers=None, page_size=PAGE),
            run=self._run_in_thread,
        )
        if self.left["writers"] is not None:
            self.writers.recall(self.left["writers"])
            self.emptying.recall(self.left["swapped_on"])
        self.writers.when_changed = self._remember
        self.writers.when_void = lambda _inode: self.void.append(len(self.stored()))
        self._remember()
        self._nursery.start_soon(self._work, self._scope, self.emptying)

    async def _work(self, scope: trio.CancelScope, emptying: Emptying) -> None:
        with scope:
            await emptying.run()

    async def _run_in_thread(self, function: Callable[[], FileState]) -> FileState:
        state = function()
        await trio.lowlevel.checkpoint()
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return state

    def _remember(self) -> None:
        now = {"writers": self.writers.remember(), "swapped_on": self.emptying.remember()}
        self.left = json.loads(json.dumps(now))

    async def die(self) -> None:
        """End the worker, which leaves what it has said last."""
        self._scope.cancel()
        await wait_all_tasks_blocked()

    async def look(self) -> None:
        """Have the worker look, as after a change of /proc/swaps, and wait for the end."""
        self.emptying.look_soon()
        await wait_all_tasks_blocked()

    # What the machine does.

    def open(self, inode: int = FILE) -> int:
        self._request += 2
        handle = self.writers.open(inode, self._request)
        assert handle
        return handle

    def attach(self) -> None:
        self.handle = self.open()
        self.state = FileState(is_attached=True, is_swapped_on=False)

    def swap_on(self) -> None:
        self.state = FileState(is_attached=True, is_swapped_on=True)

    def swap_off(self) -> None:
        self.state = FileState(is_attached=True, is_swapped_on=False)

    def let_go(self) -> None:
        """Detach the device, which closes the file."""
        self.state = FileState(is_attached=False, is_swapped_on=False)
        self.writers.close(self.handle)

    async def use(self) -> None:
        """Attach the file and swap on to it, which the worker sees."""
        self.attach()
        self.swap_on()
        await self.look()

    def write(self, number: int, seed: int = 0) -> None:
        assert self.device.write(number * PAGE, memoryview(data(number, seed))) is None

    # What is left.

    def read(self, number: int) -> bytes:
        out = bytearray(PAGE)
        self.device.read_into(number * PAGE, memoryview(out))
        return bytes(out)

    def stored(self) -> set[int]:
        """Return the pages that have data."""
        return {number for number in range(PAGES) if self.device.state_of(number)}

    def has_all(self) -> bool:
        return all(self.read(number) == data(number) for number in range(PAGES))

    def damage(self, number: int) -> None:
        """Flip a bit of a stored page."""
        zv = self.stack.zv
        for place in self.stack.tmem.pampds(zv):
            key = zv.key_of(place)
            if key.index << 8 | key.oid & 0xFF == number:
                self.stack.arena.view[place + HEADER_BYTES + 3] ^= 4
                return
        raise AssertionError(f"page {number} is not stored")


@pytest.fixture
def box(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setattr(emptying_module, "STEP_BYTES", STEP * PAGE)
    made = Box(nursery)
    yield made
    made.stack.check()
    made.stack.close()


# What goes.


async def test_all_but_the_first_page_goes_while_the_device_is_attached(box: Box) -> None:
    await box.use()
    assert box.has_all()
    box.void.clear()
    box.swap_off()
    await box.look()
    assert box.stored() == {0}
    assert box.read(0) == HEADER, "it can be swapped on again as it is"
    assert box.emptying.emptied == PAGES - 1
    # The hook forgets what it has read ahead before the pages go, in each turn.
    assert box.void == [*range(PAGES, 1, -STEP)]
    assert box.writers.handle_of(FILE) == box.handle
    await box.look()
    assert box.stored() == {0}


@pytest.mark.parametrize("is_seen_off", [False, True])
async def test_all_goes_when_the_device_has_let_go(box: Box, is_seen_off: bool) -> None:
    await box.use()
    box.swap_off()
    if is_seen_off:
        await box.look()
    box.let_go()  # no other reason to look
    await wait_all_tasks_blocked()
    assert box.stored() == set()
    assert box.emptying.emptied == PAGES
    assert box.left["swapped_on"] == {}


async def test_nothing_goes_while_the_file_of_a_detached_device_is_open(box: Box) -> None:
    await box.use()
    box.state = FileState(is_attached=False, is_swapped_on=False)
    await box.look()
    assert box.has_all()
    box.writers.close(box.handle)
    await wait_all_tasks_blocked()
    assert box.stored() == set()


async def test_only_what_was_seen_off_goes_again_after_the_next_swapon(box: Box) -> None:
    await box.use()
    box.swap_off()
    await box.look()
    box.swap_on()
    for number in range(1, PAGES):
        box.write(number)
    await box.look()
    assert box.has_all()
    box.swap_off()
    await box.look()
    assert box.stored() == {0}
    box.let_go()
    await wait_all_tasks_blocked()
    assert box.stored() == set()


async def test_swapon_before_the_look_leaves_all_as_it_is(box: Box) -> None:
    await box.use()
    box.swap_off()
    box.swap_on()
    await box.look()
    assert box.has_all()


async def test_file_under_another_device_goes_when_that_one_is_swapped_off(box: Box) -> None:
    await box.use()
    box.let_go()
    await wait_all_tasks_blocked()
    for number in range(PAGES):
        box.write(number)
    await box.use()
    assert box.has_all()
    box.swap_off()
    await box.look()
    assert box.stored() == {0}


# What stays.


@pytest.mark.parametrize("is_let_go", [False, True])
async def test_file_that_was_never_swapped_on_keeps_its_data(box: Box, is_let_go: bool) -> None:
    box.attach()
    await box.look()
    if is_let_go:
        box.let_go()
    await box.look()
    assert box.has_all()
    assert box.void == [PAGES] * (1 + is_let_go), "the open, and the close"


@pytest.mark.parametrize("how", ["other data", "discarded", "magic changed"])
async def test_file_without_a_swap_header_keeps_its_data(box: Box, how: str) -> None:
    await box.use()
    box.swap_off()
    if how == "other data":
        box.write(0, seed=1)
    elif how == "discarded":
        box.device.discard(0, PAGE)
    else:
        assert box.device.write(PAGE - 1, memoryview(b"3")) is None
    stored = box.stored()
    await box.look()
    assert box.stored() == stored
    assert box.left["swapped_on"] == {}
    box.let_go()
    await wait_all_tasks_blocked()
    assert box.stored() == stored


async def test_file_that_another_open_file_may_change_keeps_its_data(box: Box) -> None:
    await box.use()
    box.let_go()
    other = box.open()  # before the worker has looked
    await wait_all_tasks_blocked()
    assert box.has_all()
    assert box.left["swapped_on"] == {}
    box.writers.close(other)
    await wait_all_tasks_blocked()
    assert box.has_all(), "it is a file of another program now"


@pytest.mark.parametrize("is_swapped_on", [False, True])
async def test_handle_of_a_device_that_came_since_counts(box: Box, is_swapped_on: bool) -> None:
    await box.use()
    box.let_go()
    box.attach()
    if is_swapped_on:
        box.swap_on()
    await wait_all_tasks_blocked()
    assert box.has_all()
    box.swap_off()
    await box.look()
    assert box.stored() == ({0} if is_swapped_on else ALL)


@pytest.mark.parametrize("is_let_go", [False, True])
async def test_write_during_the_look_keeps_all(box: Box, is_let_go: bool) -> None:
    await box.use()
    box.swap_off()
    if is_let_go:
        box.let_go()
    box.meanwhile = lambda: box.write(5)
    await box.look()
    assert box.has_all()
    await box.look()
    assert box.has_all()


def write_part(box: Box) -> None:
    assert box.device.write((PAGES - 1) * PAGE + 9, memoryview(b"part")) is None


def write_in_vain(box: Box) -> None:
    box.stack.frontswap.freeze()
    assert box.device.write((PAGES - 1) * PAGE, memoryview(data(PAGES - 1, 1))) is not None
    box.stack.frontswap.thaw()


def write_to_both_ends(box: Box) -> None:
    box.write(1, seed=1)
    box.write(PAGES - 1, seed=1)


def open_again(box: Box) -> None:
    box.open()


@pytest.mark.parametrize("is_let_go", [False, True])
@pytest.mark.parametrize("change", [write_to_both_ends, write_part, write_in_vain, open_again])
async def test_change_while_it_is_emptied_ends_that(
    box: Box, change: Callable[[Box], None], is_let_go: bool, nursery: trio.Nursery
) -> None:
    await box.use()
    box.swap_off()
    if is_let_go:
        box.let_go()
    elif change is open_again:
        box.writers.close(box.handle)
    stored: list[set[int]] = []
    pages: list[bytes] = []

    async def change_between_two_turns() -> None:
        while box.device.statistics().stored_pages == PAGES:
            await trio.lowlevel.checkpoint()
        change(box)
        stored.append(box.stored())
        if change is not write_in_vain:
            pages.extend(box.read(number) for number in range(PAGES))

    nursery.start_soon(change_between_two_turns)
    await box.look()
    await box.look()
    assert stored == [box.stored()], "all that was there when it was written"
    assert PAGES // 2 < len(stored[0]) < PAGES
    assert PAGES - 1 in stored[0]
    if change is write_in_vain:
        with pytest.raises(LostPageError):
            box.read(PAGES - 1)
    else:
        assert pages == [box.read(number) for number in range(PAGES)]
    assert box.left["swapped_on"] == {}


async def test_what_is_written_after_the_emptying_stays_with_its_header(box: Box) -> None:
    await box.use()
    box.swap_off()
    await box.look()
    box.write(5)
    box.let_go()
    await wait_all_tasks_blocked()
    assert box.stored() == {0, 5}
    assert box.read(5) == data(5)


@pytest.mark.parametrize("how", ["lost", "damaged"])
@pytest.mark.parametrize("is_let_go", [False, True])
async def test_file_with_an_unreadable_header_stays(box: Box, how: str, is_let_go: bool) -> None:
    await box.use()
    box.swap_off()
    if how == "lost":
        box.device.discard(0, PAGE)
        box.device._mark_lost(0)
    else:
        box.damage(0)
    if is_let_go:
        box.let_go()
    await box.look()
    assert box.stored() == ALL
    assert all(box.read(number) == data(number) for number in range(1, PAGES))


# A successor.


@pytest.mark.parametrize("is_let_go", [False, True])
async def test_successor_empties_what_was_seen_swapped_on(box: Box, is_let_go: bool) -> None:
    await box.use()
    await box.die()
    box.swap_off()
    if is_let_go:
        box.state = FileState(is_attached=False, is_swapped_on=False)
    box.begin()
    await wait_all_tasks_blocked()
    if is_let_go:
        assert box.has_all()
        box.writers.close(box.handle)  # the kernel repeats it
        await wait_all_tasks_blocked()
    assert box.stored() == (set() if is_let_go else {0})


async def test_successor_keeps_what_was_never_seen_swapped_on(box: Box) -> None:
    box.attach()
    await box.look()
    await box.die()
    box.begin()
    await wait_all_tasks_blocked()
    assert box.has_all()


async def test_successor_without_such_a_file_forgets_it(box: Box) -> None:
    box.emptying.recall({str(OTHER): 4711})
    assert box.emptying.remember() == {}


async def test_successor_knows_a_file_that_was_swapped_on_for_the_second_time(box: Box) -> None:
    await box.use()
    box.swap_off()
    await box.look()
    box.open(OTHER)  # the document is written with it
    box.swap_on()
    await box.look()
    for number in range(1, PAGES):
        box.write(number)
    await box.die()
    box.swap_off()
    box.begin()
    await wait_all_tasks_blocked()
    assert box.stored() == {0}


async def test_successor_keeps_what_was_written_after_the_emptying(box: Box) -> None:
    await box.use()
    box.swap_off()
    await box.look()
    box.write(5)  # through the device, for which there is no reason to look
    await box.die()
    box.begin()
    await wait_all_tasks_blocked()
    assert box.stored() == {0, 5}


# The first page.


async def test_first_page_comes_from_the_pool_or_not_at_all(box: Box) -> None:
    first = partial(read_first_page, box.device, None, PAGE)
    assert await first() == HEADER
    box.damage(0)
    assert await first() is None
    box.device.discard(0, PAGE)
    assert await first() == bytes(PAGE)
    box.device._mark_lost(0)
    assert await first() is None


@pytest.mark.parametrize("how", ["sound", "changed", "unreadable"])
async def test_first_page_comes_from_the_disk(how: str, nursery: trio.Nursery) -> None:
    files = Files(PAGES)
    for number in range(PAGES):
        files.put(number, data(number))
    assert files.write_back(range(PAGES)) == PAGES
    files.settle()
    (slot,) = files.device.needed(0, PAGE)
    if how == "changed":
        files.disk.slots[slot] = bytes(PAGE)
    elif how == "unreadable":
        files.disk.bad.add(slot)
    buffers = files.transfers.statistics().free_buffers
    pages: list[memoryview | None] = []

    async def read() -> None:
        pages.append(await read_first_page(files.device, files.transfers, PAGE))

    nursery.start_soon(read)
    await wait_all_tasks_blocked()
    assert not pages
    files.disk.finish_all()
    await wait_all_tasks_blocked()
    assert pages == [HEADER if how == "sound" else None]
    assert files.transfers.is_idle()
    assert files.transfers.statistics().free_buffers == buffers
    files.close()


# All of it, as the daemon has it.


class Attendant:
    """Does at once what it is given."""

    async def run(self, function: Callable[[], Any], *, abandon: bool = False) -> Any:
        assert abandon
        return function()


@pytest.fixture
def mountpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory whose file `swap` cannot be opened."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    (mountpoint / "swap").write_bytes(HEADER)
    for owner in (os, io, builtins, Path):
        real = getattr(owner, "open")  # noqa: B009 - of any owner

        def open_another(path: Any, *rest: Any, real: Any = real, **named: Any) -> Any:
            if not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(mountpoint):
                raise AssertionError("a request of the worker to itself")
            return real(path, *rest, **named)

        monkeypatch.setattr(owner, "open", open_another)
    openings: list[Any] = [partial(os.open, flags=os.O_RDONLY), open, Path.open, Path.read_bytes]
    for opening in openings:
        with pytest.raises(AssertionError, match="to itself"):
            opening(mountpoint / "swap")
    return mountpoint


async def test_worker_opens_no_file_of_its_own(mountpoint: Path, nursery: trio.Nursery) -> None:
    # An open would be a request to the worker itself.
    files = Files(PAGES)
    for number in range(PAGES):
        files.put(number, data(number))
    assert files.write_back([0, 3]) == 2
    files.settle()
    writers = Writers([FILE])
    operations = SimpleNamespace(writers=writers)
    session: Any = SimpleNamespace(mountpoint=mountpoint, device=1 << 30, operations=operations)
    directory = Directory()
    assert directory.add_block_file(files.device) == FILE
    attendant: Any = Attendant()
    handle = 1 << 42 | FILE
    left = {"writers": {str(FILE): [1, handle, 2, False]}, "swapped_on": {str(FILE): handle}}
    devices = files.core.devices
    emptying = make_emptying(session, directory, devices, attendant, files.transfers, left)
    nursery.start_soon(emptying.run)
    await wait_all_tasks_blocked()
    writers.close(handle)
    await wait_all_tasks_blocked()
    files.disk.finish_all()
    await wait_all_tasks_blocked()
    assert not [number for number in range(PAGES) if files.device.state_of(number)]
    assert emptying.remember() == {}
    files.close()
