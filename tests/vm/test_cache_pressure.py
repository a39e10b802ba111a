# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole box whose memory is full of pages of a cache volume.

A process that needs memory gets it, and waits for the cache only for a short time.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.vm.conftest import Boot
from tools.vm.guest import Answers, Box

SETTINGS = {"swap.size": '"1G"', "memory.reserve": '"16M"', "cache.limit": '"25%"'}
FILE = "/srv/slow"
FILE_MIB = 160
VOLUME = "/run/zswapd/mnt/cache/slow"
WORKLOAD_MIB = 560
"""More than the box has, so all that can be given is asked for."""

MAKE = f"""python3 -c '
import os
with open("{FILE}", "wb") as file:
    for _ in range({FILE_MIB} * 256):
        file.write(os.urandom(1300) + bytes(2796))
'"""


def cache(box: Box) -> tuple[int, dict[str, Any]]:
    """Return the frames that the cache has, and the shrinker's statistics."""
    stats = box.ctl("stats")
    return stats["core"]["cache"]["frames"], stats["shrinker"]


def read(box: Box) -> str:
    """Read the volume past the kernel's page cache; return its checksum."""
    return box.run(f"echo 1 > /proc/sys/vm/drop_caches; sha256sum < {VOLUME}", 200)


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1200)
def test_box_gets_the_memory_of_its_cache_and_answers_throughout(boot: Boot) -> None:
    box = boot(memory_mib=448)
    box.start(SETTINGS)
    box.run(MAKE, 200)
    expected = box.run(f"sha256sum < {FILE}")
    box.run(f"zswapctl cache add slow --backing {FILE}")
    full = 0
    for _ in range(4):  # refills come after the readers
        assert read(box) == expected
        full, _ = cache(box)
        if full > FILE_MIB * 256 * 0.4:  # of what two pages a frame come to
            break
    assert full > FILE_MIB * 256 * 0.3

    with Answers(box) as answers:
        work = box.workload(WORKLOAD_MIB, "fill", "verify", step=True)
        box.wait_for_phase(work, "fill", 400)
        left, shrinker = cache(box)
        box.next_phase(work)
        box.wait_for_phase(work, "verify", 400)
        box.next_phase(work)
        phases = work.verified(60)
    print(
        f"{full} frames, {left} left; {shrinker}; slowest answers: {answers.slowest}; phases:"
        f" {phases}"
    )
    assert left < full / 3, "less would do when the workload has what it asks for"
    assert shrinker["shrinks"]["low_memory"] + shrinker["shrinks"]["stalled"] > 0
    assert shrinker["evicted_frames"] >= full - left
    assert phases[-1]["mismatches"] == 0
    assert sum(phase["pswpout"] for phase in phases) > 0
    assert box.vmstat("oom_kill") == 0
    assert answers.swapped_kib == 0
    assert read(box) == expected
