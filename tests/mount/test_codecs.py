# SPDX-License-Identifier: GPL-2.0-or-later
"""Codecs of a real daemon: they change while it runs.

Pages are recompressed by command and by age.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.strategies import page
from tests.support.swap import Stage, next_worker, stage, wait_for
from tools.bench.harness.daemon import Daemon
from zswapd.handover.state import LAYOUT_VERSION, LAYOUT_WITH_ZSTD

__all__ = ["stage"]
pytestmark = pytest.mark.mount

PAGE = 4096
COUNT = 300
KINDS = ("words", "pointers", "noise", "letters", "sparse")


def write(daemon: Daemon, first: int, count: int) -> None:
    with daemon.file.open("r+b", buffering=0) as file:
        for number in range(first, first + count):
            os.pwrite(file.fileno(), page(KINDS[number % 5], number, PAGE), number * PAGE)


def wrong(daemon: Daemon, count: int = COUNT) -> list[int]:
    with daemon.file.open("rb", buffering=0) as file:
        return [
            number
            for number in range(count)
            if os.pread(file.fileno(), PAGE, number * PAGE) != page(KINDS[number % 5], number, PAGE)
        ]


def layout(daemon: Daemon) -> int:
    """Return the layout of the shared state, which is one of the worker's open files.

    It says which programs may take over.
    """
    for link in Path(f"/proc/{daemon.worker_pid()}/fd").iterdir():
        if str(link.readlink()).endswith(" (deleted)"):
            with link.open("rb") as file:
                if file.read(8) == b"zswapd\0H":
                    return int.from_bytes(file.read(4), "little")
    raise AssertionError("no shared state")


def test_codec_is_switched_while_pages_are_stored_and_all_stay_readable(stage: Stage) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    for place, codec in enumerate(("lz4", "lzo", "zstd")):
        daemon.ctl("set", f"pool.compressor={codec}")
        write(daemon, place * 100, 100)
        assert wrong(daemon, place * 100 + 100) == []
    assert daemon.ask("status")["pool"]["compressor"] == "zstd"
    old = daemon.worker_pid()
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    assert wrong(daemon) == []
    assert daemon.ask("status")["pool"]["compressor"] == "zstd"
    write(daemon, 0, 100)
    assert wrong(daemon) == []


def test_pages_are_compressed_again_by_command_and_older_programs_are_shut_out(
    stage: Stage,
) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    write(daemon, 0, COUNT)
    before = daemon.ask("stats")["core"]["zv"]
    assert layout(daemon) == LAYOUT_VERSION
    report = daemon.ctl_json("recompress")
    assert layout(daemon) == LAYOUT_WITH_ZSTD
    after = daemon.ask("stats")["core"]["zv"]
    assert report["recompressed"] == after["recompressed"] >= 3 * COUNT // 5
    assert report["in_vain"] == COUNT // 5, "noise"
    assert before["curr_zbytes"] - after["curr_zbytes"] == report["saved_bytes"] > COUNT * 200
    assert wrong(daemon) == []
    old = daemon.worker_pid()
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    assert wrong(daemon) == []
    again = daemon.ctl_json("recompress")
    assert (again["recompressed"], again["in_vain"]) == (0, 0), "what was in vain is remembered"


def test_pages_that_grow_old_are_compressed_again_at_the_rate(stage: Stage) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    write(daemon, 0, COUNT)
    daemon.ctl("set", "pool.recompress_age=1")

    def tried() -> int:
        return int(daemon.ask("stats")["core"]["recompression"]["tried"])

    wait_for(tried, "nothing is done")
    assert tried() < COUNT, "all at once"
    wait_for(lambda: tried() >= COUNT * 4 // 5, "it does not go on")
    assert wrong(daemon) == []
    daemon.ctl("set", "pool.recompress_age=0")
