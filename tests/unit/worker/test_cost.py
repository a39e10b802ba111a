# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's memory is read from /proc, by process, and reported by part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.successor import make_config
from zswapd.core.core import Core
from zswapd.handover.state import Word
from zswapd.system.scheduling import SPARE_NAME, WORKER_NAME
from zswapd.worker.cost import Cost, process_memory

SUPERVISOR, SPARE = 7, 8


class State:
    """A shared state of three blocks."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"x" * 1536)
        self.fd = os.open(path, os.O_RDONLY)
        self.words = [0] * len(Word)


def write_process(root: Path, pid: int, name: str, anon: int, file: int) -> None:
    directory = root / "proc" / str(pid)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "comm").write_text(name + "\n")
    (directory / "status").write_text(
        f"Name:\t{name}\nVmRSS:\t 999 kB\nRssAnon:\t {anon} kB\nRssFile:\t {file} kB\n"
    )


@pytest.fixture
def core() -> Iterator[Core]:
    core = Core(make_config("swap.size=16M", "memory.reserve=2M", "memory.arena=memfd"))
    yield core
    core.close()


@pytest.fixture
def supervisor() -> list[int]:
    return [SUPERVISOR]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state")
    yield state
    os.close(state.fd)


@pytest.fixture
def cost(tmp_path: Path, supervisor: list[int], state: State) -> Cost:
    children = tmp_path / f"proc/{SUPERVISOR}/task/{SUPERVISOR}/children"
    children.parent.mkdir(parents=True)
    children.write_text(f"{os.getpid()} {SPARE} ")
    write_process(tmp_path, SUPERVISOR, "zswapd", 10_000, 4000)
    write_process(tmp_path, os.getpid(), WORKER_NAME, 40_000, 5000)
    write_process(tmp_path, SPARE, SPARE_NAME, 30_000, 3000)
    return Cost(cast("Any", state), lambda: supervisor[0], tmp_path)


def test_each_part_is_found(cost: Cost, core: Core) -> None:
    cost.sample()
    seen = cost.statistics(core.statistics())
    index = core.statistics().tmem.objnode_bytes
    assert (seen.supervisor_bytes, seen.spare_bytes) == (10_000 << 10, 30_000 << 10)
    assert seen.worker_bytes == (40_000 << 10) - index
    assert seen.index_bytes == index
    assert seen.code_bytes == 5000 << 10, "the processes share it"
    assert seen.ready_bytes >= 2 << 20
    assert seen.state_bytes > 0
    parts = [seen.supervisor_bytes, seen.worker_bytes, seen.spare_bytes, seen.code_bytes, index]
    assert seen.beside_pool_bytes == sum(parts) + seen.state_bytes + seen.ready_bytes
    assert seen.effective_ratio == 0


def test_ratio_has_all_memory_below_the_line(cost: Cost, core: Core) -> None:
    cost.sample()
    before = cost.statistics(core.statistics())
    page = core.frames.page_size
    for number in range(200):
        assert core.devices["swap"].write(number * page, memoryview(os.urandom(page))) is None
    seen = cost.statistics(core.statistics())
    used = core.frames.used_frames * page
    assert used > 200 * page
    assert seen.effective_ratio == pytest.approx(
        200 * page / (seen.beside_pool_bytes + used), abs=1e-4
    )
    assert seen.ready_bytes + used == pytest.approx(before.ready_bytes, abs=1 << 20)


def test_process_that_has_ended_costs_nothing(cost: Cost, core: Core, tmp_path: Path) -> None:
    cost.sample()
    (tmp_path / f"proc/{SPARE}/status").unlink()
    (tmp_path / f"proc/{SPARE}/comm").unlink()
    cost.sample()
    assert cost.statistics(core.statistics()).spare_bytes == 0
    (tmp_path / f"proc/{SUPERVISOR}/task/{SUPERVISOR}/children").unlink()
    cost.sample()
    assert cost.statistics(core.statistics()).supervisor_bytes == 10_000 << 10


def test_memory_that_supervisor_and_spare_share_is_counted_once(
    cost: Cost, core: Core, state: State
) -> None:
    state.words[Word.SPARE_SHARED] = 20_000 << 10
    cost.sample()
    seen = cost.statistics(core.statistics())
    assert (seen.supervisor_bytes, seen.spare_bytes) == (10_000 << 10, 10_000 << 10)
    state.words[Word.SPARE_SHARED] = 1 << 40
    assert cost.statistics(core.statistics()).spare_bytes == 0


def test_supervisor_that_is_dead_costs_nothing_whichever_process_has_its_number(
    cost: Cost, core: Core, supervisor: list[int]
) -> None:
    supervisor[0] = 0
    cost.sample()
    seen = cost.statistics(core.statistics())
    assert (seen.supervisor_bytes, seen.spare_bytes) == (0, 0)
    assert seen.worker_bytes > 0


def test_memory_of_this_process_is_what_the_kernel_says() -> None:
    """The field names exist in this kernel."""
    seen = process_memory(Path("/proc/self/status").read_text())
    assert seen.private > 1 << 20
    assert seen.code > 1 << 20
