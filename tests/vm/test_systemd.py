# SPDX-License-Identifier: GPL-2.0-or-later
"""zswapd under systemd with the unit of this repository: stopping, rebooting, and refusing to stop."""

from __future__ import annotations

import pytest

from scripts.zvm.guest import Box
from tests.vm.conftest import Boot

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
    # Swap went off while zswapd could still answer, and nobody had to be killed.
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
    assert refused.status == 7, refused.output
    box.machine.start("systemctl stop zswapd.service")
    box.run("timeout 90 sh -c 'until systemctl status zswapd.service | grep -q \"cannot stop\"; do sleep 1; done'", 120)

    assert box.processes() == daemons
    box.next_phase(work)
    box.wait_for_phase(work, "verify", 400)
    box.next_phase(work)
    assert work.verified(30)[-1]["mismatches"] == 0
    # systemd still waits for the end that was refused, and what did not fit does now.
    state = "systemctl show --property=ActiveState zswapd.service"
    box.run(f"timeout 90 sh -c 'while {state} | grep -q =deactivating; do sleep 1; done'", 120)
    box.run(f"{state} | grep -q =inactive && ! grep -q loop /proc/swaps")
