# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that writeback chooses, over devices that have only ages.

Over a real core, writeback makes room.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.backed import Files
from tests.support.strategies import page
from zswapd.core.reclaim.writeback import EPOCH_S, EPOCHS, Writeback

PAGE = 4096


class Ages:
    """A device whose pages leave when `settle` is called; `absent` ones cannot be sent."""

    def __init__(self, pages: int) -> None:
        self.ages = bytearray(b"\1" * pages)
        self.epoch = 1
        self.promotes = False
        self.weight, self.limit_bytes, self.is_kept = 100, 1 << 62, False
        self.sent: list[int] = []
        self.absent: set[int] = set()
        self.raw: set[int] = set()
        self.done: list[Callable[[bool], None]] = []

    def write_back(self, number: int, done: Callable[[bool], None]) -> bool:
        if number in self.absent:
            return False
        self.sent.append(number)
        self.done.append(done)
        self.ages[number] = 0
        return True

    def generation(self, number: int) -> int:
        return int(number not in self.absent)

    def object_bytes(self) -> int:
        return PAGE * sum(age > 0 for age in self.ages)

    def is_raw(self, number: int) -> bool:
        return number in self.raw

    def settle(self) -> None:
        while self.done:
            self.done.pop()(True)


class World:
    def __init__(self, *pages: int) -> None:
        self.devices = [Ages(count) for count in pages]
        self.now = 0.0
        self.frames = sum(pages)
        self.uses = 0
        self.short = False
        self.accepting = True
        self.writeback = Writeback(
            self.devices,
            page_size=PAGE,
            used=lambda: self.frames,
            uses=lambda: self.uses,
            raw_pages=lambda: sum(len(device.raw - set(device.sent)) for device in self.devices),
            is_short=lambda: self.short,
            accepts=lambda: self.accepting,
            clock=lambda: self.now,
        )
        self.writeback.limit_frames = 1 << 30

    def use(self, *numbers: int, device: int = 0) -> None:
        for number in numbers:
            self.devices[device].ages[number] = self.devices[device].epoch
            self.uses += 1

    def end_epoch(self) -> None:
        self.now += EPOCH_S
        self.writeback.look()

    def run(self) -> list[int]:
        """Write back as long as there is a reason; return what was sent by the first device."""
        before = len(self.devices[0].sent)
        while why := self.writeback.wanted():
            is_stuck = (
                not self.writeback.step(why)
                and not self.writeback.in_flight
                and not self.writeback.commanded
            )
            if is_stuck and why != "incompressible":
                break
            self.frames -= sum(len(device.done) for device in self.devices)
            for device in self.devices:
                device.settle()
        return self.devices[0].sent[before:]


def test_oldest_go_first_in_the_order_of_their_offsets() -> None:
    world = World(100)
    world.use(*range(50, 60))
    world.end_epoch()
    world.use(*range(10))
    world.end_epoch()
    world.writeback.limit_frames = 80
    sent = world.run()
    assert sent == [*range(10, 38)], "no more than needed, and the oldest"
    assert world.frames == 80 * 90 // 100


def test_limit_is_a_hysteresis() -> None:
    world = World(1000)
    world.end_epoch()
    world.writeback.limit_frames = 1000
    world.frames = 949
    assert world.writeback.wanted() == ""
    world.frames = 951
    assert world.writeback.wanted() == "limit"
    world.frames = 901
    assert world.writeback.wanted() == "limit"
    world.frames = 900
    assert world.writeback.wanted() == ""
    world.frames = 949
    assert world.writeback.wanted() == ""


def test_pages_used_again_get_a_second_chance_and_those_of_now_are_never_taken() -> None:
    world = World(64)
    world.end_epoch()
    world.use(*range(0, 64, 2))
    world.writeback.limit_frames = 10
    assert set(world.run()) == set(range(1, 64, 2))
    assert world.writeback.wanted() == "limit", (
        "the others are of now; there is nothing to be done about it"
    )
    world.end_epoch()
    assert world.run()[:2] == [0, 2]


def test_an_epoch_ends_by_use_or_by_time_and_order_outlives_all_epochs() -> None:
    world = World(200)
    world.use(7)
    for turn in range(3 * EPOCHS):
        world.uses += 64
        world.writeback.look()
        if turn == 3 * EPOCHS - 20:
            world.use(9)
        world.use(11)
    assert world.writeback.statistics().epochs == 3 * EPOCHS
    world.end_epoch()
    world.writeback.command(200)
    sent = world.run()
    assert sorted(sent) == list(range(200))
    assert sent[-1] == 11
    assert sent[-2] == 9
    before = world.writeback.statistics().epochs
    world.writeback.look()
    assert world.writeback.statistics().epochs == before


def test_age_takes_what_is_idle_and_nothing_else() -> None:
    world = World(30)
    world.writeback.idle_s = 100
    world.now = 50
    world.writeback.look()
    world.use(3, 4, 5)
    world.now = 99
    world.writeback.look()
    assert world.writeback.wanted() == ""
    world.now = 101
    world.writeback.look()
    assert world.writeback.wanted() == "age"
    assert set(world.run()) == set(range(30)) - {3, 4, 5}
    for world.now in (140, 170, 200, 230):
        world.writeback.look()
    assert set(world.run()) == {3, 4, 5}


def test_budget_stops_it_for_the_day_but_no_command() -> None:
    world = World(100)
    world.end_epoch()
    world.writeback.limit_frames, world.writeback.budget = 1, 10 * PAGE
    assert len(world.run()) == 10
    seen = world.writeback.statistics()
    assert (seen.budget_left_bytes, seen.budget_stops, seen.by_limit) == (0, 1, 10)
    world.writeback.command(5)
    assert len(world.run()) == 5
    left = world.writeback.remember()
    successor = World(100)
    successor.writeback.budget, successor.writeback.limit_frames = 10 * PAGE, 1
    successor.writeback.recall(left)
    successor.end_epoch()
    assert successor.run() == []
    world.now += 90_000
    world.writeback.look()
    assert len(world.run()) == 10


def test_pages_that_do_not_compress_go_first_when_they_take_too_much_and_no_others() -> None:
    world = World(3000)
    world.devices[0].raw = set(range(5, 3000, 10))
    world.use(*range(100))
    world.end_epoch()
    world.writeback.raw_limit = 250
    sent = []
    for _ in range(20):
        sent += world.run()
        world.writeback.look()
    assert sent == list(range(105, 605, 10)), "the oldest of them, and no more than needed"
    world.writeback.limit_frames = 2900
    assert world.run()[:3] == [100, 101, 102], "the limit's turn is not taken from it"
    assert world.writeback.statistics().by_incompressible == 50


def test_raw_pages_of_now_stay_and_the_limit_has_its_turn_all_the_same() -> None:
    world = World(100)
    world.devices[0].raw = set(range(50))
    world.end_epoch()
    world.use(*range(50))
    world.writeback.raw_limit, world.writeback.limit_frames = 10, 90
    sent = world.run()
    assert sent == list(range(50, 69))
    assert world.writeback.statistics().by_incompressible == 0


def test_a_command_may_take_only_what_does_not_compress() -> None:
    world = World(40, 40)
    world.devices[0].raw, world.devices[1].raw = {3, 30}, {7}
    world.use(30)
    world.writeback.command(1 << 62, incompressible=True)
    assert world.run() == [3, 30]
    assert world.devices[1].sent == [7]
    assert world.writeback.commanded == 0
    world.writeback.command(2)
    assert world.run() == [0, 1]


def test_a_step_that_finds_nothing_in_its_time_says_so_and_the_next_goes_on() -> None:
    world = World(100_000)
    (device,) = world.devices
    device.absent.update(range(60_000))  # as a successor finds them: it knows no ages
    world.end_epoch()
    world.writeback.limit_frames = 1000
    steps = 1
    while not world.writeback.step("limit"):
        assert world.writeback.is_looking, (
            "nobody would look again until the next time that pages are looked for"
        )
        steps += 1
    assert 10 < steps < 20
    assert device.sent[0] == 60_000
    world.frames = 0
    device.settle()
    world.end_epoch()
    world.writeback.command(0)
    assert world.writeback.step("limit") == 0
    assert not world.writeback.is_looking


def test_epochs_without_pages_cost_a_step_what_it_takes_to_look_through_them() -> None:
    world = World(1 << 20)
    (device,) = world.devices
    for _ in range(200):
        world.end_epoch()
    device.ages[:] = bytes([device.epoch]) * len(device.ages)
    world.end_epoch()
    world.writeback.limit_frames = 1
    assert world.writeback.step("limit") == 0
    assert world.writeback.is_looking, "one step has looked through 200 MiB"
    while not world.writeback.step("limit"):
        assert world.writeback.is_looking
    assert device.sent[0] == 0


def test_oldest_age_is_that_of_the_oldest_page_that_is_there() -> None:
    world = World(100, 100)
    for device in world.devices:
        device.absent.update(range(50))
    for _ in range(10):
        world.end_epoch()
    world.use(*range(50, 99))
    world.use(*range(50, 100), device=1)
    for _ in range(5):
        world.end_epoch()
    assert world.writeback.statistics().oldest_age_s == 15 * EPOCH_S, "one page was never used"
    world.use(99)
    for _ in range(2):
        assert world.writeback.statistics().oldest_age_s == 5 * EPOCH_S
    world.use(*range(50, 99))
    assert world.writeback.statistics().oldest_age_s == 5 * EPOCH_S, "those of the other device"
    world.use(*range(50, 100), device=1)
    assert world.writeback.statistics().oldest_age_s == 0
    world.writeback.mark_idle()
    assert world.writeback.statistics().oldest_age_s > 5 * EPOCH_S


def test_pages_that_are_not_in_the_pool_have_no_age() -> None:
    files = Files(64)
    device, writeback = files.device, files.core.writeback
    assert writeback is not None
    assert set(device.ages) == {0}, "nothing was written yet"
    for number in range(32):
        files.put(number, page("half", number, PAGE))
    assert [number for number, age in enumerate(device.ages) if age] == list(range(32))
    files.discard(4 * PAGE, 4 * PAGE)
    files.core.zv.limit_frames = 0
    files.transfers._health.no_space_for = range(1)  # nothing goes to the disk either
    assert isinstance(answer := files.put(40, page("half", 40, PAGE)), int)
    assert answer < 0
    files.core.frontswap.freeze()
    files.put(9, page("half", 40, PAGE))
    files.core.frontswap.thaw()
    assert [number for number, age in enumerate(device.ages) if age] == [
        0,
        1,
        2,
        3,
        8,
        *range(10, 32),
    ]
    files.close()


def test_pages_may_return_to_a_pool_so_full_that_colder_ones_leave_it() -> None:
    world = World(1000)
    world.end_epoch()
    world.writeback.limit_frames = 1000
    for frames, returns, wanted in (
        (900, True, ""),
        (950, True, ""),
        (960, True, "limit"),
        (976, False, "limit"),
    ):
        world.frames = frames
        world.writeback.look()
        assert world.devices[0].promotes is returns, frames
        assert world.writeback.wanted() == wanted, frames


def test_reserve_and_a_disk_that_takes_nothing() -> None:
    world = World(100)
    world.end_epoch()
    world.short = True
    assert world.writeback.wanted() == "reserve"
    world.accepting = False
    assert world.writeback.step("reserve") == 0
    world.accepting = True
    assert world.writeback.step("reserve") == 100
    assert world.writeback.statistics().by_reserve == 100


def test_marked_idle_pages_go_before_used_ones_and_several_devices_take_turns() -> None:
    world = World(10, 10)
    world.end_epoch()
    world.use(*range(10))
    world.use(*range(10), device=1)
    world.writeback.mark_idle()
    world.use(3)
    world.use(4, device=1)
    world.end_epoch()
    world.writeback.command(18)
    world.run()
    assert set(world.devices[0].sent) == set(range(10)) - {3}
    assert set(world.devices[1].sent) == set(range(10)) - {4}


def test_command_ends_when_nothing_is_left() -> None:
    world = World(5)
    world.devices[0].absent = {0, 1}
    world.writeback.command(1000)
    assert world.run() == [2, 3, 4]
    for _ in range(3):
        world.writeback.step("command")
    assert world.writeback.commanded == 0


def test_command_that_names_an_age_sends_what_was_unused_for_so_long() -> None:
    world = World(10, 10)
    world.end_epoch()
    world.use(0, 1, 2)
    for _ in range(4):
        world.end_epoch()
    world.use(3)
    world.use(5, device=1)
    world.end_epoch()
    world.writeback.command(1000, unused_s=10 * EPOCH_S)
    assert world.run() == []
    assert world.writeback.commanded == 0, "it waits for pages to grow old"
    world.writeback.command(4, unused_s=5 * EPOCH_S)
    assert world.run() == [4, 5, 6, 7], "those that were never used"
    world.writeback.command(1000, unused_s=3 * EPOCH_S)
    assert world.run() == [8, 9, 0, 1, 2]
    assert set(world.devices[1].sent) == set(range(10)) - {5}
    world.writeback.command(1000)
    assert world.run() == [3]
    assert world.writeback.statistics().by_command == 20


@pytest.mark.parametrize(("percent", "limit"), [(1, "90%"), (90, "1%")])
def test_the_lower_of_both_limits_is_where_writeback_begins_and_admission_ends(
    percent: int, limit: str
) -> None:
    files = Files(
        64, settings=(f"pool.zv_page_count_policy_percent={percent}", f"pool.limit={limit}")
    )
    core = files.core
    assert core.writeback is not None
    bound = core._total_frames // 100
    assert abs(core.writeback.limit_frames - bound) <= 1
    assert abs(core.zv.accept_frames - bound * 90 // 100) <= 1
    files.close()


def test_a_pool_that_is_full_by_zv_page_count_policy_percent_lets_the_oldest_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = Files(1024, buffers=600)
    core = files.core
    writeback = core.writeback
    assert writeback is not None
    monkeypatch.setattr(core, "_total_frames", 256 * 100 // 75 + 1)
    core.apply(files.config)
    for number in range(1024):
        files.put(number, page("half", number, PAGE))
        writeback.look()
        while (why := writeback.wanted()) and (
            writeback.step(why) or writeback.in_flight or writeback.is_looking
        ):
            files.transfers.kick()
            files.settle()
        while core.wants_compaction() and core.compact_step():
            pass
    assert writeback.statistics().by_limit > 300
    assert files.device.backed_statistics().written_through_pages < 100
    files.close()


@pytest.mark.parametrize("kind", ["half", "words"])
def test_in_a_core_writing_back_makes_room_and_keeps_what_is_hot(kind: str) -> None:
    files = Files(1024, buffers=1200)
    writeback = files.core.writeback
    assert writeback is not None
    for number in range(1024):
        files.put(number, page(kind, number, PAGE))
    used = files.core.frames.used_frames
    writeback.look()
    hot = range(0, 1024, 5)
    for number in hot:
        files.get(number)
    writeback.limit_frames = used // 2
    while (why := writeback.wanted()) and (writeback.step(why) or writeback.in_flight):
        files.transfers.kick()
        files.settle()
        while files.core.compact_step():
            pass
    assert files.core.frames.used_frames <= used // 2 * 95 // 100
    before = files.transfers.statistics().bd_reads
    for number in hot:
        assert files.get(number) == page(kind, number, PAGE)
    assert files.transfers.statistics().bd_reads == before, "a hot page had gone to the disk"
    for number in range(1024):
        assert files.get(number) == page(kind, number, PAGE)
    files.core.check()
    files.close()


def test_ages_are_told_of_a_sample_of_the_pages_that_are_there() -> None:
    world = World(8192)
    device = world.devices[0]
    device.absent.update(range(4096, 8192))
    for place, pause in enumerate(
        (100_000, 40_000, 2000, 300, 70)
    ):  # seconds; an eighth of what is there is used in each
        device.ages[place * 512 : place * 512 + 512] = bytes([device.epoch]) * 512
        world.now += pause
        world.writeback.look()
    device.ages[2560:] = bytes([device.epoch]) * (8192 - 2560)
    seen = world.writeback.statistics().sampled_ages
    assert sum(seen) == 512  # of 1024 places, one half is empty
    assert seen == (192, 128, 64, 64, 64)
    assert world.writeback.statistics(ages_sampled=False).sampled_ages == ()
