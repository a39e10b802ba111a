# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that fails: the failure is detected, the device is avoided, and its recovery is found.

Slots that a dead process may still write are avoided too.
"""

from __future__ import annotations

import errno
import os

import pytest

from tests.support.disk import Disk
from zswapd.core.backing.health import AVOID_S, PROBE_S, STALL_S, TROUBLE
from zswapd.core.backing.lifeline import Lifeline
from zswapd.core.backing.store import make_buffers
from zswapd.core.backing.transfers import CLAIMS, Transfers

PAGE = 4096


class World:
    def __init__(self, claims: memoryview | None = None) -> None:
        self.now = 100.0
        self.disk = Disk(PAGE, 16)
        self.codes: list[int] = []
        self.transfers = Transfers(
            self.disk,
            self.disk.submit,
            page_size=PAGE,
            buffers=make_buffers(8 * PAGE, PAGE),
            claims=claims,
            clock=lambda: self.now,
        )

    def write(self, slot: int, *, code: int = 0) -> bool:
        taken = self.transfers.write(slot, bytes([slot]) * PAGE, self.codes.append) is not None
        self.transfers.kick()
        if taken:
            self.disk.finish(-1, code)
        return taken

    def read(self, slot: int, *, code: int = 0) -> None:
        fetch = self.transfers.fetch([slot], lambda: None)
        self.transfers.kick()
        self.disk.finish(-1, code)
        self.transfers.end(fetch)


def test_slot_that_failed_is_left_alone_for_a_while() -> None:
    world = World()
    assert world.write(3, code=errno.EIO)
    assert world.codes == [errno.EIO]
    assert not world.write(3)
    assert world.write(4)
    assert world.transfers.trouble == ""
    assert world.transfers.statistics().avoided_slots == 1
    world.now += AVOID_S + 1
    assert world.transfers.statistics().avoided_slots == 0
    assert world.write(3)
    assert world.codes == [errno.EIO, 0, 0]


def test_device_that_fails_again_and_again_is_in_trouble_until_its_label_can_be_written() -> None:
    world = World()
    for slot in range(TROUBLE):
        assert world.write(slot, code=errno.EREMOTEIO)
    assert os.strerror(errno.EREMOTEIO) in world.transfers.trouble
    assert not world.write(9)
    world.read(5)
    assert world.transfers.trouble, "what can be read cannot be written for that"
    world.transfers.probe()
    assert not world.disk.waiting, "too early"
    world.now += PROBE_S
    world.transfers.probe()
    world.disk.finish(0, errno.EIO)
    assert os.strerror(errno.EIO) in world.transfers.trouble
    world.now += PROBE_S
    world.transfers.probe()
    world.disk.finish(0, 0)
    assert world.transfers.trouble == ""
    assert world.write(0), "a slot that failed with the device is not to blame"


@pytest.mark.parametrize(("fails", "others"), [("read", "write"), ("write", "read")])
def test_trouble_lasts_as_long_as_what_failed_fails(fails: str, others: str) -> None:
    world = World()
    for slot in range(TROUBLE):
        if fails == "read":
            world.read(slot, code=errno.EIO)
        else:
            world.write(slot, code=errno.EIO)
    for _ in range(5):
        assert os.strerror(errno.EIO) in world.transfers.trouble
        world.now += PROBE_S
        world.transfers.probe()
        # The device does the one kind of request and fails the other one.
        world.disk.finish(0, errno.EIO if world.disk.probes[-1] == fails else 0)
    assert world.disk.probes == [fails] * 5
    world.now += PROBE_S
    world.transfers.probe()
    world.disk.finish(0, 0)
    assert world.transfers.trouble == ""


def test_device_whose_reads_and_writes_fail_is_probed_for_both() -> None:
    world = World()
    for slot in range(TROUBLE):
        assert world.write(slot, code=errno.EIO)
    for slot in range(TROUBLE):
        world.read(slot, code=errno.EIO)
    for _ in range(2):
        assert world.transfers.trouble
        world.now += PROBE_S
        world.transfers.probe()
        world.disk.finish(0, 0)
    assert world.disk.probes == ["read", "write"]
    assert world.transfers.trouble == ""


def test_device_that_is_full_is_in_trouble_until_the_slots_that_found_no_space_can_be_written() -> (
    None
):
    world = World()
    for slot in (3, 4, 5):
        assert world.transfers.write(slot, bytes([slot]) * PAGE, world.codes.append) is not None
    world.transfers.kick()
    world.disk.finish(0, errno.ENOSPC)
    assert os.strerror(errno.ENOSPC) in world.transfers.trouble, (
        "one is enough: the next new slot finds none either"
    )
    assert not world.write(9)
    for _ in range(3):
        world.now += PROBE_S
        world.transfers.probe()
        assert world.disk.waiting, "nothing is tried"
        assert world.transfers.is_writing(4)
        world.disk.finish(0, errno.ENOSPC)
        assert world.transfers.trouble
    world.now += PROBE_S
    world.transfers.probe()
    world.disk.finish(0, 0)
    assert world.disk.writes == [(3, 3)] * 5
    assert world.transfers.trouble == ""
    assert world.transfers.is_idle()
    assert all(world.write(slot) for slot in range(6))


def test_slot_that_found_no_space_and_was_written_since_is_not_probed() -> None:
    world = World()
    for byte in (1, 2):  # the second waits for the first
        assert world.transfers.write(3, bytes([byte]) * PAGE, world.codes.append) is not None
    world.transfers.kick()
    world.disk.finish(0, errno.ENOSPC)
    world.disk.finish(0, 0)
    assert world.codes == [errno.ENOSPC, 0]
    world.now += PROBE_S
    world.transfers.probe()
    world.disk.finish_all()
    assert world.disk.slots[3] == b"\2" * PAGE


def test_dead_process_may_have_been_probing() -> None:
    claims = memoryview(bytearray(8 * CLAIMS)).cast("Q")
    world = World(claims)
    world.write(6, code=errno.ENOSPC)
    world.now += PROBE_S
    world.transfers.probe()
    successor = World(claims)
    assert successor.transfers.write(6, bytes(PAGE), successor.codes.append) is not None
    successor.transfers.kick()
    assert not successor.disk.waiting, "its thread may still write there"


def test_reads_that_fail_are_trouble_too() -> None:
    world = World()
    for slot in range(TROUBLE):
        world.read(slot, code=errno.EIO)
    assert world.transfers.trouble
    assert world.transfers.statistics().failed_reads == TROUBLE


def test_stall_is_trouble_as_long_as_it_lasts() -> None:
    world = World()
    assert world.transfers.write(1, bytes(PAGE), world.codes.append) is not None
    world.transfers.kick()
    world.now += STALL_S + 1
    assert "has taken 3 s" in world.transfers.trouble
    assert world.transfers.write(2, bytes(PAGE), world.codes.append) is None
    world.disk.finish(0, 0)
    assert world.transfers.trouble == ""
    assert world.write(2)


def test_writes_leave_buffers_to_reads() -> None:
    world = World()
    taken = sum(
        world.transfers.write(slot, bytes(PAGE), world.codes.append) is not None
        for slot in range(10)
    )
    assert taken == 6
    assert world.transfers.statistics().refused_writes == 4


def test_writes_wait_for_buffers_only_while_requests_under_way_can_free_some() -> None:
    world = World()
    assert not world.transfers.is_busy(6)
    for slot in range(4):
        world.transfers.write(slot, bytes(PAGE), world.codes.append)
    assert not world.transfers.is_busy(3), "nothing is under way yet"
    world.transfers.kick()
    assert world.transfers.is_busy(3)
    assert not world.transfers.is_busy(2)
    world.now += STALL_S + 1
    assert not world.transfers.is_busy(3), "it is in trouble"
    world.disk.finish(0, 0)
    assert not world.transfers.is_busy(6)


def test_nothing_is_taken_while_requests_of_predecessors_hold_all_claims() -> None:
    claims = memoryview(bytearray(8 * CLAIMS)).cast("Q")
    for place in range(CLAIMS):
        claims[place] = (1000 + place) << 16 | 1
    world = World(claims)
    assert not world.write(3), "its writer would wait until they are gone"
    assert "256 requests of dead processes" in world.transfers.trouble
    assert world.transfers.statistics().degraded
    world.transfers.release_held()
    assert world.transfers.trouble == ""
    assert world.write(3)
    claims[0] = 1000 << 16 | 1
    assert World(claims).write(3), "one of them is free"


def test_slot_that_is_named_twice_is_read_once_and_its_buffer_comes_back() -> None:
    world = World()
    assert world.write(3)
    fetch = world.transfers.fetch([3, 3], lambda: None)
    world.transfers.kick()
    assert len(world.disk.waiting) == 1
    world.disk.finish()
    assert world.transfers.page(3) == bytes([3]) * PAGE
    world.transfers.end(fetch)
    assert world.transfers.statistics().free_buffers == world.transfers.buffers == 8


def test_what_a_predecessor_writes_waits_until_it_cannot_write_any_more() -> None:
    claims = memoryview(bytearray(8 * CLAIMS)).cast("Q")
    dead = World(claims)
    for slot in (4, 5, 6):
        dead.transfers.write(slot, bytes(PAGE), dead.codes.append)
    dead.transfers.kick()
    successor = World(claims)
    assert successor.transfers.holds_any
    assert [successor.transfers.is_writing(slot) for slot in range(3, 8)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    for byte, slot in ((3, 3), (4, 4), (5, 5), (55, 5)):
        assert (
            successor.transfers.write(slot, bytes([byte]) * PAGE, successor.codes.append)
            is not None
        )
    successor.transfers.kick()
    successor.disk.finish_all()
    assert successor.disk.writes == [(3, 1)]
    assert successor.codes == [0]
    successor.now += STALL_S + 0.1
    assert not successor.write(6), "the device hangs: its writer would wait with the others"
    assert successor.write(7)
    third = World(claims)
    assert third.transfers.statistics().held_slots == 3
    successor.transfers.release_held()
    assert not successor.transfers.holds_any
    successor.disk.finish_all()
    assert successor.codes == [0, 0, 0, 0, 0]
    assert successor.disk.slots[4] == b"\4" * PAGE
    assert successor.disk.slots[5] == bytes([55]) * PAGE
    assert successor.transfers.is_idle()
    assert successor.write(6)
    assert not any(claims)


@pytest.mark.parametrize("how", ["dead", "alive"])
def test_lifeline_is_alone_when_no_other_process_has_the_file_open(how: str) -> None:
    fd = os.memfd_create("shared")
    line = Lifeline(fd)
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        line.close()
        Lifeline(fd)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert not line.is_alone()
    if how == "dead":
        os.kill(pid, 9)
    else:
        os.write(go[1], b"x")
    os.waitpid(pid, 0)
    assert line.is_alone()
    assert line.is_alone(), "the shared lock is back"
    line.close()
    for descriptor in (fd, *ready, *go):
        os.close(descriptor)
