# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon in a memory cgroup with a limit, as in a container or under MemoryMax=.

It never swaps here: a daemon that waits for its own swap device cannot be killed. What is stored is
written to the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounting import is_mounted
from tests.support.swap import wait_for
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.daemon import program
from zswapd.errors import ConfigError
from zswapd.swapdevice import find_attached

MIB = 1 << 20
LIMIT_S = 60


class Confined:
    """A daemon in a cgroup.

    Args:
        cgroup: where it runs.
        directory: for its mountpoint and socket.
        options: of `zswapd run`.
    """

    def __init__(self, cgroup: MemoryCgroup, directory: Path, *options: str) -> None:
        self.cgroup = cgroup
        self.mountpoint, self.socket = directory / "mnt", directory / "sock"
        self.log = directory / "log"
        settings = {
            "control.socket": self.socket,
            "metrics.listen": "",
            "fuse.mountpoint": self.mountpoint,
        }
        sets = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        # Without PR_SET_IO_FLUSHER, which needs this capability, its allocations would swap.
        enter = (
            f"echo $$ > {cgroup.path}/cgroup.procs && exec setpriv --bounding-set -sys_resource"
            ' --inh-caps -sys_resource "$@"'
        )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "timeout",
                    "--kill-after=5",
                    "120",
                    "sh",
                    "-c",
                    enter,
                    "sh",
                    *program("zswapd"),
                    "run",
                    *sets,
                    *options,
                ],
                stdout=log,
                stderr=log,
            )

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run zswapctl, outside of the cgroup."""
        command = [*program("zswapctl"), "--socket", str(self.socket), "--json", *words]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT_S)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.ctl("status").stdout)
        return status

    def protection(self) -> dict[str, Any]:
        """Return what it says of limits."""
        return next(item for item in self.status()["protections"] if item["name"] == "memory_limit")

    def wait_until_ready(self) -> None:
        wait_for(
            lambda: "ready: serving" in self.log.read_text() or self.process.poll() is not None,
            "not ready",
            LIMIT_S,
        )
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LIMIT_S)
        self.process.kill()
        self.process.wait()
        print(self.log.read_text())


@contextlib.contextmanager
def confined(mib: int, directory: Path, *options: str) -> Iterator[Confined]:
    with MemoryCgroup(f"daemon{mib}", mib * MIB) as cgroup:
        daemon = Confined(cgroup, directory, *options)
        try:
            yield daemon
        finally:
            daemon.stop()


def fill(path: Path, mib: int) -> int:
    """Write noise, a page a time, until it is refused or `mib` MiB are there;
    return the pages that were taken.
    """
    taken = 0
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for number in range(mib * MIB // 4096):
            try:
                os.pwrite(descriptor, os.urandom(4096), number * 4096)
            except OSError:
                break
            taken += 1
    finally:
        os.close(descriptor)
    return taken


@pytest.mark.kernel
@pytest.mark.mount
def test_daemon_in_a_cgroup_bounds_its_pool_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with confined(320, tmp_path, "--size", "1G", "--set", "memory.reserve=16M") as daemon:
        daemon.wait_until_ready()
        limit = daemon.status()["memory_limit"]
        assert limit["limit_bytes"] == 320 * MIB
        assert limit["file"].startswith(str(daemon.cgroup.path))

        taken = fill(daemon.mountpoint / "swap", 400)

        assert 8 * MIB // 4096 < taken < 400 * MIB // 4096
        for _ in range(3):  # later stores are refused as well, and no process is killed
            fill(daemon.mountpoint / "swap", 400)
            time.sleep(0.3)
        status = daemon.status()
        used = status["pool"]["frames"] * 4096
        assert used <= status["pool"]["limit_bytes"] + MIB
        assert used + status["pool"]["reserve_bytes"] < 320 * MIB
        assert status["memory_limit"]["left_bytes"] > 8 * MIB
        assert sum(status["pool"]["refused"].values()) > 0
        assert daemon.cgroup.oom_kills() == 0
        assert (status["worker"]["number"], status["worker"]["deaths"]) == (1, 0)


@pytest.mark.kernel
@pytest.mark.mount
def test_swapon_is_refused_where_the_daemon_would_swap_to_itself(tmp_path: Path) -> None:
    options = ("--size", "64M", "--set", "memory.reserve=8M")
    with confined(256, tmp_path, *options) as daemon:
        daemon.wait_until_ready()
        assert not daemon.protection()["on"]

        refused = daemon.ctl("swapon")

        assert refused.returncode == 8
        error = json.loads(refused.stdout)["error"]
        assert str(daemon.cgroup.path) in error["message"]
        hint = error["hint"].partition(";")[0]
        assert find_attached(daemon.mountpoint / "swap") is None
        subprocess.run(["sh", "-c", hint], check=True, timeout=LIMIT_S)  # the next command to type
        assert daemon.protection()["on"]


@pytest.mark.kernel
@pytest.mark.mount
def test_a_limit_that_is_set_while_it_runs_counts(tmp_path: Path) -> None:
    with confined(4096, tmp_path, "--size", "1G", "--set", "memory.reserve=16M") as daemon:
        daemon.wait_until_ready()
        before = daemon.status()["pool"]["limit_bytes"]
        daemon.cgroup.set_limit(320 * MIB)
        wait_for(
            lambda: daemon.status()["pool"]["limit_bytes"] < 320 * MIB < before,
            "the limit is not seen",
        )
        daemon.cgroup.set_limit(4096 * MIB)
        wait_for(
            lambda: daemon.status()["pool"]["limit_bytes"] == before, "the limit is still seen"
        )


@pytest.mark.kernel
@pytest.mark.mount
@pytest.mark.parametrize(
    ("mib", "options"),
    [
        (128, ()),
        (256, ("--set", "memory.reserve=180M")),
        (512, ("--size", "512G")),
        (512, ("--size", "200000%")),
    ],
)
def test_what_does_not_fit_a_limit_is_refused_before_anything_is_made(
    mib: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    with confined(mib, tmp_path, *options) as daemon:
        assert daemon.process.wait(LIMIT_S) == ConfigError.exit_code
        log = daemon.log.read_text()
        assert "memory" in log
        assert "hint:" in log
        assert daemon.cgroup.oom_kills() == 0
        assert not is_mounted(daemon.mountpoint)
        assert {path.name for path in tmp_path.iterdir()} == {"log"}
        enter = f'echo $$ > {daemon.cgroup.path}/cgroup.procs && exec "$@"'
        check = [*program("zswapd"), "config", "check", *options]
        done = subprocess.run(
            ["sh", "-c", enter, "sh", *check],
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == ConfigError.exit_code, done.stdout
        assert done.stderr.splitlines()[0].removeprefix("zswapd: error: ") in log
