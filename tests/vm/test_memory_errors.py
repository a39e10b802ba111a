# SPDX-License-Identifier: GPL-2.0-or-later
"""An uncorrectable error in the memory that the daemon's files lie in: it costs what lay there,
and one worker.

The kernel is told to take a page for damaged (MADV_HWPOISON, which needs CONFIG_MEMORY_FAILURE: of
the two kernels here only the new one has it). It then takes the page from all processes, and
a process that touches it gets SIGBUS, as with a real error.
"""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.vm.conftest import Boot
from tools.vm.guest import Box

SETTINGS = {
    "swap.size": '"64M"',
    "swap.files.more": '"32M"',
    "memory.reserve": '"16M"',
    "cache.limit": '""',
}
PAGES = 1500
SCRIPT = Path(__file__).with_name("poison.py")
LIMIT_S = 120.0
MOST_LOST = {
    "first": 60,
    "middle": 60,
    "body": 1,
    "free": 0,
    "table": PAGES,
    "superblock": 0,
    "marks": 0,
    "buffer": 1,
}
"""Pages that may be refused at most. A page of the frame table describes 256 frames."""
ARENA = ("first", "middle", "body", "free", "table", "superblock")


def guest(box: Box, *words: object) -> dict[str, Any]:
    """Run poison.py in the guest; return what it says."""
    report: dict[str, Any] = json.loads(
        box.run(f"python3 /run/poison.py {shlex.join(map(str, words))}", LIMIT_S)
    )
    return report


def worker(box: Box) -> dict[str, Any]:
    """Wait until the daemon answers; return what it says of its worker."""
    end = time.monotonic() + LIMIT_S
    while (done := box.machine.run("zswapctl --json status", LIMIT_S)).status != 0:
        assert time.monotonic() < end, box.machine.console_tail()
        time.sleep(0.5)
    report: dict[str, Any] = json.loads(done.output)["worker"]
    return report


def poisoned(box: Box) -> int:
    return int(box.ctl("stats")["core"]["recovery"]["poisoned"])


def replace_worker(box: Box) -> None:
    old = worker(box)
    box.run(f"kill -KILL {old['pid']}")
    end = time.monotonic() + LIMIT_S
    while worker(box)["pid"] == old["pid"]:
        assert time.monotonic() < end, "no worker follows"
        time.sleep(0.5)


def hold_to_it(box: Box, path: str, place: str) -> None:
    """Poison a page, and see what becomes of every page that was stored, of the daemon,
    and of the memory.
    """
    guest(box, "write", path, PAGES)
    before, deaths = poisoned(box), worker(box)["deaths"]
    guest(box, "poison", worker(box)["pid"], place)

    seen = guest(box, "read", path, PAGES)
    assert (seen["zeros"], seen["wrong"]) == (0, 0), place
    assert seen["refused"] <= MOST_LOST[place], place
    assert worker(box)["deaths"] <= deaths + 2, f"{place}: worker after worker dies"

    replace_worker(box)
    guest(box, "write", path, PAGES)
    assert guest(box, "read", path, PAGES)["right"] == PAGES, place
    deaths = worker(box)["deaths"]
    replace_worker(box)
    assert guest(box, "read", path, PAGES)["right"] == PAGES, place
    assert worker(box)["deaths"] == deaths + 1, place
    if place not in ("superblock", "marks", "buffer"):
        assert poisoned(box) == before + 1, place


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_successor_comes_up_over_every_kind_of_memory(boot: Boot) -> None:
    """The core alone: one process stores, others take over."""
    box = boot(memory_mib=768)
    box.run(f"cat > /run/poison.py <<'END'\n{SCRIPT.read_text()}\nEND")
    for place in ARENA:
        seen = guest(box, "core", "/opt/zvm/lib", place)
        assert seen["touched"] == {"signal": signal.SIGBUS}, place
        successor = seen["successor"]
        assert (successor["zeros"], successor["wrong"]) == (0, 0), (place, seen)
        assert successor["refused"] <= MOST_LOST[place], (place, seen)
        assert successor["poisoned"] == (place != "superblock"), (place, seen)
        assert seen["next"] == {
            "right": 1000,
            "refused": 0,
            "zeros": 0,
            "wrong": 0,
            "poisoned": 0,
        }, (place, seen)


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_memory_error_costs_what_lay_there_and_nothing_for_ever(boot: Boot) -> None:
    box = boot(memory_mib=768)
    box.run(f"cat > /run/poison.py <<'END'\n{SCRIPT.read_text()}\nEND")
    box.start(SETTINGS)
    path = f"{box.ctl('status')['mountpoint']}/more"
    for place in MOST_LOST:
        hold_to_it(box, path, place)
    assert "HardwareCorrupted:     0" not in box.run("cat /proc/meminfo")
