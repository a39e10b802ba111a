# SPDX-License-Identifier: GPL-2.0-or-later
"""Two swap files of one daemon, in use at once."""

from __future__ import annotations

import mmap

import pytest

from tests.support.swap import Stage
from tools.bench.harness import system
from tools.bench.harness.system import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(120)]


def test_two_files_with_equal_priority_share_the_pages(stage: Stage) -> None:
    daemon = stage.daemon(size="256M", swap__files__second="256M")
    first = daemon.swapon()
    second = daemon.swapon("second")
    cgroup = stage.cgroup(64)

    phases = stage.workload(cgroup, 256, "fill", "seq", "rewrite", "verify").phases()
    last = [next(phases) for _ in range(4)][
        -1
    ]  # it still runs after the last one, and holds its pages

    assert last.mismatches == 0
    used = {area.path: area.used for area in system.swaps()}
    assert min(used[first], used[second]) > 48 * MIB  # 192 MiB or more went out, in turn
    files = {file["name"]: file["stored_pages"] for file in daemon.ctl_json("status")["files"]}
    assert set(files) == {"swap", "second"}
    assert min(files.values()) > 48 * MIB // mmap.PAGESIZE


def test_swapoff_of_one_file_leaves_the_other_untouched(stage: Stage) -> None:
    daemon = stage.daemon(size="256M", swap__files__second="256M")
    daemon.swapon()
    second = daemon.swapon("second")
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 160, "fill", "verify", "rewrite", "verify").phases()
    next(phases)

    cgroup.set_limit(512 * MIB)
    daemon.swapoff("swap")

    assert [area.path for area in system.swaps() if area.path in {second, *daemon.loops()}] == [
        second
    ]
    files = {file["name"]: file["stored_pages"] for file in daemon.ctl_json("status")["files"]}
    assert files["swap"] == 0
    assert files["second"] > 0
    assert [phase.mismatches for phase in phases] == [0, 0, 0]
