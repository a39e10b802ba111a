# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGTERM while swapped on: swapoff first, and where that cannot fit, go on serving.

Never take the data along.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.swap import Stage, next_worker, wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import MIB, HarnessError
from zswapd.swapdevice.kernel import Kernel
from zswapd.swapdevice.state import Identity, find_attached

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(120)]


def test_sigterm_with_room_swaps_off_and_exits_cleanly(stage: Stage) -> None:
    daemon = stage.daemon()
    device = daemon.swapon()
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 192, "fill", "verify", "rewrite", "verify").phases()
    next(phases)
    assert daemon.pool_sample().pages > 0
    cgroup.set_limit(512 * MIB)

    assert daemon.terminate() == 0

    assert not system.is_swap(device)
    assert daemon.loops() == []
    assert system.mounts_below(daemon.directory) == []
    assert [phase.mismatches for phase in phases] == [0, 0, 0]


def room_elsewhere(device: str) -> int:
    """Bytes that the machine's other swap has left: there is always room for what fits in there."""
    return sum(area.size - area.used for area in system.swaps() if area.path != device)


def test_sigterm_without_room_goes_on_serving(stage: Stage) -> None:
    daemon = stage.daemon()
    device = daemon.swapon()
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 192, "fill", "verify", "rewrite", "verify").phases()
    next(phases)

    room = room_elsewhere(device) > 192 * MIB
    os.kill(daemon.pid, signal.SIGTERM)
    wait_for(
        lambda: (
            "not stopping, the data has nowhere to go" in daemon.log_text() or not daemon.alive()
        ),
        "no answer",
    )

    if room:
        assert daemon.wait_for_end() == 0
    else:
        assert system.is_swap(device)
        assert daemon.ctl_json("status")["state"] == "serving"
    assert [phase.mismatches for phase in phases] == [0, 0, 0]
    assert cgroup.oom_kills() == 0
    cgroup.set_limit(512 * MIB)
    assert room or daemon.terminate() == 0
    assert not system.is_swap(device)


def test_sigterm_while_a_file_is_in_other_use_goes_on_serving(stage: Stage) -> None:
    daemon = stage.daemon(swap__files__second="64M")
    device = daemon.swapon("swap")
    other = system.attach_loop(daemon.mountpoint / "second")  # what is in there, we do not know
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 192, "fill", "verify", "rewrite", "verify").phases()
    next(phases)

    os.kill(daemon.pid, signal.SIGTERM)
    wait_for(lambda: "not stopping, the data has nowhere to go" in daemon.log_text(), "not refused")

    assert system.is_swap(device)
    assert daemon.ctl_json("status")["state"] == "serving"
    assert [phase.mismatches for phase in phases] == [0, 0, 0]
    assert cgroup.oom_kills() == 0

    system.detach_loop(other)
    cgroup.set_limit(512 * MIB)
    assert daemon.terminate() == 0
    assert not system.is_swap(device)


def test_file_cannot_be_swapped_on_while_another_one_is_taken_back(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "bin/swapoff"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {shutil.which("swapoff")} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    daemon = stage.daemon(size="64M", swap__files__second="64M")
    device = daemon.swapon("swap")

    os.kill(daemon.pid, signal.SIGTERM)
    wait_for(lambda: daemon.ask("status")["state"] == "stopping", "it does not stop")
    with pytest.raises(HarnessError, match="the daemon is stopping"):
        daemon.ctl("swapon", "second")
    with pytest.raises(OSError, match="busy"):
        (daemon.mountpoint / "second").open("rb")

    assert daemon.wait_for_end() == 0
    assert not system.is_swap(device)
    assert daemon.loops() == []


def test_sigterm_after_the_mount_was_detached_swaps_off_all_the_same(stage: Stage) -> None:
    daemon = stage.daemon(size="64M")
    file = daemon.file.stat()
    device = daemon.swapon()
    try:
        subprocess.run(["umount", "--lazy", daemon.mountpoint], check=True)
        assert daemon.loops() == []  # by the path that it had
        what = Identity(file.st_dev, file.st_ino)
        found = find_attached(daemon.file, identity=what, kernel=Kernel())
        assert found is not None
        assert (found.device, found.backing) == (device, Path("/swap"))
        daemon.ctl("upgrade")  # the next program cannot look it up any more

        assert daemon.terminate(limit=20) == 0

        assert not system.is_swap(device)
        assert find_attached(daemon.file, identity=what, kernel=Kernel()) is None
    finally:
        if system.is_swap(device):
            system.swap_off(device)


def test_sigterm_when_not_swapped_on_exits_cleanly(stage: Stage) -> None:
    daemon = stage.daemon(size="64M")

    assert daemon.terminate(limit=20) == 0

    assert system.mounts_below(daemon.directory) == []


def test_a_loop_device_of_a_stranger_with_any_name_is_no_obstacle(
    stage: Stage, tmp_path: Path
) -> None:
    daemon = stage.daemon(size="64M")
    image = os.fsencode(tmp_path) + b"/na\xefve.img"
    with open(image, "wb") as file:
        file.truncate(MIB)
    attach = [b"losetup", b"--find", b"--show", image]
    other = (
        subprocess.run(attach, check=True, capture_output=True, timeout=20).stdout.decode().strip()
    )
    try:
        daemon.swapon()
        assert daemon.ctl_json("status")["files"][0]["device"]
        assert daemon.terminate(limit=20) == 0
        assert daemon.log_text().count(" died") == 0
    finally:
        subprocess.run(["losetup", "--detach", other], check=True, timeout=20)


def test_a_swapoff_that_cannot_even_be_tried_is_a_reason_to_go_on_serving(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/swapoff").touch(mode=0o644)  # no user can execute it
    with monkeypatch.context() as broken:
        broken.setenv("PATH", str(tmp_path / "bin"))
        daemon = stage.daemon(size="64M")
    device = daemon.swapon()
    worker = daemon.worker_pid()

    os.kill(daemon.pid, signal.SIGTERM)

    wait_for(
        lambda: "not stopping, swapoff cannot be tried: PermissionError" in daemon.log_text(),
        "not refused",
    )
    assert daemon.ask("status")["state"] == "serving"
    assert daemon.worker_pid() == worker
    assert system.is_swap(device)


def test_a_mountpoint_that_is_a_link_is_known_by_both_names(tmp_path: Path) -> None:
    link = tmp_path / "link"
    daemon = Daemon(
        size="64M",
        settings={"cache.limit": "32M"},
        arguments=["--mountpoint", str(link)],
        parent=tmp_path,
    )
    link.symlink_to(daemon.mountpoint)
    slow = tmp_path / "slow"
    slow.write_bytes(b"abc" * 4096)
    with daemon:
        daemon.ctl("cache", "add", "fast", "--backing", str(slow))
        assert (link / "cache/fast").read_bytes() == slow.read_bytes()
        device = daemon.swapon()
        assert daemon.ctl_json("status")["files"][0]["device"] == device
        with pytest.raises(system.HarnessError, match="swapped on already"):
            daemon.ctl("swapon", "swap")
        daemon.swapoff()
        device = daemon.swapon()
        link.unlink()  # whatever becomes of the name

        assert daemon.terminate() == 0

        assert not system.is_swap(device)
        assert daemon.loops() == []
        print(daemon.log_text())


def test_a_stop_that_was_refused_is_over(tmp_path: Path) -> None:
    """Weeks later a worker dies: a spare takes over, and it is not told to stop."""
    with Daemon(size="64M", parent=tmp_path, is_service=False) as daemon:
        device = system.attach_loop(daemon.file)  # no swap: nothing that we may switch off
        os.kill(daemon.pid, signal.SIGTERM)
        wait_for(lambda: "not stopping" in daemon.log_text(), "not refused")

        worker = daemon.worker_pid()
        os.kill(worker, signal.SIGKILL)
        next_worker(daemon, worker)

        def spares() -> list[int]:
            return [
                pid for pid in system.children(daemon.pid) if system.name(pid) == "zswapd-spare"
            ]

        wait_for(spares, "no spare")
        system.detach_loop(device)
        worker = daemon.worker_pid()
        os.kill(worker, signal.SIGKILL)
        next_worker(daemon, worker)
        time.sleep(1)

        assert daemon.alive()
        assert daemon.log_text().count("not stopping") == 1
        assert daemon.terminate() == 0
