# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon with a store in a file.

What goes there and why, what comes back, and what a takeover keeps of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.strategies import page
from tests.support.swap import Stage, stage, wait_for
from tools.bench.harness.daemon import Daemon
from zswapd.core.backing.store import DATA_AT

__all__ = ["stage"]
pytestmark = pytest.mark.mount

PAGE = 4096
COUNT = 1000


class Pages:
    """Pages of one of a daemon's files."""

    def __init__(self, daemon: Daemon, file: Path | None = None) -> None:
        self.daemon = daemon
        self._fd = os.open(file or daemon.file, os.O_RDWR)
        self._kinds: dict[int, str] = {}

    def put(self, numbers: range, kind: str = "half") -> None:
        for number in numbers:
            os.pwrite(self._fd, page(kind, number, PAGE), number * PAGE)
            self._kinds[number] = kind

    def get(self, number: int) -> None:
        assert os.pread(self._fd, PAGE, number * PAGE) == page(self._kinds[number], number, PAGE), (
            number
        )

    def get_all(self) -> None:
        for number in self._kinds:
            self.get(number)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def daemon(stage: Stage, store: Path) -> Daemon:
    return stage.daemon("64M", backing__path=str(store), memory__reserve="16M", pool__limit="64M")


@pytest.fixture
def pages(daemon: Daemon) -> Iterator[Pages]:
    made = Pages(daemon)
    yield made
    made.close()


def core(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.ask("stats")["core"]
    return found


def writeback(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = core(daemon)["writeback"]
    return found


def on_disk(daemon: Daemon) -> int:
    return sum(int(file["bd_count"]) for file in core(daemon)["backed"])


def test_readers_of_the_disk_are_answered_without_a_turn_of_the_event_loop(pages: Pages) -> None:
    pages.put(range(COUNT))
    assert pages.daemon.ctl_json("writeback")["written_back"] == COUNT
    before = pages.daemon.ask("stats")["fuse"]
    for number in range(COUNT):
        pages.get(number * 7 % COUNT)
    after = pages.daemon.ask("stats")["fuse"]
    assert after["deferred"] - before["deferred"] >= COUNT
    assert after["receives"] - before["receives"] < COUNT


def test_commands_and_settings_send_what_they_name(pages: Pages) -> None:
    daemon = pages.daemon
    daemon.ctl("set", "pool.incompressible=store")
    pages.put(range(300))
    pages.put(range(300, 400), "noise")
    assert core(daemon)["zv"]["curr_incompressible"] == 100
    daemon.ctl("set", "backing.incompressible_limit=200K")
    wait_for(
        lambda: writeback(daemon)["by_incompressible"] >= 50, "pages that do not compress stay"
    )
    # They are counted when they are sent, and leave when their slots are written.
    wait_for(
        lambda: core(daemon)["zv"]["curr_incompressible"] <= 50, "what was sent does not leave"
    )
    assert core(daemon)["zv"]["curr_incompressible"] == 50
    assert daemon.ctl_json("writeback", "--incompressible")["written_back"] == 50
    assert core(daemon)["zv"]["curr_incompressible"] == 0
    assert on_disk(daemon) == 100
    assert daemon.ctl_json("writeback", "--idle", "3600")["written_back"] == 0
    assert daemon.ctl_json("writeback", "--mark-idle")["marked"]
    pages.get(7)
    assert daemon.ctl_json("writeback", "--pages", "299")["written_back"] == 299
    assert core(daemon)["zv"]["curr_pages"] == 1, "the one that was used since"
    pages.get_all()


def test_budget_stops_what_goes_by_age_and_is_shown_and_carried_over_a_death(pages: Pages) -> None:
    daemon = pages.daemon
    pages.put(range(100))
    daemon.ctl("set", "backing.budget=160K", "backing.idle_age=1")
    wait_for(lambda: writeback(daemon)["by_age"] == 40, "nothing goes by age")
    assert "0 B more today" in daemon.ctl("status")
    time.sleep(1)  # what is spent is remembered twice a second
    pages.get(0)
    time.sleep(1)
    os.kill(daemon.worker_pid(), 9)
    pages.get_all()
    time.sleep(1.5)
    assert writeback(daemon)["budget_left_bytes"] == 0
    assert writeback(daemon)["by_age"] == 40
    daemon.ctl("set", "backing.budget=")
    wait_for(lambda: writeback(daemon)["by_age"] >= 100, "it goes on no more")


@pytest.mark.parametrize("returns", ["true", "false"])
def test_pages_return_to_a_pool_with_room_unless_they_may_not(pages: Pages, returns: str) -> None:
    daemon = pages.daemon
    daemon.ctl("set", f"backing.promote={returns}")
    pages.put(range(100))
    daemon.ctl("writeback")
    time.sleep(0.3)
    for _ in range(3):
        pages.get_all()
    assert core(daemon)["zv"]["curr_pages"] == (100 if returns == "true" else 0)


@pytest.mark.parametrize("encrypt", ["true", "false"])
def test_damage_on_the_disk_is_an_error_for_its_reader_and_nobody_else(
    stage: Stage, store: Path, encrypt: str
) -> None:
    daemon = stage.daemon(
        "64M", backing__path=str(store), memory__reserve="8M", backing__encrypt=encrypt
    )
    pages = Pages(daemon)
    pages.put(range(100))
    daemon.ctl("writeback")
    with store.open("r+b") as file:
        plain = page("half", 41, PAGE)[:64] in file.read()
        file.seek(DATA_AT + 40 * PAGE + 1000)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    assert plain is (encrypt == "false")
    with pytest.raises(OSError, match="Input/output error"):
        pages.get(40)
    for number in [
        *range(0, 40, 2),
        *range(42, 100, 2),
        *range(1, 100, 2),
    ]:  # not in order, so nothing is read ahead
        pages.get(number)
    assert core(daemon)["backed"][0]["bad_slots"] == 1
    pages.close()


def test_two_files_share_a_store_and_never_a_slot(stage: Stage, store: Path) -> None:
    daemon = stage.daemon(
        "4M", backing__path=str(store), memory__reserve="8M", swap__files__other="4M"
    )
    both = [Pages(daemon), Pages(daemon, daemon.file.parent / "other")]
    both[0].put(range(1000))
    both[1].put(range(1000), "words")
    assert daemon.ctl_json("writeback")["written_back"] == 2000
    assert on_disk(daemon) == 2000
    for pages in both:
        pages.get_all()
        pages.close()


def test_successors_of_every_kind_find_what_is_on_the_disk(pages: Pages) -> None:
    daemon = pages.daemon
    pages.put(range(COUNT))
    daemon.ctl("writeback", "--pages", str(COUNT // 2))
    for takeover in ("worker", "upgrade"):
        before = daemon.worker_pid()
        if takeover == "worker":
            os.kill(before, 9)
        else:
            daemon.ctl("upgrade")
        wait_for(lambda before=before: daemon.worker_pid() != before, "nobody takes over", 20)  # type: ignore[misc]
        assert on_disk(daemon) == COUNT // 2
        pages.get_all()
    assert core(daemon)["backed"][0]["bad_slots"] == 0
