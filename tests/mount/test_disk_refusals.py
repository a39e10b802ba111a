# SPDX-License-Identifier: GPL-2.0-or-later
"""What cannot stand behind the pool, and limits that make no sense.

The real programs refuse them, with the reason and the fix.

A device that is made of our own file, `tests/unit/core/backing/test_store.py` has.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import baddisk
from tests.support.capabilities import requires_loop, requires_swap
from tests.support.mounting import loop_device
from tests.support.strategies import page
from tests.support.swap import Stage, stage, wait_for
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import HarnessError
from zswapd.config.loader import memory_total

__all__ = ["stage"]
pytestmark = pytest.mark.mount

MIB = 1 << 20


def refusal(
    tmp_path: Path, path: Path | str, *, size: str = "16M", mountpoint: Path | None = None
) -> str:
    """Start a daemon that has to refuse; return its message, and check that nothing is left."""
    daemon = Daemon(
        size=size, settings={"backing.path": str(path), "memory.reserve": "4M"}, parent=tmp_path
    )
    daemon.mountpoint = mountpoint or daemon.mountpoint
    try:
        with pytest.raises(HarnessError) as caught:
            daemon.start()
        assert not daemon.socket.exists()
        return str(caught.value)
    finally:
        daemon.stop()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with loop_device(image) as device:
        yield device


@requires_loop()
def test_a_device_smaller_than_the_swap(tmp_path: Path, small: Path) -> None:
    said = refusal(tmp_path, small)
    assert f"{small} has {16 * MIB} bytes, the swap files need {17 * MIB}" in said
    assert "use a larger device or less swap" in said


def test_a_path_in_the_mount_itself(tmp_path: Path) -> None:
    said = refusal(tmp_path, tmp_path / "mnt/swap", mountpoint=tmp_path / "mnt")
    assert "below fuse.mountpoint" in " ".join(said.split())
    assert "outside of the mountpoint" in said


@requires_swap()
def test_a_device_that_swaps_onto_a_zswapd(stage: Stage, tmp_path: Path) -> None:
    daemon = stage.daemon("64M", memory__reserve="8M")
    device = daemon.swapon()
    said = refusal(tmp_path, device)
    assert f"{device} cannot be opened" in said
    assert "swapped on" in said
    daemon.swapoff()


@requires_loop()
@pytest.mark.skipif(bool(baddisk.missing()), reason=f"not installed: {baddisk.missing()}")
def test_a_device_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with baddisk.bad_disk(tmp_path / "disk", 17) as disk:
        for errors, what in ((disk.read_errors, "read"), (disk.write_errors, "written")):
            errors.touch()
            said = refusal(tmp_path, disk.device)
            assert f"backing.path {disk.device} cannot be {what}: Input/output error" in said
            assert "choose another" in said
            errors.unlink()


@requires_loop()
def test_a_device_with_a_file_system_unless_forced(tmp_path: Path, small: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(small)], check=True, capture_output=True, timeout=30)
    said = refusal(tmp_path, small, size="8M")
    assert "carries a signature: ext4" in said
    assert "wipefs" in said


def test_a_file_that_is_removed_while_it_is_in_use_goes_on(stage: Stage, tmp_path: Path) -> None:
    store = tmp_path / "store"
    daemon = stage.daemon("64M", memory__reserve="8M", pool__limit="2M", backing__path=str(store))
    pages = [page("half", number, 4096) for number in range(2000)]
    with daemon.file.open("r+b", buffering=0) as file:
        for number, data in enumerate(pages):
            if number == 1000:
                store.unlink()
            os.pwrite(file.fileno(), data, number * 4096)
        assert all(
            os.pread(file.fileno(), 4096, number * 4096) == data
            for number, data in enumerate(pages)
        )
    assert daemon.ask("stats")["core"]["transfers"]["bd_reads"] > 100


def test_a_limit_below_what_is_used_sends_the_rest_to_the_disk(
    stage: Stage, tmp_path: Path
) -> None:
    daemon = stage.daemon("64M", memory__reserve="16M", backing__path=str(tmp_path / "store"))
    frames = daemon.ask("stats")["core"]["frames"]
    assert frames["limit_frames"] == memory_total() // 4096 // 5, (
        "20% of memory, if nothing is said"
    )
    pages = [page("half", number, 4096) for number in range(3000)]
    with daemon.file.open("r+b", buffering=0) as file:
        for number, data in enumerate(pages):
            os.pwrite(file.fileno(), data, number * 4096)
        assert daemon.ask("stats")["core"]["frames"]["used_frames"] > 1400
        daemon.ctl("set", "pool.limit=2M")
        wait_for(
            lambda: daemon.ask("stats")["core"]["frames"]["used_frames"] <= 512,
            "the pool stays above its limit",
        )
        assert daemon.ask("stats")["core"]["writeback"]["by_limit"] > 1500
        assert all(
            os.pread(file.fileno(), 4096, number * 4096) == data
            for number, data in enumerate(pages)
        )


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("pool.limit=0", "write for example 2G"),
        ("pool.limit=100", "write 4096 or more"),
        ("pool.limit=-1G", "write for example 2G"),
        ("pool.limit=200%", "at most 100%"),
        ("pool.accept_threshold_percent=0", "from 1 to 100"),
        ("pool.accept_threshold_percent=101", "from 1 to 100"),
        ("pool.zv_page_count_policy_percent=151", "from 1 to 150"),
        ("backing.budget=-5", "write for example 2G"),
        ("backing.idle_age=-1", "from 0 to"),
        ("backing.incompressible_limit=x", "write for example 2G"),
        ("backing.incompressible_limit=200%", "at most 100%"),
    ],
)
def test_a_limit_out_of_range_is_refused_and_changes_nothing(
    shared: Daemon, setting: str, fix: str
) -> None:
    before = shared.ask("get")
    with pytest.raises(HarnessError) as caught:
        shared.ctl("set", "pool.compressor=lzo", setting)
    assert fix in str(caught.value)
    assert shared.ask("get") == before


def test_a_limit_beyond_the_memory_is_refused_at_the_start(tmp_path: Path) -> None:
    daemon = Daemon(
        size="16M", settings={"memory.reserve": "4M", "pool.limit": "200%"}, parent=tmp_path
    )
    try:
        with pytest.raises(HarnessError) as caught:
            daemon.start()
    finally:
        daemon.stop()
    assert "--set: pool.limit is" in str(caught.value)
    assert "at most 100%" in str(caught.value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("shared")
    settings = {"memory.reserve": "8M", "backing.path": str(directory / "store")}
    with Daemon(size="64M", settings=settings, parent=directory) as daemon:
        yield daemon
