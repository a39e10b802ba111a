# SPDX-License-Identifier: GPL-2.0-or-later
"""zswapd under systemd with the units of this repository.

Booting, stopping, rebooting, and refusing to stop.
"""

from __future__ import annotations

import contextlib
import time

import pytest

from tests.vm.conftest import Boot
from tools.bench.harness.system import HarnessError
from tools.vm.guest import Box
from zswapd.errors import HeadroomError

SETTINGS = {"swap.size": '"1G"', "memory.reserve": '"32M"'}
STOP_LIMIT_S = 240.0


@pytest.fixture
def box(boot: Boot) -> Box:
    box = boot(memory_mib=448)
    box.start(SETTINGS)
    return box


def swap_out(box: Box, mib: int) -> None:
    """Start a service that stays, with half of it swapped out."""
    work = box.workload(mib, "fill", "settle", "verify", step=True, service=True)
    box.wait_for_phase(work, "fill", 120)
    box.next_phase(work)
    box.wait_for_phase(work, "settle", 120)
    swapped = box.ctl("status")["files"][0]["swapped_out"]
    assert swapped > mib << 20 >> 1


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_reboot_while_swapped_on_is_clean(box: Box) -> None:
    swap_out(box, 160)

    box.machine.start("systemctl reboot")
    box.machine.wait_for_end(STOP_LIMIT_S)

    console = box.machine.console_tail(60_000)
    assert "reboot: Restarting system" in console
    # Swap went off while zswapd could still answer, and no process had to be killed.
    assert "Read-error on swap-device" not in console
    assert "Failed deactivating swap" not in console
    assert "Processes still around after SIGKILL" not in console
    assert "I/O error" not in console


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_stop_that_does_not_fit_into_memory_is_refused_and_harmless(box: Box) -> None:
    work = box.workload(640, "fill", "verify", step=True, limit=800)
    box.wait_for_phase(work, "fill", 200)
    daemons = box.processes()

    refused = box.machine.run("zswapctl swapoff", 90)
    assert refused.status == HeadroomError.exit_code, refused.output
    box.machine.start("systemctl stop zswapd.service")
    box.run(
        'timeout 90 sh -c \'until systemctl status zswapd.service | grep -q "cannot stop"; do'
        " sleep 1; done'",
        120,
    )

    assert box.processes() == daemons
    box.next_phase(work)
    box.wait_for_phase(work, "verify", 400)
    box.next_phase(work)
    assert work.verified(30)[-1]["mismatches"] == 0
    # systemd still waits for the end that was refused, and what did not fit does now.
    state = "systemctl show --property=ActiveState zswapd.service"
    box.run(f"timeout 90 sh -c 'while {state} | grep -q =deactivating; do sleep 1; done'", 120)
    box.run(f"{state} | grep -q =inactive && ! grep -q loop /proc/swaps")


def reboot(box: Box) -> None:
    """Reboot, and wait until it is up again."""
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before = box.run(boot_id)
    box.machine.start("systemctl reboot")
    end = time.monotonic() + STOP_LIMIT_S
    while True:
        with contextlib.suppress(HarnessError):
            if box.run(boot_id, 5) != before:
                break
        assert time.monotonic() < end, box.machine.console_tail()
        time.sleep(1)
    box.machine.wait_for_boot()


def at(box: Box, unit: str, name: str) -> int:
    """When something became of a unit, in microseconds since the kernel began."""
    return int(box.run(f"systemctl show --value --property={name}TimestampMonotonic {unit}"))


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_package_that_is_enabled_is_swapped_on_after_a_reboot(boot: Boot) -> None:
    box = boot(memory_mib=448, reboots=True)
    box.run("dpkg --install /opt/zvm/packages/zswapd_*.deb", 120)
    box.run("systemctl enable --now zswapd.service", 120)
    box.run("timeout 60 sh -c 'until grep -q loop /proc/swaps; do sleep 1; done'")

    reboot(box)

    assert "/dev/loop" in box.run("cat /proc/swaps")
    status = box.ctl("status")
    assert status["state"] == "serving"
    assert [item["name"] for item in status["protections"] if not item["on"]] == []
    # swapon needs 16 MiB, and no administrator has set it. The kernel's own choice for this box is
    # 2 MiB.
    assert int(box.run("cat /proc/sys/vm/min_free_kbytes")) >= 16384
    assert box.run("systemctl --failed --quiet --plain --no-legend") == ""
    assert at(box, "zswapd.service", "ActiveEnter") < at(
        box, "zswapd-swap.service", "InactiveEnter"
    )
    assert at(box, "zswapd-swap.service", "InactiveEnter") <= at(box, "swap.target", "ActiveEnter")
    # None of its settings is one that this kernel or systemd leaves out.
    assert box.run("cat /sys/fs/cgroup/zswapd.service/memory.min").strip() == str(64 << 20)
    assert box.run("cat /sys/fs/cgroup/zswapd.service/memory.swap.max").strip() == "0"
    journal = box.run("journalctl --boot --no-pager")
    assert "ordering cycle" not in journal
    assert "zswapd.service: Unknown" not in journal
