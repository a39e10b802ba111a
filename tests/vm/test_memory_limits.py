# SPDX-License-Identifier: GPL-2.0-or-later
"""A daemon below a memory limit that is set two levels above it.

On a box whose load wants more than fits.
"""

from __future__ import annotations

import re
import signal

import pytest

from tests.vm.conftest import Boot
from tools.vm.guest import CGROUP, UNIT, Answers, Box

SETTINGS = {"swap.size": '"1G"', "memory.reserve": '"24M"'}
OUTER, INNER = "zlimit.slice", "zlimit-inner.slice"
LIMIT_MIB = 224
PLACE = f"/sys/fs/cgroup/{OUTER}/{INNER}/{UNIT}"
DROP_INS = f"""mkdir -p /run/systemd/system/{UNIT}.d
printf '[Slice]\\nMemoryMax={LIMIT_MIB}M\\n' > /run/systemd/system/{OUTER}
printf '[Slice]\\nMemoryMax=infinity\\n' > /run/systemd/system/{INNER}
printf '[Service]\\nSlice={INNER}\\n' > /run/systemd/system/{UNIT}.d/slice.conf
"""
REMOVE = (
    f"cd /run/systemd/system && rm -f {UNIT}.d/slice.conf {OUTER} {INNER}"
    " && systemctl daemon-reload"
)


def events(box: Box, slice_: str) -> dict[str, int]:
    """Return what the kernel counted for a cgroup and those below it."""
    found = re.findall(
        r"^(\w+) (\d+)$", box.run(f"cat /sys/fs/cgroup/{slice_}/memory.events"), re.MULTILINE
    )
    return {name: int(count) for name, count in found}


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_daemon_below_a_limit_of_its_slice_is_no_part_of_its_own_reclaim(boot: Boot) -> None:
    box = boot(memory_mib=768)
    box.run(DROP_INS)
    try:
        box.cgroup = PLACE
        box.start(SETTINGS)
        limit = box.ctl("status")["memory_limit"]
        assert (limit["limit_bytes"], limit["file"]) == (
            LIMIT_MIB << 20,
            f"/sys/fs/cgroup/{OUTER}/memory.max",
        )
        with Answers(box) as answers:
            kept = box.confined(
                "kept", 64, 32, "fill", "settle", "verify", "rewrite", "verify", same=20, step=True
            )
            box.wait_for_phase(kept, "fill", 240)
            box.next_phase(kept)
            box.wait_for_phase(kept, "settle", 240)
            # Three times what the pool has room for: what is refused stays in its cgroup, which is
            # too small for it.
            greedy = box.confined("greedy", 256, 48, "fill", "verify", same=0, step=False)
            assert greedy.running.wait(300).status == -signal.SIGKILL
            assert events(box, "greedy")["oom_kill"] == 1
            for _ in range(4):  # the last one lets it end
                box.next_phase(kept)
            assert kept.verified(300)[-1]["mismatches"] == 0
        print(f"slowest answers: {answers.slowest}")
        after = box.ctl("status")
        assert after["pool"]["refused"]["pool_limit_hit"] > 1000
        assert (
            after["pool"]["frames"] * after["page_size"]
            <= after["pool"]["limit_bytes"]
            < LIMIT_MIB << 20
        )
        assert events(box, OUTER)["oom_kill"] == 0
        assert (after["worker"]["number"], after["worker"]["deaths"]) == (1, 0)
        assert answers.swapped_kib == 0
        assert "blocked for more than" not in box.run("dmesg")
        box.stop()
    finally:
        box.cgroup = CGROUP
        box.run(REMOVE)
