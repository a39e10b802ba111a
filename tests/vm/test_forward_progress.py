# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole box without a cgroup around anything: swapping must neither hang it nor lose a byte.

What zswapd swaps out is memory of everything on the box: of systemd, of the shell that runs a
command, of the kernel's helpers. So the question is not only whether the workload gets through, but
whether the box answers meanwhile: an agent that has all it needs in memory, a program that has to
be started, and PID 1.
"""

from __future__ import annotations

import pytest

from tests.vm.conftest import Boot
from tools.vm.guest import Answers, Box

SETTINGS = {"swap.size": '"2G"'}


def touch_twice_the_memory(box: Box, mib: int, limit: float) -> Answers:
    """Run the workload on the whole box.

    Nothing may be lost or killed, and zswapd itself not be swapped out.
    """
    box.start(SETTINGS)
    with Answers(box) as answers:
        phases = box.workload(mib, "fill", "verify", limit=int(limit)).verified(limit + 30)
    print(f"slowest answers: {answers.slowest}; phases: {phases}")
    assert [phase["phase"] for phase in phases] == ["fill", "verify"]
    assert phases[-1]["mismatches"] == 0
    # At least half of it was swapped out, and came back.
    assert sum(phase["pswpout"] for phase in phases) > mib << 20 >> 12 >> 1
    assert phases[-1]["pswpin"] > mib << 20 >> 12 >> 1
    assert answers.asked >= 9
    assert answers.swapped_kib == 0
    assert box.vmstat("oom_kill") == 0
    box.ctl("swapoff", limit)  # reads back what is swapped out, as the last phase did
    assert box.run("cat /proc/swaps").count("\n") == 1
    return answers


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_box_touched_at_twice_its_memory_answers_throughout(boot: Boot) -> None:
    touch_twice_the_memory(boot(memory_mib=448), 896, 600)


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", ["old", "new"])
def test_large_box_touched_at_twice_its_memory_answers_throughout(boot: Boot, kernel: str) -> None:
    touch_twice_the_memory(boot(kernel=kernel, memory_mib=768), 1536, 900)
