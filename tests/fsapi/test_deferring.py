# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk requests that requests of the kernel cause.

Neighbouring slots are one disk request, and readers of the same slot share one.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.support.backed import SWAP, Files
from tests.support.strategies import page
from zswapd.core.reclaim.writeback import IN_FLIGHT

PAGE = 4096
MANY = 16
"""Pages in the longest request."""


@pytest.fixture
def files() -> Iterator[Files]:
    """A swap file whose pool takes nothing."""
    made = Files(4 * MANY)
    made.core.zv.limit_frames = 0
    yield made
    made.close()


def data(first: int, count: int) -> bytes:
    return b"".join(page("noise", number, PAGE) for number in range(first, first + count))


def test_pages_of_one_write_that_the_pool_refuses_go_out_in_one_request(files: Files) -> None:
    request = files.write(8 * PAGE, data(8, MANY))
    assert len(files.disk.waiting) == 1
    assert request not in files.answers
    files.settle()
    assert files.disk.writes == [(8, MANY)]
    assert files.answers[request] == MANY * PAGE


def test_neighbours_are_read_in_one_request_which_their_readers_share(files: Files) -> None:
    files.write(0, data(0, MANY))
    files.settle()
    requests = [
        files.read(0, MANY * PAGE),
        files.read(3 * PAGE, 4 * PAGE),
        files.read(0, MANY * PAGE),
    ]
    assert len(files.disk.waiting) == 1
    files.settle()
    assert [files.answers[request] for request in requests] == [
        data(0, MANY),
        data(3, 4),
        data(0, MANY),
    ]
    assert files.transfers.statistics().bd_reads == MANY


@pytest.mark.parametrize("bad", [0, 5, MANY - 1])
def test_bad_sector_costs_its_own_reader_and_not_those_of_its_neighbours(
    files: Files, bad: int, expect_log: Callable[..., None]
) -> None:
    expect_log(f"page {bad} of swap cannot be read", level=logging.ERROR)
    files.write(0, data(0, MANY))
    files.settle()
    files.disk.bad = {bad}
    requests = [files.read(number * PAGE, PAGE) for number in range(MANY)]
    whole = files.read(0, MANY * PAGE)
    files.settle()
    for number, request in enumerate(requests):
        assert files.answers[request] == (-errno.EIO if number == bad else data(number, 1))
    assert files.answers[whole] == (data(0, bad) if bad else -errno.EIO), (
        "the pages in front of it are the answer"
    )
    for number in range(MANY):
        assert files.get(number) == (-errno.EIO if number == bad else data(number, 1))
    assert files.transfers.trouble == "", "a sector is no disk"


@pytest.mark.parametrize("bad", [0, 5, MANY - 1])
def test_bad_sector_in_a_run_that_several_read_together_costs_its_reader_only(
    files: Files, bad: int, expect_log: Callable[..., None]
) -> None:
    expect_log(f"page {bad} of swap cannot be read", level=logging.ERROR)
    files.write(0, data(0, MANY))
    files.settle()
    files.disk.bad = {bad}
    whole = files.read(0, MANY * PAGE)  # readahead: the others join its request
    requests = [files.read(number * PAGE, PAGE) for number in range(MANY)]
    assert len(files.disk.waiting) == 1
    files.settle()
    assert [files.answers[request] for request in requests] == [
        -errno.EIO if number == bad else data(number, 1) for number in range(MANY)
    ]
    assert files.answers[whole] == (data(0, bad) if bad else -errno.EIO), (
        "the pages in front of it are the answer"
    )
    seen = files.transfers.statistics()
    assert (seen.read_requests, seen.failed_reads, seen.bd_reads) == (9, 5, MANY - 1), (
        "halves are tried, not each slot"
    )
    assert seen.free_buffers == files.transfers.buffers
    assert not seen.degraded


@pytest.mark.parametrize(
    "bad",
    [(8, 9, 10, 11), (9, 10, 11, 12), (1, 2, 3, 4, 5, 13), (3, 7, 8, 9, 12), tuple(range(1, 15))],
)
def test_several_bad_sectors_cost_their_own_readers_and_not_those_of_their_neighbours(
    files: Files, bad: tuple[int, ...], expect_log: Callable[..., None]
) -> None:
    expect_log("of swap cannot be read", level=logging.ERROR)
    files.write(0, data(0, MANY))
    files.settle()
    files.disk.bad = set(bad)
    files.read(0, MANY * PAGE)  # the others join its request
    requests = [files.read(number * PAGE, PAGE) for number in range(MANY)]
    files.settle()
    assert [files.answers[request] for request in requests] == [
        -errno.EIO if number in bad else data(number, 1) for number in range(MANY)
    ]


@pytest.mark.parametrize("takes_part", [True, False])
@pytest.mark.parametrize("place", ["the pool", "the disk"])
def test_read_with_a_lost_page_ends_in_front_of_it(
    files: Files, place: str, takes_part: bool, expect_log: Callable[..., None]
) -> None:
    expect_log("page 3 of swap has no data", level=logging.ERROR)
    files.core.zv.limit_frames = 1000 if place == "the pool" else 0
    files.core.zv.keep_poor = place == "the pool"
    files.write(0, data(0, 3))
    files.write(4 * PAGE, data(4, 4))
    files.settle()
    files.device._mark_lost(3)
    files.operations._takes_part = lambda: takes_part
    request = files.read(PAGE, 6 * PAGE)
    files.operations._takes_part = lambda: not takes_part  # another request is in the hook's buffer
    files.settle()
    assert files.answers[request] == (data(1, 2) if takes_part else -errno.EIO)
    request = files.read(3 * PAGE, 4 * PAGE)
    files.settle()
    assert files.answers[request] == -errno.EIO
    assert files.device.has_unreadable()
    files.put(3, data(3, 1))
    assert not files.device.has_unreadable()


def test_page_of_a_disk_that_comes_back_is_not_unreadable_any_more(
    files: Files, expect_log: Callable[..., None]
) -> None:
    expect_log("page 2 of swap cannot be read", level=logging.ERROR)
    files.write(0, data(0, MANY))
    files.settle()
    files.disk.bad = {2}
    assert files.get(2) == -errno.EIO
    assert files.device.has_unreadable()
    files.disk.bad = set()
    assert files.device.has_unreadable(), "no reader has asked for the page since"
    assert files.get(2) == data(2, 1)
    assert not files.device.has_unreadable()


def test_disk_that_cannot_be_read_at_all_is_not_tried_for_each_page(
    files: Files, expect_log: Callable[..., None]
) -> None:
    expect_log("page 0 of swap cannot be read", level=logging.ERROR)
    files.write(0, data(0, MANY))
    files.settle()
    files.disk.failing = errno.ENODEV
    request = files.read(0, MANY * PAGE)
    files.settle()
    assert files.answers[request] == -errno.EIO
    assert files.transfers.statistics().read_requests <= 11
    assert files.transfers.trouble


@pytest.mark.parametrize("damage", ["a bit", "another slot", "an older page", "zeros"])
def test_slot_that_holds_something_else_is_an_error_and_never_data(
    files: Files, damage: str, expect_log: Callable[..., None]
) -> None:
    expect_log("page 5 of swap came back from the backing changed", level=logging.ERROR)
    files.write(5 * PAGE, data(99, 1))
    files.settle()
    older = files.disk.slots[5]
    files.write(0, data(0, MANY))
    files.settle()
    slot = files.disk.slots[5]
    match damage:
        case "a bit":
            files.disk.slots[5] = slot[:4000] + bytes([slot[4000] ^ 4]) + slot[4001:]
        case "another slot":
            files.disk.slots[5] = files.disk.slots[6]
        case "an older page":
            files.disk.slots[5] = older
        case "zeros":
            files.disk.slots[5] = bytes(PAGE)
    assert files.get(5) == -errno.EIO
    assert files.device.backed_statistics().bad_slots == 1
    for number in set(range(MANY)) - {5}:
        assert files.get(number) == data(number, 1)
    files.put(5, data(7, 1))
    assert files.get(5) == data(7, 1), "what is written anew is sound"


def test_page_that_is_read_while_its_slot_is_written_stays_in_the_pool(files: Files) -> None:
    files.core.zv.limit_frames = 1000
    files.core.zv.keep_poor = True
    for number in (1, 2):
        files.put(number, data(number, 1))
    files.device.epoch += 1
    assert files.write_back([1, 2]) == 2
    assert files.get(1) == data(1, 1)
    files.settle()
    seen = files.device.backed_statistics()
    assert (seen.bd_count, seen.written_back_pages, seen.kept_pages) == (1, 1, 1)


@pytest.mark.parametrize("how", ["no room", "poor", "old"])
def test_page_returns_to_the_pool_at_its_first_read_if_there_was_no_room_and_else_at_the_second(
    how: str,
) -> None:
    files = Files(MANY, settings=("pool.incompressible=refuse",))
    content = page("noise" if how == "poor" else "half", 1, PAGE)
    files.core.zv.limit_frames = 0 if how == "no room" else 1000
    files.put(1, content)
    files.core.zv.limit_frames = 1000
    files.core.zv.keep_poor = True
    if how == "old":
        files.write_back([1])
        files.settle()
    files.device.promotes = True
    returned = []
    for _ in range(3):
        assert files.get(1) == content
        returned.append(files.device.backed_statistics().promoted_pages)
    assert returned == ([1, 1, 1] if how == "no room" else [0, 1, 1])
    assert files.transfers.statistics().bd_reads == returned.index(1) + 1
    files.close()


def test_page_that_does_not_compress_goes_to_the_disk_and_is_kept_where_that_does_not_take_it() -> (
    None
):
    files = Files(MANY)
    assert files.core.writeback
    assert files.core.writeback.raw_limit == 0, "what had to be kept goes there as soon as it can"
    files.put(1, data(1, 1))
    files.put(2, page("half", 2, PAGE))
    files.device.poor_pool = None
    files.disk.failing = errno.EIO
    for number in range(3, 8):
        files.put(number, data(number, 1))
    assert files.transfers.trouble
    files.device.poor_pool = files.core.zv
    refused = files.core.devices["swap"].statistics().refused_writes
    for number in (1, 8):
        files.put(number, data(9, 1))
    assert files.core.devices["swap"].statistics().refused_writes == refused
    assert not files.core.zv.keep_poor
    assert files.core.zv.raw_pages == 2
    files.disk.failing = 0
    assert [files.get(number) for number in (1, 2, 8)] == [
        data(9, 1),
        page("half", 2, PAGE),
        data(9, 1),
    ]
    files.close()


def test_page_stays_on_the_disk_where_it_may_not_return(files: Files) -> None:
    files.put(1, data(1, 1))
    files.core.zv.limit_frames = 1000
    for turn in range(3):
        assert files.get(1) == data(1, 1)
        assert files.transfers.statistics().bd_reads == turn + 1


def test_settings_reach_who_goes_by_them() -> None:
    names = ("limit_frames", "accept_percent", "idle_s", "raw_limit", "budget", "promotes")
    chosen = (
        "pool.limit=40M",
        "pool.accept_threshold_percent=70",
        "backing.idle_age=123",
        "backing.incompressible_limit=8M",
        "backing.budget=2G",
        "backing.promote=false",
    )
    files = Files(MANY, settings=chosen)
    writeback = files.core.writeback
    assert tuple(getattr(writeback, name) for name in names) == (
        10240,
        70,
        123,
        2048,
        2 << 30,
        False,
    )
    assert (files.core.zv.limit_frames, files.core.zv.accept_frames) == (10240, 7168)
    files.close()
    off = Files(MANY, settings=(*chosen, "backing.writeback=false"))
    writeback = off.core.writeback
    assert tuple(getattr(writeback, name) for name in names[:4:2]) == (1 << 62, 0)
    assert writeback is not None
    assert writeback.raw_limit == 1 << 62
    off.close()


def test_reserve_that_is_nearly_empty_sends_pages_out() -> None:
    files = Files(4 * MANY)
    core, writeback = files.core, files.core.writeback
    assert writeback is not None
    writeback.limit_frames = 1 << 30
    for number in range(8):
        files.put(number, data(number, 1))
    writeback.look()
    assert writeback.wanted() == ""
    while core.frames.table.free_frames > core.frames.reserve_target // 8 - 1:
        assert core.frames.alloc(1)
    assert writeback.wanted() == "reserve"
    files.close()


def test_most_pages_are_under_way_and_some_buffers_are_left_to_requests() -> None:
    for buffers, most in ((2000, IN_FLIGHT), (400, 200)):
        files = Files(1024, buffers=buffers, settings=("pool.limit=100M",))
        writeback = files.core.writeback
        assert writeback is not None
        for number in range(1024):
            files.put(number, page("half", number, PAGE))
        writeback.command(1024)
        begun = sum(writeback.step("command") for _ in range(8))
        assert begun == writeback.in_flight == most
        files.close()


@pytest.mark.parametrize("change", ["write", "discard"])
def test_changes_inside_one_page_on_the_disk_cost_no_buffer(files: Files, change: str) -> None:
    files.write(0, data(0, 4))
    files.settle()
    expected = bytearray(data(0, 4))
    for turn in range(files.transfers.buffers):
        at = turn % 4 * PAGE + 100 + turn
        request = files.write(at, b"!" * 50) if change == "write" else files.discard(at, 50)
        assert len(files.disk.waiting) == 1, "one page is read by one request"
        files.settle()
        assert files.answers[request] == (50 if change == "write" else 0)
        expected[at : at + 50] = b"!" * 50 if change == "write" else bytes(50)
    assert files.transfers.statistics().free_buffers == files.transfers.buffers
    whole = files.read(0, 4 * PAGE)
    files.settle()
    assert files.answers[whole] == bytes(expected)


@pytest.mark.parametrize("change", ["write", "discard"])
def test_change_beyond_the_end_of_the_file_whose_head_is_on_the_disk_is_cut_there(
    files: Files, change: str
) -> None:
    last = 4 * MANY - 1
    files.write(last * PAGE, data(last, 1))
    files.settle()
    at, length = last * PAGE + 100, 2 * PAGE
    request = files.write(at, b"!" * length) if change == "write" else files.discard(at, length)
    files.settle()
    assert files.answers[request] == (PAGE - 100 if change == "write" else 0)
    assert files.get(last) == data(last, 1)[:100] + (b"!" if change == "write" else b"\0") * (
        PAGE - 100
    )
    assert files.operations.statistics().internal_errors == 0


REFUSALS: dict[str, tuple[str, ...]] = {
    "compress_poor": ("pool.incompressible=refuse",),
    "mean_compress_poor": ("pool.incompressible=refuse", "pool.zv_max_mean_zsize=32"),
    "pool_limit_hit": ("pool.limit=4096",),
    "policy_percent_exceeded": (),
    "failed_alloc": (),
    "frozen": (),
}
"""What makes the pool refuse pages, by the reason that it is counted under."""


@pytest.mark.parametrize("reason", REFUSALS)
def test_whatever_the_pool_refuses_goes_to_its_slot_and_is_counted_by_reason(reason: str) -> None:
    files = Files(4 * MANY, settings=REFUSALS[reason])
    core = files.core
    match reason:
        case "policy_percent_exceeded":
            core.zv.policy_percent = 0
        case "failed_alloc":
            while core.frames.table.free_frames:
                core.frames.alloc(1)
        case "frozen":
            core.frontswap.freeze()
    kind = "noise" if reason == "compress_poor" else "half"
    requests = [files.write(number * PAGE, page(kind, number, PAGE)) for number in range(8)]
    files.settle()
    assert [files.answers[request] for request in requests] == [PAGE] * 8
    refused = core.frontswap.statistics().rejects
    assert list(refused) == [reason]
    assert files.device.backed_statistics().written_through_pages == refused[reason] > 0
    assert [files.get(number) for number in range(8)] == [
        page(kind, number, PAGE) for number in range(8)
    ]
    files.close()


class GivenUp(BaseException):
    """What a worker does that cannot go on: nothing comes after it."""


def test_bug_in_an_answer_that_waited_for_the_disk_is_blamed_on_its_request_and_ends_the_worker(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(0, data(0, 1))
    files.settle()
    told: list[tuple[str, list[int]]] = []

    def give_up(handler: str, error: Exception) -> None:
        told.append((f"{handler}: {error}", list(files.blamed)))
        raise GivenUp

    files.operations.failures.when_broken = give_up
    request = files.read(0, PAGE)

    def read_into(_offset: int, _out: memoryview) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(
        files.operations,
        "_files",
        {SWAP: type("Broken", (), {"size": PAGE, "read_into": staticmethod(read_into)})},
    )
    with pytest.raises(GivenUp):
        files.settle()
    assert told == [("a deferred request: a bug", [request])]
    assert request not in files.answers, "its successor answers it"
