# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon of the release before, swapped on.

This program takes its place, and this zswapctl talks to it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.release import TOP, Installed, release_before
from tests.support.swap import Stage, load, next_worker, wait_for
from tests.support.swapped import Swapped
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon, program
from zswapd.errors import ConfigError, ControlError, HandoverError, SwapDeviceError

__all__ = ["release_before"]
pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(240)]

NOISE = 1024
"""Pages of a process beside the load, none of which compresses."""
Start = Callable[..., Daemon]


@pytest.fixture
def installed(tmp_path: Path, release_before: Path) -> Installed:
    """Return the place of the installed program, which is the release before."""
    return Installed(tmp_path / "installed", release_before)


@pytest.fixture
def start(stage: Stage, installed: Installed, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return a function that starts a daemon of the installed program.

    All other programs are this checkout's.
    """

    def begin(size: str, **settings: str) -> Daemon:
        monkeypatch.setenv("PYTHONPATH", str(installed.link))
        daemon = stage.daemon(size, **settings)
        monkeypatch.setenv("PYTHONPATH", str(TOP))
        assert runs(daemon, installed.link)
        return daemon

    return begin


def runs(daemon: Daemon, tree: Path) -> bool:
    """Say whether supervisor and worker have a tree's program in memory, and no other one."""
    libraries = {
        line.split()[-1]
        for pid in (daemon.pid, daemon.worker_pid())
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/zswapd/" in line and line.endswith(".so")
    }
    assert libraries
    return all(name.startswith(f"{tree.resolve()}/zswapd/") for name in libraries)


def refusal(daemon: Daemon, *words: str) -> tuple[int, str]:
    """Return the exit code of a zswapctl that fails, and what it says."""
    command = [*program("zswapctl"), "--socket", str(daemon.socket), *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return done.returncode, done.stderr


def by_command(daemon: Daemon) -> None:
    daemon.ctl("upgrade")


def by_reload(daemon: Daemon) -> None:
    old = daemon.worker_pid()
    os.kill(daemon.pid, signal.SIGHUP)
    next_worker(daemon, old)


def pages_on_disk(daemon: Daemon) -> int:
    """Return how many pages are in slots of the disk."""
    return sum(device["bd_count"] for device in daemon.ask("stats")["core"]["backed"])


@pytest.mark.parametrize(
    ("settings", "upgrade"),
    [
        ({}, by_command),
        ({"pool__limit": "8M", "service__spare": "true", "pool__checksum": "false"}, by_reload),
    ],
    ids=["default", "disk, spare, no checksums"],
)
def test_this_program_takes_over_a_swapped_on_daemon_of_the_release_before(
    stage: Stage,
    installed: Installed,
    start: Start,
    tmp_path: Path,
    settings: dict[str, str],
    upgrade: Callable[[Daemon], None],
) -> None:
    on_disk = {"backing__path": str(tmp_path / "store")} if settings else {}
    daemon = start("512M", **settings, **on_disk)
    daemon.swapon()
    cgroup = stage.cgroup(40)
    with load(stage, mib=96, cgroup=cgroup) as finish, Swapped(stage.cgroup(64), NOISE) as noise:
        noise.swap_out()
        assert noise.read(range(NOISE)) == []
        noise.swap_out()
        assert bool(pages_on_disk(daemon)) == bool(on_disk)
        before = daemon.ask("stats")

        installed.exchange(TOP)
        upgrade(daemon)

        assert runs(daemon, TOP)
        after = daemon.ask("stats")
        assert after["core"]["recovery"]["recovered_pages"] > 1000
        assert after["core"]["recovery"]["damaged"] == 0
        assert (
            after["core"]["frontswap"]["succ_stores"]
            >= before["core"]["frontswap"]["succ_stores"]
            > 0
        )
        assert noise.read(range(NOISE)) == []
        noise.swap_out()

        old = daemon.worker_pid()
        os.kill(old, signal.SIGKILL)
        next_worker(daemon, old)
        assert noise.read(range(NOISE)) == []
        assert finish() == 0

        assert bool(pages_on_disk(daemon)) == bool(on_disk)
        stats = daemon.ask("stats")
        assert stats["fuse"]["request_errors"] == stats["fuse"]["refused_writes"]
        cgroup.set_limit(256 * system.MIB)
        daemon.swapoff()  # with the pages of both
        assert noise.read(range(NOISE)) == []
    assert daemon.loops() == []
    wait_for(lambda: daemon.ask("status")["pool"]["stored_pages"] == 0, "pages are left")


def test_this_zswapctl_works_with_a_daemon_of_the_release_before(
    stage: Stage, installed: Installed, start: Start
) -> None:
    daemon = start("256M")
    device = daemon.swapon()
    cgroup = stage.cgroup(24)
    phases = stage.workload(cgroup, 64, "fill", "verify").phases()
    next(phases)

    status = daemon.ctl("status")
    assert f"zswapd {daemon.ask('status')['version']}, pid {daemon.pid}, serving" in status
    assert device in status
    report = daemon.ctl_json("status")
    assert report["pool"]["stored_pages"] > 1000
    assert "memory_limit" not in report, "or else this is not the release before"
    for command in (
        "stats",
        "top --once",
        "get",
        "set pool.limit=128M",
        "reset --all",
        "compact",
        "pages swap",
    ):
        assert daemon.ctl(*command.split())
    for command, code, words in (
        ("get pool.nosuch", ConfigError.exit_code, "unknown setting pool.nosuch"),
        ("set pool.limit=much", ConfigError.exit_code, "pool.limit is"),
        ("pages nosuch", ControlError.exit_code, "nosuch"),
        ("swapoff nosuch", SwapDeviceError.exit_code, "nosuch"),
    ):
        assert refusal(daemon, *command.split())[0] == code, command
        assert words in refusal(daemon, *command.split())[1]

    cgroup.set_limit(256 * system.MIB)
    daemon.swapoff()
    assert daemon.loops() == []
    assert [phase.mismatches for phase in phases] == [0]
    daemon.swapon()
    daemon.swapoff()
    assert runs(daemon, installed.link)


def test_the_release_before_is_refused_where_it_cannot_take_over_from_this_program(
    start: Start, installed: Installed, release_before: Path
) -> None:
    installed.exchange(TOP)
    daemon = start("64M", memory__reserve="8M")
    page = os.urandom(4096)
    with daemon.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), page, 4096)
    old = daemon.worker_pid()
    installed.exchange(release_before)

    code, words = refusal(daemon, "upgrade")

    assert code == HandoverError.exit_code
    assert re.search(r"error: the installed program cannot take over: .*layout", words)
    assert "hint: " in words
    assert daemon.worker_pid() == old
    with daemon.file.open("rb", buffering=0) as swap:
        assert os.pread(swap.fileno(), 4096, 4096) == page
