# SPDX-License-Identifier: GPL-2.0-or-later
"""What needs rights or a cgroup layout that the machines of the tests mostly lack.

Here all of it is real.
"""

from __future__ import annotations

import re

import pytest

from tests.vm.conftest import Boot
from tools.vm.guest import Box
from zswapd.errors import HeadroomError

SETTINGS = {"swap.size": '"1G"', "memory.reserve": '"16M"'}
CGROUP = "/sys/fs/cgroup/crowded"


@pytest.fixture
def box(boot: Boot) -> Box:
    box = boot(memory_mib=448)
    box.start(SETTINGS)
    return box


@pytest.mark.box
@pytest.mark.timeout(900)
def test_every_protection_is_on_under_systemd(box: Box) -> None:
    status = box.ctl("status")

    off = {item["name"]: item["detail"] for item in status["protections"] if not item["on"]}
    assert not off
    assert {item["name"] for item in status["protections"]} >= {
        "heap",
        "lock_memory",
        "oom_score_adj",
        "io_flusher",
    }
    assert status["discard"]
    for pid in box.processes():
        assert box.run(f"cat /proc/{pid}/oom_score_adj").strip() == "-1000"
        locked = re.search(r"^VmLck:\s*(\d+) kB", box.run(f"cat /proc/{pid}/status"), re.MULTILINE)
        assert locked is not None
        assert int(locked[1]) > 0
    # PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE, which PR_SET_IO_FLUSHER sets, in all threads of the
    # worker (flags: field 9).
    for line in box.run(f"cat /proc/{status['worker']['pid']}/task/*/stat").splitlines():
        flags = int(line.rpartition(")")[2].split()[6])
        assert flags & 0x00080000, f"no PF_MEMALLOC_NOIO in {line}"


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(900)
def test_swapoff_looks_at_the_limits_of_cgroups(box: Box) -> None:
    box.run(f"mkdir {CGROUP} && echo 32M > {CGROUP}/memory.max")
    work = box.workload(
        72, "fill", "verify", same=5, step=True, before=f"echo $$ > {CGROUP}/cgroup.procs"
    )
    box.wait_for_phase(work, "fill", 90)
    swapped = int(box.run(f"cat {CGROUP}/memory.swap.current"))
    assert swapped > 36 << 20

    refused = box.machine.run("zswapctl swapoff", 90)

    assert refused.status == HeadroomError.exit_code, refused.output
    assert "/crowded" in refused.output
    assert "memory.max" in refused.output
    assert "loop" in box.run("cat /proc/swaps")
    box.run(f"echo 160M > {CGROUP}/memory.max")
    box.ctl("swapoff")
    assert box.run(f"cat {CGROUP}/memory.swap.current").strip() == "0"
    assert box.run(f"grep ^oom_kill {CGROUP}/memory.events").split() == ["oom_kill", "0"]
    box.next_phase(work)
    box.wait_for_phase(work, "verify", 60)
    box.next_phase(work)
    assert work.verified(30)[-1]["mismatches"] == 0
    box.run(f"rmdir {CGROUP}")
