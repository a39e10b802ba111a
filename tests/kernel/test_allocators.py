# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap and a cache volume at once, over each allocator for either half.

While workers are killed.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.strategies import KINDS, page
from tests.support.swap import Stage, wait_for
from tools.bench.harness.system import MIB
from tools.torture import TorturePlan, torture

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(200)]

PAGE = 4096


def contents() -> bytes:
    """Return 16 MiB of pages of all kinds, some of which the cache does not take."""
    rng = random.Random(3)
    return b"".join(
        page(rng.choice(KINDS), rng.randrange(40), PAGE) for _ in range(16 * MIB // PAGE)
    )


@contextmanager
def reading(path: Path, data: bytes) -> Iterator[list[str]]:
    """Read pieces of a volume over and over in another thread, without the page cache.

    Yields what is wrong.
    """
    wrong: list[str] = []
    ended = threading.Event()

    def read() -> None:
        rng = random.Random(4)
        with path.open("rb", buffering=0) as file:
            while not ended.is_set() and not wrong:
                offset = rng.randrange(0, len(data), PAGE)
                try:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    found = os.pread(file.fileno(), 1 * MIB, offset)
                except OSError as error:
                    wrong.append(f"at {offset}: {error}")
                    return
                if found != data[offset : offset + len(found)] or not found:
                    wrong.append(f"at {offset}: other bytes")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield wrong
    finally:
        ended.set()
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("ephemeral", ["zbud", "zsmalloc"])
@pytest.mark.parametrize("persistent", ["zsmalloc", "zbud"])
def test_both_halves_go_on_when_workers_are_killed(
    stage: Stage, tmp_path: Path, persistent: str, ephemeral: str
) -> None:
    backing, data = tmp_path / "slow", contents()
    backing.write_bytes(data)
    settings = {"pool__allocator": persistent, "cache__limit": "10%", "cache__allocator": ephemeral}
    daemon = stage.daemon(size="256M", **settings)
    daemon.ctl("cache", "add", "slow", "--backing", str(backing))
    daemon.swapon()
    with reading(daemon.mountpoint / "cache" / "slow", data) as wrong:
        outcome = torture(TorturePlan(kills=4, data_mib=64, memory_mib=24, pause_s=0.5), daemon)
        wait_for(
            lambda: daemon.ask("stats")["core"]["cache"]["cleancache"]["succ_gets"] > 0,
            "no page was found in the cache",
        )
    assert outcome.good(), outcome.lines()
    assert outcome.kills == 4
    assert wrong == []
    core = daemon.ask("stats")["core"]
    for part, allocator in ((core, persistent), (core["cache"], ephemeral)):
        assert (part["zsmalloc"] is None, part["zbud"] is None) == (
            allocator == "zbud",
            allocator == "zsmalloc",
        )
    both = core[persistent]["used_frames"] + core["cache"][ephemeral]["used_frames"]
    assert both == core["frames"]["used_frames"]
    assert core["cache"][ephemeral]["used_frames"] == core["frames"]["ephemeral_frames"] > 0
    daemon.swapoff()
    assert daemon.ask("status")["pool"]["frames"] == 0
