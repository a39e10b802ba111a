# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk behind the pool that fails, stalls, goes and comes back, or is full.

Swap goes on, reports the fault, and recovers by itself. A thread that hangs in the disk does not
delay the takeover from its process. Its late write changes no page of the successor.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import baddisk
from tests.support.baddisk import BadDisk, SparseDisk, bad_disk, sparse_disk
from tests.support.capabilities import requires_loop
from tests.support.strategies import page
from tests.support.swap import Stage, next_worker, stage, wait_for
from tools.bench.harness.daemon import Daemon
from zswapd.core.backing.health import PROBE_S

__all__ = ["stage"]
pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]
requires_nbd = pytest.mark.skipif(
    bool(baddisk.missing()), reason=f"not installed: {baddisk.missing()}"
)

PAGE = 4096
SIZE_MIB = 64
STALL_S = 10
MANY = 3000
"""Pages, of which the pool has room for two thirds."""


class Pages:
    """The swap file as the kernel uses it, and what it has to hold."""

    def __init__(self, daemon: Daemon) -> None:
        self.descriptor = os.open(daemon.file, os.O_RDWR)
        self.daemon = daemon
        self.held: dict[int, int] = {}

    def put(self, numbers: range, seed: int = 0) -> int:
        """Write pages; return how many were taken.

        One that was refused has no data any more: the kernel has kept it.
        """
        taken = 0
        for number in numbers:
            try:
                os.pwrite(self.descriptor, page("half", number + seed, PAGE), number * PAGE)
                self.held[number] = number + seed
                taken += 1
            except OSError as error:
                if error.errno not in {errno.EIO, errno.ENOSPC}:
                    raise
                self.held.pop(number, None)
        return taken

    def get(self, number: int) -> bytes:
        return os.pread(self.descriptor, PAGE, number * PAGE)

    def is_right(self, number: int) -> bool:
        return self.get(number) == page("half", self.held[number], PAGE)

    def all_right(self) -> bool:
        return all(map(self.is_right, self.held))

    def where(self, state: str) -> list[int]:
        """Return the pages in a state of `zswapctl pages`."""
        *rows, _sums = map(json.loads, self.daemon.ctl("--json", "pages").splitlines())
        return [row["page"] for row in rows if row["state"] == state]

    def close(self) -> None:
        os.close(self.descriptor)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BadDisk]:
    with bad_disk(tmp_path / "disk", SIZE_MIB + 1) as made:
        yield made


def start(stage: Stage, path: Path, **settings: str) -> Daemon:
    fixed = {
        "memory__reserve": "8M",
        "pool__limit": "4M",
        "backing__writeback": "false",
        "backing__promote": "false",
    }
    return stage.daemon(f"{SIZE_MIB}M", backing__path=str(path), **fixed | settings)


@pytest.fixture
def pages(stage: Stage, disk: BadDisk) -> Iterator[Pages]:
    """A daemon with more in its swap file than the pool holds."""
    made = Pages(start(stage, disk.device))
    assert made.put(range(MANY)) == MANY
    yield made
    disk.heal()  # or closing the file may wait for it
    made.close()


def trouble(daemon: Daemon) -> str:
    report = daemon.ask("status")["backing"]
    assert isinstance(report["trouble"], str)
    return report["trouble"]


def transfers(daemon: Daemon) -> dict[str, int]:
    counts: dict[str, int] = daemon.ask("stats")["core"]["transfers"]
    return counts


def recovers(daemon: Daemon) -> None:
    wait_for(lambda: not trouble(daemon), "it does not recover", 15)
    assert transfers(daemon)["degraded"] is False


@requires_nbd
@requires_loop()
def test_write_that_fails_is_refused_and_one_of_writeback_leaves_its_page_where_it_is(
    disk: BadDisk, pages: Pages
) -> None:
    daemon = pages.daemon
    kept = pages.where("compressed")
    disk.write_errors.touch()
    assert daemon.ctl("writeback", "--pages", "1").startswith("0 pages")
    assert pages.where("compressed") == kept
    counts = transfers(daemon)
    assert counts["failed_writes"] == counts["avoided_slots"] == 1
    assert not trouble(daemon), "one slot is no disk"
    assert pages.put(range(MANY, MANY + 20)) == 0
    assert "Input/output error" in trouble(daemon)
    assert "DEGRADED" in daemon.ctl("status")
    assert pages.put(range(50), seed=9) == 50, "a page in the pool can be replaced"
    assert pages.all_right(), "reads go on, from the disk too"
    disk.write_errors.unlink()
    recovers(daemon)
    assert pages.put(range(MANY, MANY + 200)) == 200
    assert pages.all_right()


@requires_nbd
@requires_loop()
def test_read_that_fails_is_its_readers_and_nobody_elses(disk: BadDisk, pages: Pages) -> None:
    daemon = pages.daemon
    there = pages.where("disk")
    disk.read_errors.touch()
    for number in there[:: len(there) // 4]:
        with pytest.raises(OSError, match="Input/output error"):
            pages.get(number)
    assert all(map(pages.is_right, pages.where("compressed")[:200]))
    assert "Input/output error" in trouble(daemon)
    assert pages.put(range(30), seed=5) == 30
    time.sleep(2.5 * PROBE_S)
    assert "Input/output error" in trouble(daemon), (
        "writes that work end the trouble of a disk that cannot be read"
    )
    assert "DEGRADED" in daemon.ctl("status")
    disk.read_errors.unlink()
    assert pages.is_right(there[0]), "reads are tried, whatever the state"
    recovers(daemon)
    assert pages.all_right()
    assert daemon.ask("stats")["core"]["devices"][0]["lost_pages"] == 0


@requires_nbd
@requires_loop()
def test_nothing_is_read_ahead_that_a_write_which_waits_for_the_disk_will_change(
    stage: Stage, disk: BadDisk
) -> None:
    pages = Pages(start(stage, disk.device, pool__limit="16M"))
    daemon = pages.daemon
    pages.put(range(256))
    before = daemon.ask("stats")["fuse"]["reads_ahead"]
    # On a busy machine no page may be read ahead in time, and the rest shows nothing: again then.
    for edge in (16, 80, 144):
        change_while_it_is_read_ahead(pages, disk, edge)
        counts = daemon.ask("stats")
        if counts["fuse"]["reads_ahead"] > before:
            break
    else:
        pytest.fail("no page was read ahead: the test is void")
    assert counts["core"]["devices"][0]["failed_reads"] == 0, (
        "what waits for the disk does not fail"
    )
    pages.close()


def change_while_it_is_read_ahead(pages: Pages, disk: BadDisk, edge: int) -> None:
    """Change twelve pages from `edge` on by a write that waits for the disk; read behind it."""
    daemon = pages.daemon
    daemon.ctl("writeback")
    pages.put(range(edge + 1, edge + 40))
    disk.pause()
    new = page("letters", 1, 12 * PAGE)
    # Its first page is on the disk and written in part, so all of it waits.
    writer = threading.Thread(target=os.pwrite, args=(pages.descriptor, new, edge * PAGE + 512))
    writer.start()
    wait_for(lambda: transfers(daemon)["in_flight"] == 1, "the write does not wait for the disk")
    assert all(
        map(pages.is_right, (edge + 1, edge + 2))
    )  # in order: the next one may be read ahead
    time.sleep(0.1)
    disk.resume()
    writer.join(20)
    assert pages.get(edge + 3) == new[3 * PAGE - 512 : 4 * PAGE - 512], (
        "a write that was acknowledged is not seen"
    )
    assert [pages.get(number) for number in (edge + 4, edge + 5)] == [
        new[number * PAGE - 512 : (number + 1) * PAGE - 512] for number in (4, 5)
    ]


@requires_nbd
@requires_loop()
def test_stall_holds_up_whom_it_must_and_no_takeover(disk: BadDisk, pages: Pages) -> None:
    daemon = pages.daemon
    there, kept = pages.where("disk"), pages.where("compressed")
    slowest = 0.0

    def look() -> None:
        nonlocal slowest
        for number in kept[:100]:
            begin = time.monotonic()
            assert pages.is_right(number)
            slowest = max(slowest, time.monotonic() - begin)

    disk.pause()
    begin = time.monotonic()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pages.get(there[0])))
    written: list[int] = []
    writer = threading.Thread(target=lambda: written.append(pages.put(range(MANY, MANY + 1))))
    reader.start()
    writer.start()
    wait_for(lambda: transfers(daemon)["in_flight"] == 2, "nothing waits for the disk")
    look()
    worker = daemon.worker_pid()
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    next_worker(daemon, worker)
    assert time.monotonic() - killed < 2, "the takeover has waited for the disk"
    assert Path(f"/proc/{worker}").exists(), "nothing hung: the test is void"
    look()
    wait_for(lambda: "has taken" in trouble(daemon), "the stall is not seen")
    look()
    assert slowest < 1, "who needs no disk has waited for it"
    time.sleep(max(0.0, begin + STALL_S - time.monotonic()))
    assert writer.is_alive(), (
        "the slot that a dead worker's thread may still write was used, or its writer was turned"
        " away"
    )
    assert reader.is_alive()
    disk.resume()
    writer.join(20)
    assert written == [1], "what the dead worker was writing is lost to its writer"
    reader.join(20)
    assert read == [page("half", there[0], PAGE)]
    recovers(daemon)
    wait_for(lambda: not transfers(daemon)["held_slots"], "slots of the dead worker stay held")
    assert pages.put(range(MANY, MANY + 100)) == 100
    assert pages.all_right()


@requires_nbd
@requires_loop()
def test_nothing_goes_to_a_disk_that_hangs(pages: Pages, disk: BadDisk) -> None:
    there = pages.where("disk")[0]
    disk.pause()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pages.get(there)))
    reader.start()
    wait_for(lambda: "has taken" in trouble(pages.daemon), "the stall is not seen")
    # A writer that waits would hold up all others: a file system writes to a file one by one.
    assert pages.put(range(MANY, MANY + 5)) == 0, "the pool is full, and the disk takes nothing"
    disk.resume()
    reader.join(20)
    assert read == [page("half", there, PAGE)]
    recovers(pages.daemon)
    assert pages.put(range(MANY, MANY + 5)) == 5
    assert pages.all_right()


@requires_nbd
@requires_loop()
def test_disk_that_is_slow_is_no_disk_in_trouble_and_has_neighbours_in_one_request(
    stage: Stage, tmp_path: Path
) -> None:
    delay_s, many = 0.3, 32
    data = b"".join(page("noise", number, PAGE) for number in range(many))
    with bad_disk(tmp_path / "disk", SIZE_MIB + 1, delay_ms=int(1000 * delay_s)) as disk:
        daemon = start(stage, disk.device, pool__incompressible="refuse", backing__force="true")
        pages = Pages(daemon)
        assert pages.put(range(many, 200)) == 200 - many
        times: dict[str, float] = {}

        def use_the_disk() -> None:
            begin = time.monotonic()
            assert os.pwrite(pages.descriptor, data, 0) == len(data)
            times["write"] = time.monotonic() - begin
            assert os.pread(pages.descriptor, len(data), 0) == data
            times["both"] = time.monotonic() - begin

        other = threading.Thread(target=use_the_disk)
        other.start()
        rounds = 0
        while other.is_alive():
            assert all(map(pages.is_right, range(many, many + 10)))
            assert not trouble(daemon)
            rounds += 1
        assert rounds > 4, "who needs no disk has waited for it"
        assert times["write"] >= delay_s
        assert times["both"] >= 2 * delay_s
        assert (transfers(daemon)["write_requests"], transfers(daemon)["read_requests"]) == (1, 1)
        pages.close()


@requires_nbd
@requires_loop()
def test_disk_that_goes_away_and_comes_back(disk: BadDisk, pages: Pages) -> None:
    daemon = pages.daemon
    there = pages.where("disk")
    disk.vanish()
    with pytest.raises(OSError, match="Input/output error"):
        pages.get(there[0])
    assert pages.put(range(MANY, MANY + 8)) == 0
    assert trouble(daemon)
    assert pages.put(range(50), seed=3) == 50
    disk.come_back()
    recovers(daemon)
    assert pages.put(range(MANY, MANY + 100)) == 100
    assert pages.all_right(), "what was on the disk is there again"


@requires_loop()
def test_sparse_disk_that_runs_out_of_space(stage: Stage, tmp_path: Path) -> None:
    with sparse_disk(tmp_path / "small", SIZE_MIB + 1, 3) as disk:
        _fill_up(stage, disk)


def _fill_up(stage: Stage, disk: SparseDisk) -> None:
    daemon = start(stage, disk.device)
    pages = Pages(daemon)
    taken = pages.put(range(4000))
    assert 2000 < taken < 3500
    wait_for(
        lambda: not pages.put(range(4000, 4005)) and trouble(daemon), "the daemon does not say so"
    )
    assert pages.all_right()
    for _ in range(30):
        assert not pages.put(range(4000, 4001))
        assert "No space left" in trouble(daemon), (
            "it takes itself for well again while there is no space"
        )
        time.sleep(0.1)
    disk.grow(80)
    wait_for(lambda: pages.put(range(4000, 4400)) == 400, "it does not recover", 15)
    recovers(daemon)
    assert pages.put(range(4000)) == 4000
    assert pages.all_right()
    pages.close()
    daemon.stop()
