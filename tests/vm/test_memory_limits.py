# SPDX-License-Identifier: GPL-2.0-or-later
"""A memory limit on the daemon itself, with cgroup v2 and real swap: where a mistake leaves a daemon that waits for itself."""

from __future__ import annotations

import json

import pytest

from scripts.zvm.guest import CGROUP, UNIT, Box
from tests.vm.conftest import Boot

SETTINGS = {"swap.size": '"512M"', "memory.reserve": '"8M"'}
LIMIT_MIB = 224
CROWDED = "/sys/fs/cgroup/crowded"


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_daemon_under_memory_max_is_full_before_it_is_killed(boot: Boot) -> None:
    box: Box = boot(memory_mib=768)
    box.run(
        f"mkdir -p /etc/systemd/system/{UNIT}.d && "
        f"printf '[Service]\\nMemoryMax={LIMIT_MIB}M\\n' > /etc/systemd/system/{UNIT}.d/limit.conf"
    )
    try:
        box.start(SETTINGS)
        status = box.ctl("status")
        limit = status["memory_limit"]
        assert (limit["limit_bytes"], limit["file"]) == (LIMIT_MIB << 20, f"{CGROUP}/memory.max")
        assert next(item for item in status["protections"] if item["name"] == "memory_limit")["on"]

        # 200 MiB, of which nearly nothing compresses, through 32: more than the limit leaves. The workload's own cgroup pays.
        box.run(f"mkdir {CROWDED} && echo 32M > {CROWDED}/memory.max")
        work = box.workload(200, "fill", same=0, limit=120, before=f"echo $$ > {CROWDED}/cgroup.procs")
        work.running.wait(300)

        status = box.ctl("status")
        assert status["worker"]["number"] == 1, "a worker was killed"
        assert status["pool"]["frames"] * 4096 <= status["pool"]["limit_bytes"] + (1 << 20)
        events = dict(line.split() for line in box.run(f"cat {CGROUP}/memory.events").splitlines())
        assert events["oom_kill"] == "0"
        assert box.swapped_kib() == 0
        box.ctl("swapoff")
    finally:
        box.run(f"rm -f /etc/systemd/system/{UNIT}.d/limit.conf; rmdir {CROWDED} || :")


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_swapon_is_refused_where_neighbours_below_a_limit_would_be_swapped_by_the_daemon(boot: Boot) -> None:
    box: Box = boot(memory_mib=768)
    box.start({**SETTINGS, "service.io_flusher": "false"})
    box.ctl("swapoff")
    try:
        box.run(
            "mkdir /sys/fs/cgroup/box && echo +memory > /sys/fs/cgroup/box/cgroup.subtree_control && "
            "echo 512M > /sys/fs/cgroup/box/memory.max && mkdir /sys/fs/cgroup/box/daemon && "
            "echo 0 > /sys/fs/cgroup/box/daemon/memory.swap.max && "  # its own pages are safe, those of its neighbours are not
            f"for pid in $(cat {CGROUP}/cgroup.procs); do echo $pid > /sys/fs/cgroup/box/daemon/cgroup.procs; done"
        )
        refused = box.machine.run("zswapctl --json swapon", 90)
        assert refused.status == 8, refused.output
        error = json.loads(refused.output)["error"]
        assert "/sys/fs/cgroup/box/memory.max" in error["message"]
        box.run(error["hint"].partition(";")[0])
        box.ctl("swapon")
        box.ctl("swapoff")
    finally:
        box.run(f"systemctl stop {UNIT}; rmdir /sys/fs/cgroup/box/daemon /sys/fs/cgroup/box || :")
