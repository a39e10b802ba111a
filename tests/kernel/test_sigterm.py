# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGTERM while swapped on: swapoff first, and where that cannot fit, go on serving. Never take the data along."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scripts.zbench import system
from scripts.zbench.system import MIB, HarnessError
from tests.support.swap import Stage, wait_for
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


def test_sigterm_without_room_goes_on_serving(stage: Stage) -> None:
    daemon = stage.daemon()
    device = daemon.swapon()
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 192, "fill", "verify", "rewrite", "verify").phases()
    next(phases)

    os.kill(daemon.pid, signal.SIGTERM)
    end = time.monotonic() + 10
    while "SIGTERM" not in daemon.log_text() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)

    assert daemon.alive()
    assert system.is_swap(device)
    assert daemon.ctl_json("status")["state"] == "serving"
    assert [phase.mismatches for phase in phases] == [0, 0, 0]
    assert cgroup.oom_kills() == 0


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
