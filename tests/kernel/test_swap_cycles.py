# SPDX-License-Identifier: GPL-2.0-or-later
"""swapon and swapoff, again and again: nothing may pile up, in the daemon or in the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.swap import Stage
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(200)]

WARM_UP = 3
CYCLES = 20
GROWTH_ALLOWED = 2 * MIB
"""Of the worker's own memory over all cycles.

A leak of one page a cycle and page would be ten times that. Pages of programs are left out, because
a daemon that another test starts takes a part of them. So is the arena: its reserve has a range.
"""


def own_memory(daemon: Daemon) -> int:
    """Return the anonymous memory of the worker, bytes."""
    status = Path(f"/proc/{daemon.worker_pid()}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) << 10


def open_files(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.worker_pid()}/fd").iterdir()))


def test_swapon_swapoff_twenty_times_leaks_nothing(stage: Stage) -> None:
    daemon = stage.daemon(size="256M")
    cgroup = stage.cgroup(32)
    readings: list[tuple[int, int]] = []

    for _cycle in range(WARM_UP + CYCLES):
        device = daemon.swapon()
        for phase in stage.workload(cgroup, 64, "fill", "verify").phases():
            assert phase.mismatches == 0
        daemon.swapoff()

        assert not system.is_swap(device)
        assert daemon.loops() == []
        status = daemon.ctl_json("status")
        # mkswap's header page is gone as well: swapoff leaves a file that holds nothing
        assert (status["pool"]["stored_pages"], status["pool"]["frames"]) == (0, 0)
        readings.append((own_memory(daemon), open_files(daemon)))

    assert readings[-1][0] - readings[WARM_UP - 1][0] < GROWTH_ALLOWED, readings
    assert readings[-1][1] == readings[WARM_UP - 1][1], readings
