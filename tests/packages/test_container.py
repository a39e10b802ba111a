# SPDX-License-Identifier: GPL-2.0-or-later
"""The package in a bare Debian, booted.

Installed by apt, started, upgraded, killed, stopped, removed, all by systemd.

Swap is this machine's, and so is its memory: nothing is swapped out here, and a decoy
(tests/support/decoy.py) sees to it that the kernel has no reason to. tests/vm swaps, and reboots.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import capabilities
from tests.support.decoy import decoy
from tools.deb.container import Container
from zswapd.errors import ConfigError

pytestmark = [pytest.mark.kernel, capabilities.requires_container()]

ONE_COMMAND_S = 10.0
LIMIT_S = 30.0
INSTALL = "apt-get install --yes --no-install-recommends"


@pytest.fixture(scope="module")
def booted(packages: Path) -> Iterator[Container]:
    with decoy(), Container(f"zswapd-test-{os.getpid()}", packages) as container:
        container.run(f"{INSTALL} /packages/first/*.deb")
        yield container


@pytest.fixture
def debian(booted: Container) -> Iterator[Container]:
    """The package's first revision as it is after installation: not running, not enabled."""
    booted.run(f"{INSTALL} --allow-downgrades /packages/first/*.deb")
    yield booted
    assert swapped_out(booted) == {}
    # What a test leaves must not fail the next one instead.
    booted.call(
        "rm -rf /etc/systemd/system/*.d /etc/zswapd/zswapd.toml.d && systemctl daemon-reload"
    )
    booted.call("systemctl disable --now zswapd.service; systemctl reset-failed")
    assert loops(booted) == []


@pytest.fixture
def swapping(debian: Container) -> Container:
    debian.run("systemctl enable --now zswapd.service")
    wait_for_swap(debian)
    return debian


def loops(container: Container) -> list[str]:
    """Loop devices on zswapd's file that are swapped on."""
    rows = container.run("losetup --noheadings --output NAME,BACK-FILE; echo; cat /proc/swaps")
    attached, _, swaps = rows.partition("\n\n")
    on = {line.split()[0] for line in swaps.splitlines()}
    return [
        line.split()[0]
        for line in attached.splitlines()
        if line.endswith("/run/zswapd/mnt/swap") and line.split()[0] in on
    ]


def swapped_out(container: Container) -> dict[str, int]:
    """Return what is on each of these devices, in KiB, where it is anything.

    Killing both processes would be no test then.
    """
    areas = (line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:])
    ours = loops(container)
    return {path: int(used) for path, _, _, used, _ in areas if path in ours and int(used)}


def wait_for_swap(container: Container, *, on: bool = True) -> None:
    end = time.monotonic() + LIMIT_S
    while bool(loops(container)) is not on:
        assert time.monotonic() < end, container.run(
            "journalctl --no-pager --lines=60; cat /proc/swaps"
        )
        time.sleep(0.05)


def status(container: Container) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(container.run("zswapctl status --json"))
    return report


def shown(container: Container, *names: str, unit: str = "zswapd.service") -> list[str]:
    text = container.run(
        f"systemctl show {unit} {' '.join(f'--property={name}' for name in names)}"
    )
    values = dict(line.split("=", 1) for line in text.splitlines())
    return [values[name] for name in names]


def swap_header(container: Container) -> str:
    """Read the signature of the swap area through loop device and daemon, past any cache."""
    (device,) = loops(container)
    return container.run(
        f"dd if={device} bs=4096 count=1 iflag=direct status=none | tail --bytes=10", 20
    )


def test_after_installation_it_is_there_but_off(debian: Container) -> None:
    assert debian.run("zswapd --version").startswith("zswapd ")
    assert debian.run("zswapd config check")
    assert shown(debian, "ActiveState", "UnitFileState") == ["inactive", "disabled"]
    assert (
        debian.run(
            "systemd-analyze verify --man=no zswapd.service zswapd-swap.service"
            " zswapd-hibernate.service"
        )
        == ""
    )
    assert debian.run("stat --format=%a /run/zswapd").strip() == "700"
    assert debian.call("command -v gcc cc").returncode != 0


def test_systemd_itself_is_not_swapped_out(debian: Container) -> None:
    """What it then asks of the kernel takes cgroup v2 with a memory controller.

    And that a machine of its own: tests/vm.
    """
    assert shown(debian, "MemorySwapMax", "DropInPaths", unit="init.scope") == [
        "0",
        "/usr/lib/systemd/system/init.scope.d/zswapd.conf",
    ]


def test_from_installed_to_swapped_on_in_one_command(debian: Container) -> None:
    begin = time.monotonic()
    debian.run("systemctl enable --now zswapd.service")
    wait_for_swap(debian)
    seconds = time.monotonic() - begin
    print(f"from installed to swapped on: {seconds:.1f} s")
    assert seconds < ONE_COMMAND_S
    assert status(debian)["state"] == "serving"
    assert shown(debian, "ActiveState", "UnitFileState", "WatchdogUSec") == [
        "active",
        "enabled",
        "30s",
    ]
    assert swap_header(debian) == "SWAPSPACE2"

    debian.run("systemctl disable --now zswapd.service")
    assert loops(debian) == []
    assert "zswapd /run/zswapd/mnt" not in debian.run("cat /proc/mounts")
    assert debian.run("find /etc/systemd/system -name 'zswapd*'") == ""

    said = debian.run("zswapctl status 2>&1 || :")
    assert "hint: start it with `systemctl start zswapd`" in said
    debian.run("systemctl mask --quiet zswapd.service")
    assert "`systemctl unmask zswapd && systemctl start zswapd`" in debian.run(
        "zswapctl status 2>&1 || :"
    )
    debian.run("systemctl unmask --quiet zswapd.service")


def test_a_mistake_in_the_settings_is_told_once_while_there_is_nothing_to_serve(
    debian: Container,
) -> None:
    now = debian.run("mkdir -p /etc/zswapd/zswapd.toml.d; date +%s.%N").strip()
    debian.run("echo 'swap.size = \"1Q\"' > /etc/zswapd/zswapd.toml.d/wrong.toml")
    assert debian.call("systemctl start zswapd.service").returncode != 0
    time.sleep(1)
    assert shown(debian, "ActiveState", "NRestarts", "ExecMainStatus") == [
        "failed",
        "0",
        str(ConfigError.exit_code),
    ]
    assert "status=78/CONFIG" in debian.run("systemctl status --no-pager zswapd.service || :")
    assert (
        debian.run(
            f"journalctl --since=@{now} --unit=zswapd.service | grep --count 'wrong.toml.*1Q'"
        ).strip()
        == "1"
    )
    debian.run("rm /etc/zswapd/zswapd.toml.d/wrong.toml && systemctl start zswapd.service")


def test_the_journal_has_fields_and_priorities(swapping: Container) -> None:
    lines = swapping.run(
        "journalctl --boot --unit=zswapd.service --output=json LOGGER=zswapd.worker.worker"
    ).splitlines()
    records = [json.loads(line) for line in lines]
    ready = next(
        record for record in reversed(records) if record["MESSAGE"].startswith("ready: serving")
    )
    assert ready["PRIORITY"] == "6"
    assert ready["ZSWAPD_TEMPLATE"] == "ready: serving %s%s"
    assert {record["PRIORITY"] for record in records} <= {"4", "6"}


def test_the_settings_of_the_system_are_applied_at_boot(debian: Container) -> None:
    """To something that stands in for this machine's own, in the container alone."""
    place = "/proc/sys/vm/page-cluster"
    debian.run(f"echo 9 > /run/stands-in && mount --bind /run/stands-in {place}")
    try:
        debian.run("/usr/lib/systemd/systemd-sysctl --prefix=/vm/page-cluster")
        assert debian.run(f"cat {place}").strip() == "3"
    finally:
        debian.run(f"umount {place}")


def test_stop_swaps_off_and_start_swaps_on_again(swapping: Container) -> None:
    swapping.run("systemctl stop zswapd.service")
    assert loops(swapping) == []
    assert shown(swapping, "ActiveState", "Result", "NRestarts") == ["inactive", "success", "0"]
    swapping.run("systemctl start zswapd.service")
    wait_for_swap(swapping)


def test_reload_is_an_upgrade_while_swapped_on(swapping: Container) -> None:
    before, device = status(swapping), loops(swapping)
    place = "/etc/zswapd/zswapd.toml.d"
    swapping.run(
        f"mkdir -p {place} && echo 'pool.zv_max_zsize = 2000' > {place}/size.toml && systemctl"
        " reload zswapd.service"
    )
    assert status(swapping)["worker"]["pid"] != before["worker"]["pid"]
    row = json.loads(swapping.run("zswapctl get --json pool.zv_max_zsize"))["pool.zv_max_zsize"]
    assert (row["value"], row["origin"]) == (2000, f"{place}/size.toml:1")
    assert loops(swapping) == device
    assert swap_header(swapping) == "SWAPSPACE2"
    assert shown(swapping, "ActiveState", "NRestarts") == ["active", "0"]


@pytest.mark.parametrize("who", ["main", "all"])
def test_after_a_kill_systemd_starts_what_adopts_the_swap(swapping: Container, who: str) -> None:
    before, device = status(swapping), loops(swapping)
    swapping.run(f"systemctl kill --kill-whom={who} --signal=KILL zswapd.service")
    assert swap_header(swapping) == "SWAPSPACE2"
    swapping.wait_until("systemctl --quiet is-active zswapd.service", LIMIT_S)
    after = status(swapping)
    assert after["pid"] != before["pid"]
    assert after["worker"]["supervised"]
    assert after["worker"]["deaths"] == before["worker"]["deaths"] + (who == "all")
    assert loops(swapping) == device
    assert shown(swapping, "NRestarts") == ["1"]
    # It looked, and found that there was nothing to do; or it began to look before the restart, and
    # that start counts for both.
    end = time.monotonic() + LIMIT_S
    while shown(swapping, "ActiveState", "Result", unit="zswapd-swap.service") not in (
        ["inactive", "success"],
        ["inactive", "exec-condition"],
    ):
        assert time.monotonic() < end, swapping.run("journalctl --no-pager --lines=60")
        time.sleep(0.1)


@pytest.mark.parametrize("who", ["main", "all"])
def test_settings_that_are_wrong_do_not_keep_it_from_coming_back(
    swapping: Container, who: str
) -> None:
    before, device = status(swapping), loops(swapping)
    swapping.run(
        "mkdir -p /etc/zswapd/zswapd.toml.d && echo 'swap.size = \"1Q\"' >"
        " /etc/zswapd/zswapd.toml.d/wrong.toml"
    )
    assert swapping.call("systemctl reload zswapd.service").returncode != 0
    assert status(swapping)["worker"]["pid"] == before["worker"]["pid"]
    swapping.run(f"systemctl kill --kill-whom={who} --signal=KILL zswapd.service")
    assert swap_header(swapping) == "SWAPSPACE2"
    swapping.wait_until("systemctl --quiet is-active zswapd.service", LIMIT_S)
    after = status(swapping)
    assert after["pid"] != before["pid"]
    assert after["worker"]["supervised"]
    assert loops(swapping) == device
    assert shown(swapping, "NRestarts") == ["1"]
    swapping.run("journalctl --unit=zswapd.service | grep 'wrong.toml.*1Q'")
    swapping.run("rm -r /etc/zswapd/zswapd.toml.d && systemctl reload zswapd.service")


HANG = """
import os

def lock(self, *, locked=ArenaLock.lock):
    while os.path.exists("/run/hangs"):
        pass
    return locked(self)

ArenaLock.lock = lock
"""
"""Appended to zswapd/supervisor/arena_lock.py: has the supervisor loop in its next look."""
IMPATIENT = "[Service]\nWatchdogSec=4s\nExecStartPre=/bin/rm -f /run/hangs\n"


@pytest.mark.parametrize("how", ["loop", "stop"])
def test_a_supervisor_that_hangs_is_ended_by_the_watchdog_and_followed(
    debian: Container, how: str
) -> None:
    directory = "/etc/systemd/system/zswapd.service.d"
    debian.run(
        f"mkdir -p {directory} && printf '{IMPATIENT}' > {directory}/impatient.conf && systemctl"
        " daemon-reload"
    )
    place = "/usr/lib/zswapd/zswapd/supervisor"
    debian.run(
        f"rm {place}/__pycache__/arena_lock.*.pyc && printf '%s' '{HANG}' >> {place}/arena_lock.py"
    )
    try:
        debian.run("systemctl enable --now zswapd.service")
        wait_for_swap(debian)
        before, device = status(debian), loops(debian)
        hang = {
            "loop": "touch /run/hangs",
            "stop": "systemctl kill --kill-whom=main --signal=STOP zswapd.service",
        }[how]
        debian.run(hang)
        assert swap_header(debian) == "SWAPSPACE2"
        debian.wait_until(
            "test $(systemctl show --value --property=NRestarts zswapd.service) -gt 0", LIMIT_S
        )
        debian.wait_until("systemctl --quiet is-active zswapd.service", LIMIT_S)
        after = status(debian)
        assert after["pid"] != before["pid"]
        assert after["worker"]["supervised"]
        assert loops(debian) == device
        assert shown(debian, "NRestarts") == ["1"]
        debian.run("journalctl --boot --unit=zswapd.service | grep 'Watchdog timeout'")
        debian.run("systemctl disable --now zswapd.service")
    finally:
        debian.run(f"{INSTALL} --reinstall /packages/first/*.deb")


def override(container: Container, unit: str, command: str) -> None:
    """Have a unit start something else."""
    text = f"[Service]\\nExecStart=\\nExecStart={command}\\n"
    directory = f"/etc/systemd/system/{unit}.d"
    container.run(
        f"mkdir -p {directory} && printf '{text}' > {directory}/override.conf && systemctl"
        " daemon-reload"
    )


def pretend_to_hibernate(container: Container, unit: str = "systemd-hibernate.service") -> None:
    """Have systemd do all of it but the thing itself."""
    override(container, unit, "/bin/cp /proc/swaps /run/swaps-in-hibernation")
    container.run("rm -f /run/swaps-in-hibernation")


@pytest.mark.parametrize("how", ["hibernate", "hybrid-sleep", "suspend-then-hibernate"])
def test_hibernation_happens_without_the_swap(swapping: Container, how: str) -> None:
    pretend_to_hibernate(swapping, f"systemd-{how}.service")
    (device,) = loops(swapping)
    swapping.run(f"systemctl start systemd-{how}.service")
    assert device not in swapping.run("cat /run/swaps-in-hibernation").split()
    wait_for_swap(swapping)


def test_no_hibernation_where_swapoff_is_refused(swapping: Container) -> None:
    pretend_to_hibernate(swapping)
    override(swapping, "zswapd-hibernate.service", "/bin/false")
    assert swapping.call("systemctl start systemd-hibernate.service").returncode != 0
    assert swapping.call("test -e /run/swaps-in-hibernation").returncode != 0
    assert loops(swapping)


def test_a_newer_package_takes_over_while_swapped_on(swapping: Container) -> None:
    before, device = status(swapping), loops(swapping)
    swapping.run(f"{INSTALL} /packages/second/*.deb")
    assert status(swapping)["worker"]["pid"] != before["worker"]["pid"]
    assert loops(swapping) == device
    assert shown(swapping, "ActiveState", "UnitFileState", "NRestarts") == [
        "active",
        "enabled",
        "0",
    ]


def test_it_is_not_removed_while_it_cannot_be_swapped_off(swapping: Container) -> None:
    before, device = status(swapping), loops(swapping)
    swapping.run("printf '#!/bin/sh\\nexit 7\\n' > /run/refuses && chmod +x /run/refuses")
    swapping.run("mount --bind /run/refuses /usr/bin/zswapctl")
    refused = swapping.call("apt-get remove --yes zswapd")
    swapping.run("umount /usr/bin/zswapctl")
    assert refused.returncode != 0
    assert f"not removed, since it holds what is swapped out to {device[0]}" in refused.stdout
    assert status(swapping)["worker"]["pid"] == before["worker"]["pid"]
    assert loops(swapping) == device
    assert "install ok installed" in swapping.run(
        "dpkg-query --show --showformat='${Status}' zswapd"
    )


def test_removal_swaps_off_and_purge_leaves_nothing(swapping: Container) -> None:
    swapping.run("apt-get remove --yes zswapd")
    assert loops(swapping) == []
    assert swapping.run("find /etc -path '*zswapd*'").split() == [
        "/etc/zswapd",
        "/etc/zswapd/zswapd.toml",
    ]
    swapping.run("apt-get purge --yes zswapd")
    assert (
        swapping.run(
            "find / -xdev -path /packages -prune -o -path /proc -prune -o -name '*zswapd*' -print"
        )
        == ""
    )


def test_swap_goes_on_wherever_the_config_file_puts_the_socket(debian: Container) -> None:
    """The units call zswapctl without --socket, so zswapctl reads the daemon's own files."""
    setting = 'control.socket = "/run/elsewhere/zswapd.sock"'
    debian.run(
        f"mkdir -p /etc/zswapd/zswapd.toml.d && echo '{setting}' >"
        " /etc/zswapd/zswapd.toml.d/socket.toml"
    )
    debian.run("systemctl enable --now zswapd.service")
    wait_for_swap(debian)
    assert status(debian)["state"] == "serving"
    debian.run("systemctl reload zswapd.service")
    assert shown(debian, "ActiveState") == ["active"]
    debian.run("systemctl disable --now zswapd.service")
    assert loops(debian) == []
