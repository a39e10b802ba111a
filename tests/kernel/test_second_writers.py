# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap: no other program may change the file meanwhile, in whatever way;
and what swapoff by hand leaves goes.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.swap import Stage, next_worker, wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(120)]


def assert_closed_to_writers(file: Path) -> None:
    """Try every way to change the file."""
    reader = os.open(file, os.O_RDONLY)
    place = os.open(file, os.O_PATH)
    try:
        for path in (file, Path(f"/proc/self/fd/{reader}"), Path(f"/proc/self/fd/{place}")):
            for flags in (
                os.O_WRONLY,
                os.O_RDWR,
                os.O_RDWR | os.O_DIRECT,
                os.O_WRONLY | os.O_TRUNC,
            ):
                with pytest.raises(OSError, match=r"Text file busy|not permitted") as caught:
                    os.open(path, flags)
                assert caught.value.errno == (errno.EPERM if flags & os.O_TRUNC else errno.ETXTBSY)
        assert len(os.pread(reader, 4096, 4096)) == 4096
    finally:
        os.close(reader)
        os.close(place)
    with pytest.raises(OSError, match="not permitted"):
        os.truncate(file, 0)
    for command in (
        ("dd", "if=/dev/urandom", f"of={file}", "bs=1M", "count=8", "conv=notrunc"),
        ("losetup", "--find", "--show", file),
        ("fallocate", "--punch-hole", "--length", "8MiB", file),
        ("mkswap", file),
        ("swapon", file),
        ("mv", file, f"{file}.old"),
        ("ln", file, f"{file}.old"),
        ("rm", "--force", file),
    ):
        done = subprocess.run(command, capture_output=True, check=False, timeout=20)
        assert done.returncode != 0, (command, done)


def stored_pages(daemon: Daemon) -> int:
    return int(daemon.ctl_json("status")["pool"]["stored_pages"])


def test_file_that_is_swapped_on_is_closed_to_all_other_writers(stage: Stage) -> None:
    daemon = stage.daemon(size="256M")
    daemon.swapon()
    workload = stage.workload(stage.cgroup(32), 64, "fill", "verify")
    phases = workload.phases()
    next(phases)
    assert_closed_to_writers(daemon.file)
    worker = daemon.worker_pid()
    os.kill(worker, signal.SIGKILL)
    next_worker(daemon, worker)
    assert_closed_to_writers(daemon.file)
    for phase in phases:
        assert phase.mismatches == 0
    assert daemon.ctl_json("stats")["fuse"]["refused_writers"] > 10
    daemon.swapoff()
    os.close(os.open(daemon.file, os.O_RDWR))


def test_program_that_has_the_file_open_for_writing_keeps_swapon_away(stage: Stage) -> None:
    daemon = stage.daemon(size="64M")
    writer = os.open(daemon.file, os.O_RDWR)
    try:
        with pytest.raises(system.HarnessError, match="open for writing"):
            daemon.swapon()
        assert daemon.loops() == []
    finally:
        os.close(writer)
    daemon.swapon()
    daemon.swapoff()


def fill(stage: Stage, daemon: Daemon) -> None:
    for phase in stage.workload(stage.cgroup(32), 64, "fill", "verify").phases():
        assert phase.mismatches == 0
    assert stored_pages(daemon) > 1000


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_what_swapoff_by_hand_leaves_goes(stage: Stage, dies: bool) -> None:
    daemon = stage.daemon(size="256M")
    device = daemon.swapon("--no-discard")
    fill(stage, daemon)
    if dies:
        worker = daemon.worker_pid()
        os.kill(worker, signal.SIGKILL)
        next_worker(daemon, worker)
    system.run("swapoff", device)
    wait_for(lambda: stored_pages(daemon) == 0, "pages stay")
    wait_for(lambda: not daemon.loops(), "the loop device stays")
    daemon.swapon("--no-discard")
    fill(stage, daemon)
    daemon.swapoff()


def test_what_swapoff_leaves_on_a_loop_device_that_stays_goes_but_for_its_header(
    stage: Stage,
) -> None:
    daemon = stage.daemon(size="256M")
    device = system.run(
        "losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", daemon.file
    ).strip()
    try:
        system.run("mkswap", device)
        for _ in range(2):
            system.run("swapon", "--priority", str(system.HIGHEST_PRIORITY), device)
            fill(stage, daemon)
            system.run("swapoff", device)
            wait_for(lambda: stored_pages(daemon) == 1, "pages stay")
        system.run(
            "dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=2", "seek=4", "oflag=direct"
        )
        kept = stored_pages(daemon)
    finally:
        system.run("losetup", "--detach", device)
    wait_for(lambda: not daemon.loops(), "the loop device stays")
    assert stored_pages(daemon) == kept > 500, "no swap area is on the file"
