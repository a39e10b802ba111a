# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that cannot be read, under real swap with readahead: each costs its own reader alone,
wherever it lies in its cluster.

The kernel swaps in eight pages at a time, in one request. What it got no data for stays in its swap
cache, until memory is short: so a page that was unreadable once is asked for again after it was
swapped out once more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.kernel.test_integrity import arena_of
from tests.support.swap import Stage, next_worker, wait_for
from tests.support.swapped import PAGE, Swapped, content
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon
from zswapd.core.backing.store import DATA_AT

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(120)]

PAGES = 1500
CLUSTER = 8
BAD = [400 + (8 * CLUSTER + 1) * place for place in range(CLUSTER)]
"""Pages at all places of a cluster, and far enough from each other."""
FIRST = 1300
"""Read before all others, by itself."""


@pytest.fixture(autouse=True)
def _clusters() -> Iterator[None]:
    with system.page_cluster_set(3):
        yield


def nomerges(device: str) -> str:
    return (Path("/sys/block") / Path(device).name / "queue/nomerges").read_text().strip()


def unmerged(device: str) -> None:
    wait_for(lambda: nomerges(device) == "2", "requests are still merged", 5)


def merged(device: str) -> None:
    wait_for(lambda: nomerges(device) == "0", "requests are not merged again", 5)


def damage(daemon: Daemon, numbers: Iterable[int]) -> None:
    """Flip a bit of each of these pages in the pool."""
    with arena_of(daemon) as arena:
        for number in numbers:
            place = arena.find(content(number))
            assert place > 0, "not in the arena"
            arena[place + 2000] ^= 4


def is_behind(numbers: list[int], bad: int) -> bool:
    """Say whether pages can all have been in one request with a bad one, behind it or itself."""
    return numbers[0] == bad and numbers[-1] < bad + CLUSTER


def test_damaged_pages_cost_their_own_readers_alone(stage: Stage) -> None:
    daemon = stage.daemon(size="64M")
    device = daemon.swapon()
    with Swapped(stage.cgroup(64), PAGES) as process:
        process.swap_out()
        damage(daemon, [*BAD, FIRST])
        assert is_behind(process.read([FIRST]), FIRST)
        unmerged(device)
        wait_for(
            lambda: "are unreadable" in daemon.log_text(), "the log does not say so", 5
        )  # after the device was set
        assert process.read(range(FIRST)) == BAD
        process.swap_out()
        assert process.read(range(PAGES)) == [*BAD, FIRST], (
            "their neighbours are readable, each time"
        )

        # A successor knows, or finds out; and so does it of a loop device that is new.
        old = daemon.worker_pid()
        os.kill(old, signal.SIGKILL)
        next_worker(daemon, old)
        time.sleep(1.5)
        assert nomerges(device) == "2"
        process.swap_out()
        assert process.read(range(PAGES)) == [*BAD, FIRST]

        daemon.swapoff()
        assert process.read(range(PAGES)) == [*BAD, FIRST], "swapoff brings back all but these"
    assert nomerges(device) == "0", "the next user of the loop device is to find it as it was"


def test_damage_that_shows_in_readahead_costs_no_page_in_front_of_it_and_is_over_with_its_process(
    stage: Stage,
) -> None:
    daemon = stage.daemon(size="64M")
    device = daemon.swapon()
    cgroup = stage.cgroup(64)
    for place in (0, 3, 7):
        with Swapped(cgroup, PAGES) as process:
            process.swap_out()
            bad = 512 + place
            damage(daemon, [bad])
            assert process.read(range(400, bad)) == []
            assert is_behind(process.read(range(bad, bad + 100)), bad)
            unmerged(device)
        # A page that is locked while its process ends stays in the swap cache, and the kernel
        # discards no slot of its cluster.
        (cgroup.path / "memory.force_empty").write_text("0")
        merged(device)  # the kernel has discarded what was the process'
    wait_for(lambda: "are merged again" in daemon.log_text(), "the log does not say so", 5)


def test_changed_slots_of_the_disk_cost_their_own_readers_alone(
    stage: Stage, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    daemon = stage.daemon(size="64M", backing__path=str(store), backing__promote="false")
    device = daemon.swapon()
    with Swapped(stage.cgroup(64), PAGES) as process:
        slots = process.swap_out()
        with store.open("r+b", buffering=0) as file:
            for number in [*BAD, FIRST]:
                place = DATA_AT + slots[number] * PAGE
                byte = os.pread(file.fileno(), 1, place)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 4]), place)
            os.fsync(file.fileno())
        assert is_behind(process.read([FIRST]), FIRST)
        unmerged(device)
        assert process.read(range(FIRST)) == BAD
        assert daemon.ask("stats")["core"]["backed"][0]["bad_slots"] >= len(BAD)


def test_loop_device_that_comes_later_is_found(stage: Stage) -> None:
    """Attached by hand, over a file with a page that cannot be read."""
    daemon = stage.daemon(size="64M")
    with daemon.file.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), content(5), 5 * PAGE)
        damage(daemon, [5])
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), PAGE, 5 * PAGE)
    device = system.attach_loop(daemon.file)
    try:
        unmerged(device)
        assert nomerges(device) == "2"
    finally:
        system.detach_loop(device)
    merged(device)
