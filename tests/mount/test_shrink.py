# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache of a real daemon gives memory back to the system.

It does so by command, and readers go on with the same data.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.swap import Stage, stage, wait_for
from tools.bench.harness.daemon import Daemon

__all__ = ["stage"]

MIB = 1 << 20
SIZE = 48 * MIB


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    """48 MiB of pages that compress to a third, no two alike."""
    path = tmp_path / "slow"
    content = b"".join(os.urandom(1300) + bytes(4096 - 1300) for _ in range(SIZE // 4096))
    path.write_bytes(content)
    return content


@pytest.fixture(params=["zsmalloc,zbud", "zbud,zsmalloc"])
def daemon(request: pytest.FixtureRequest, stage: Stage, tmp_path: Path, data: bytes) -> Daemon:
    settings = {
        "memory.reserve": "8M",
        "cache.limit": "64M",
        "cache.volumes.disk": str(tmp_path / "slow"),
    }
    settings["pool.allocator"], settings["cache.allocator"] = request.param.split(",")
    return stage.daemon(
        "64M", **{name.replace(".", "__"): value for name, value in settings.items()}
    )


def read(daemon: Daemon) -> bytes:
    """Read the volume, past the kernel's page cache."""
    with (daemon.mountpoint / "cache/disk").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def fill(daemon: Daemon) -> int:
    """Have the cache hold frames and return how many.

    Refills come after the readers, so one reading may not do.
    """

    def frames() -> int:
        read(daemon)
        return int(daemon.ask("stats")["core"]["cache"]["frames"])

    wait_for(lambda: frames() * 4096 > 12 * MIB, "the cache does not fill")
    return int(daemon.ask("stats")["core"]["cache"]["frames"])


def test_shrink_gives_memory_back_and_readers_do_not_notice(daemon: Daemon, data: bytes) -> None:
    before = fill(daemon)
    core = daemon.ask("stats")["core"]
    backed = core["arena_backed_bytes"]
    kept = max(
        0, core["frames"]["reserve_target_frames"] - core["frames"]["free_frames"]
    )  # what swap's reserve lacks
    report = daemon.ctl_json("shrink", str(before // 2))
    assert before // 2 <= report["frames"] <= before // 2 + 16
    assert report["left"] == before - report["frames"]
    after = daemon.ask("stats")
    assert backed - after["core"]["arena_backed_bytes"] > 0.9 * (report["frames"] - kept) * 4096
    assert after["shrinker"]["shrinks"]["command"] == 1
    assert read(daemon) == data
    assert daemon.ctl_json("shrink", str(10**9))["left"] == 0
    assert read(daemon) == data


def test_a_lower_limit_is_kept_at_run_time(daemon: Daemon, data: bytes) -> None:
    fill(daemon)
    (daemon.mountpoint / "params/cache.limit").write_text("4M")
    stats = daemon.ask("stats")
    assert stats["shrinker"]["ceiling_frames"] == stats["shrinker"]["limit_frames"] == 1024

    def frames() -> int:
        assert read(daemon) == data
        return int(daemon.ask("stats")["core"]["cache"]["frames"])

    wait_for(lambda: frames() <= 1024, "the cache stays above its limit")
