# SPDX-License-Identifier: GPL-2.0-or-later
"""What requests of the kernel become at the disk: neighbours go together, and who wants the same shares it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.support.backed import SWAP, Files
from tests.support.strategies import page

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
    requests = [files.read(0, MANY * PAGE), files.read(3 * PAGE, 4 * PAGE), files.read(0, MANY * PAGE)]
    assert len(files.disk.waiting) == 1
    files.settle()
    assert [files.answers[request] for request in requests] == [data(0, MANY), data(3, 4), data(0, MANY)]
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
    assert files.answers[whole] == -errno.EIO
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
    assert files.answers[whole] == -errno.EIO
    seen = files.transfers.statistics()
    assert (seen.read_requests, seen.failed_reads, seen.bd_reads) == (9, 5, MANY - 1), "halves are tried, not each slot"
    assert seen.free_buffers == files.transfers.buffers
    assert not seen.degraded


def test_disk_that_cannot_be_read_at_all_is_not_tried_for_each_page(files: Files, expect_log: Callable[..., None]) -> None:
    expect_log("page 0 of swap cannot be read", level=logging.ERROR)
    files.write(0, data(0, MANY))
    files.settle()
    files.disk.failing = errno.ENODEV
    request = files.read(0, MANY * PAGE)
    files.settle()
    assert files.answers[request] == -errno.EIO
    assert files.transfers.statistics().read_requests <= 11
    assert files.transfers.trouble


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
def test_change_beyond_the_end_of_the_file_whose_head_is_on_the_disk_is_cut_there(files: Files, change: str) -> None:
    last = 4 * MANY - 1
    files.write(last * PAGE, data(last, 1))
    files.settle()
    at, length = last * PAGE + 100, 2 * PAGE
    request = files.write(at, b"!" * length) if change == "write" else files.discard(at, length)
    files.settle()
    assert files.answers[request] == (PAGE - 100 if change == "write" else 0)
    assert files.get(last) == data(last, 1)[:100] + (b"!" if change == "write" else b"\0") * (PAGE - 100)
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
    assert [files.get(number) for number in range(8)] == [page(kind, number, PAGE) for number in range(8)]
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
        files.operations, "_files", {SWAP: type("Broken", (), {"size": PAGE, "read_into": staticmethod(read_into)})}
    )
    with pytest.raises(GivenUp):
        files.settle()
    assert told == [("a deferred request: a bug", [request])]
    assert request not in files.answers, "its successor answers it"
