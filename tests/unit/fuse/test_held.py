# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes that wait for a refill: each is answered once, in order, and none waits for too long."""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zswapd.fuse.held import DEFERRED, STALLED, WAITS, HeldWrites

PAGE = 4096
WAIT_S = 0.25


class Memory:
    """A reserve of pages."""

    def __init__(self, pages: int = 0) -> None:
        self.pages = pages
        self.can_grow = True
        self.refills = 0
        self.awaited = 0
        self.is_awaited = False
        self.waits_for_disk = False
        self.given_up_at = -1

    def is_short(self, pages: int) -> bool:
        return self.pages < pages and self.can_grow and self.given_up_at != self.refills

    def give_up(self) -> None:
        self.given_up_at = self.refills

    def await_refill(self) -> None:
        self.awaited += 1
        self.is_awaited = True

    def end_wait(self) -> None:
        self.is_awaited = False

    def refill(self, pages: int) -> None:
        self.pages += pages
        self.refills += 1


class World:
    """A session with held writes: what was stored, answered and blamed."""

    def __init__(self, memory: Memory, room: int = 8 * PAGE) -> None:
        self.memory = memory
        self.now = 0.0
        self.unique = 0
        self.answers: dict[int, int] = {}
        self.stored: list[tuple[int, int, bytes]] = []
        self.blamed = 0
        self.stalled: tuple[int, int, bytes] | None = None
        self.result = 0
        self.held = HeldWrites(
            memory,  # type: ignore[arg-type]
            self._store_held,
            wait_s=WAIT_S,
            room=room,
            page_size=PAGE,
            unique=lambda: self.unique,
            reply=self._reply,
            blame=self._blame,
            resume=self._resume,
            clock=lambda: self.now,
        )
        self.write: Callable[[int, int, int, memoryview], int] = self._write

    def _store_held(self, unique: int, inode: int, offset: int, data: memoryview) -> int:
        return self.write(unique, inode, offset, data)

    def _blame(self, unique: int) -> None:
        self.blamed = unique

    def _reply(self, unique: int, code: int, payload: bytes) -> None:
        assert unique not in self.answers, "answered twice"
        self.answers[unique] = -code if code else struct.unpack("=II", payload)[0]

    def _write(self, unique: int, _inode: int, offset: int, data: memoryview) -> int:
        assert self.blamed == unique
        return self._store(unique, offset, bytes(data))

    def _store(self, unique: int, offset: int, data: bytes) -> int:
        pages = len(data) // PAGE
        if self.memory.pages < pages:
            return -errno.ENOSPC
        self.memory.pages -= pages
        self.stored.append((unique, offset, data))
        return len(data)

    def send(self, unique: int, offset: int, data: bytes) -> int:
        """Send a write as the hook does; return what the hook got."""
        self.unique = unique
        lent = memoryview(bytearray(data))
        n = self.held.hold(1, offset, lent)
        if n == STALLED:
            self.stalled = (unique, offset, data)
        elif n == 0:
            self.answers[unique] = self._store(unique, offset, data)
        lent[:] = bytes(len(data))  # the next request uses the buffer again
        return n

    def _resume(self) -> None:
        assert self.stalled is not None
        request, self.stalled = self.stalled, None
        self.send(*request)


def test_write_with_enough_memory_is_stored_at_once() -> None:
    world = World(Memory(10))
    assert world.send(1, 0, b"a" * PAGE) == 0
    assert world.answers == {1: PAGE}
    assert world.memory.awaited == 0
    assert world.held.statistics().held == 0


def test_write_without_memory_waits_and_wakes_the_refill() -> None:
    world = World(Memory())
    assert world.send(1, 0, b"a" * PAGE) == DEFERRED
    assert world.memory.awaited == 1
    world.held.serve()
    assert world.answers == {}
    world.memory.refill(10)
    world.now = 0.004
    world.held.serve()
    assert world.answers == {1: PAGE}
    assert world.stored == [(1, 0, b"a" * PAGE)], "the buffer of the hook has other data by now"
    seen = world.held.statistics()
    assert (seen.held, seen.expired, seen.waiting, sum(seen.counts)) == (1, 0, 0, 1)
    assert seen.seconds == pytest.approx(0.004)
    assert seen.counts[2] == 1, "at most 4 ms"
    assert not world.memory.is_awaited, "the next refill is in no hurry"


def test_refill_that_never_comes_bounds_the_wait_of_all_together() -> None:
    world = World(Memory())
    for unique in (1, 2, 3):
        assert world.send(unique, unique * PAGE, b"x" * PAGE) == DEFERRED
    world.now = WAIT_S - 0.001
    world.held.serve()
    assert world.answers == {}
    world.now = WAIT_S
    world.held.serve()
    assert world.answers == dict.fromkeys((1, 2, 3), -errno.ENOSPC), "none of them waits again"
    assert world.send(4, 0, b"x" * PAGE) == 0, "there is no hope until memory comes"
    assert world.answers[4] == -errno.ENOSPC
    assert world.held.statistics().expired == 1
    world.memory.refills += 1
    assert world.send(5, 0, b"x" * PAGE) == DEFERRED, "a refill brought memory, which is used"


def test_pool_that_cannot_grow_refuses_at_once() -> None:
    memory = Memory()
    memory.can_grow = False
    world = World(memory)
    assert world.send(1, 0, b"x" * PAGE) == 0
    assert world.answers == {1: -errno.ENOSPC}


def test_wait_for_the_disk_ends_when_the_disk_says_so() -> None:
    memory = Memory()
    memory.waits_for_disk = True
    world = World(memory, room=PAGE)
    assert world.send(1, 0, b"x" * PAGE) == DEFERRED
    assert world.send(2, 0, b"y" * PAGE) == STALLED
    world.now = 8 * WAIT_S
    world.held.serve()
    assert world.answers == {}
    memory.can_grow = False  # it is in trouble
    world.held.serve()
    assert world.answers == dict.fromkeys((1, 2), -errno.ENOSPC)
    assert world.held.statistics().expired == 0


def test_later_writes_are_held_behind_one_that_waits() -> None:
    world = World(Memory(4))
    assert world.send(1, 0, b"a" * 4 * PAGE) == DEFERRED, "4 pages and 2 in reserve"
    assert world.send(2, 0, b"b" * PAGE) == DEFERRED, "there would be memory for it"
    world.memory.refill(10)
    world.held.serve()
    assert [unique for unique, _, _ in world.stored] == [1, 2]


def test_full_room_stalls_the_hook_and_resumes() -> None:
    world = World(Memory(), room=2 * PAGE)
    assert world.send(1, 0, b"a" * 2 * PAGE) == DEFERRED
    assert world.send(2, 0, b"b" * PAGE) == STALLED
    assert world.held.statistics().waiting == 2
    world.memory.refill(20)
    world.held.serve()
    assert world.answers == {1: 2 * PAGE, 2: PAGE}
    assert world.held.statistics().stalled == 1


@pytest.mark.parametrize("comes", [True, False])
def test_without_a_room_each_write_stalls_for_the_same_time(comes: bool) -> None:
    """A kernel that cannot resend: only the request in the buffer would reach a successor."""
    world = World(Memory(), room=0)
    assert world.send(1, 0, b"a" * PAGE) == STALLED
    world.now = WAIT_S / 2
    world.held.serve()
    assert world.stalled is not None
    if comes:
        world.memory.refill(20)
    else:
        world.now = WAIT_S
    world.held.serve()
    assert world.stalled is None
    assert world.answers == {1: PAGE if comes else -errno.ENOSPC}
    seen = world.held.statistics()
    assert seen.expired == (not comes)
    assert (sum(seen.counts), seen.seconds) == (1, WAIT_S / 2 if comes else WAIT_S)


def test_no_wait_is_wanted() -> None:
    world = World(Memory())
    world.held.wait_s = 0
    assert world.send(1, 0, b"a" * PAGE) == 0


def test_request_without_a_number_does_not_wait() -> None:
    assert World(Memory()).send(0, 0, b"a" * PAGE) == 0


def test_write_that_answers_later_is_not_answered_twice() -> None:
    world = World(Memory())
    world.send(1, 0, b"a" * PAGE)
    world.write = lambda *_: DEFERRED
    world.memory.refill(10)
    world.held.serve()
    assert world.answers == {}
    assert world.blamed == 0


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (0.003, 2), (0.25, 8), (5.0, WAITS - 1)],
)
def test_waits_are_counted_by_powers_of_two(seconds: float, bucket: int) -> None:
    world = World(Memory())
    world.held.wait_s = 10
    world.send(1, 0, b"a" * PAGE)
    world.now = seconds
    world.memory.refill(10)
    world.held.serve()
    assert world.held.statistics().counts[bucket] == 1


async def test_task_serves_what_is_held(autojump_clock: trio.testing.MockClock) -> None:
    world = World(Memory())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.held.run)
        world.send(1, 0, b"a" * PAGE)
        await trio.sleep(0.01)
        assert world.answers == {}
        world.memory.refill(10)
        await trio.sleep(0.01)
        assert world.answers == {1: PAGE}
        world.send(2, 0, b"a" * 9 * PAGE)  # more than the room has
        world.memory.refill(20)
        await trio.sleep(0.01)
        assert world.answers == {1: PAGE, 2: 9 * PAGE}
        nursery.cancel_scope.cancel()


class HeldMachine(RuleBasedStateMachine):
    """Writes, refills, time and deaths; a successor gets all unanswered writes again."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(3)
        self.world = World(self.memory, room=6 * PAGE)
        self.sent: dict[int, tuple[int, bytes]] = {}
        self.begun: dict[int, float] = {}
        self.queue: deque[int] = deque()
        """Writes that the kernel has and that the hook did not take yet."""

    @rule(number=st.integers(0, 9), pages=st.integers(1, 7))
    def write(self, number: int, pages: int) -> None:
        unique = len(self.sent) + 1
        self.sent[unique] = (number * PAGE, bytes([unique % 251]) * pages * PAGE)
        self.queue.append(unique)
        self._take()

    def _take(self) -> None:
        while self.queue and self.world.stalled is None:
            unique = self.queue.popleft()
            self.begun.setdefault(unique, self.world.now)
            self.world.send(unique, *self.sent[unique])

    @rule(pages=st.integers(1, 30))
    def refill(self, pages: int) -> None:
        self.memory.refill(pages)

    @rule(seconds=st.sampled_from((0.001, 0.01, 0.2)))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.held.serve()
        self._take()

    @rule(grows=st.booleans())
    def reach_the_limit(self, grows: bool) -> None:
        self.memory.can_grow = grows

    @precondition(lambda self: self.sent)
    @rule(resends=st.booleans())
    def die(self, resends: bool) -> None:
        old = self.world
        left = [unique for unique in self.sent if unique not in old.answers]
        if not resends and len(old.held._queue) + (old.stalled is not None) > 1:
            return  # such a kernel gets no room: see the test without one
        self.world = World(self.memory, room=6 * PAGE)
        self.world.now = old.now
        self.world.answers, self.world.stored = old.answers, old.stored
        self.begun = {}
        self.queue = deque(left)
        self._take()

    @invariant()
    def nothing_is_lost_or_twice(self) -> None:
        order = [unique for unique, _, _ in self.world.stored]
        assert order == sorted(order), "not in the order of arrival"
        for unique, offset, data in self.world.stored:
            assert (offset, data) == self.sent[unique]
        for unique, answer in self.world.answers.items():
            assert (answer > 0) == (unique in order)

    def teardown(self) -> None:
        self.memory.can_grow = True
        for _ in range(3 * len(self.sent) + 3):
            self.world.now += WAIT_S
            self.world.held.serve()
            self._take()
        assert set(self.world.answers) == set(self.sent), "a writer waits for ever"
        assert self.world.held.statistics().waiting == 0
        assert not self.memory.is_awaited


TestHeld = HeldMachine.TestCase
