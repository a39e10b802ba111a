# SPDX-License-Identifier: GPL-2.0-or-later
"""A process with more data than memory, swapped onto zswapd: every byte has to come back."""

from __future__ import annotations

import json
import mmap

import pytest

from scripts.zbench import system
from scripts.zbench.system import MIB
from tests.support.swap import Stage

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(120)]

DATA_MIB = 300
MEMORY_MIB = 128


def pages(mib: int) -> int:
    return mib * MIB // mmap.PAGESIZE


@pytest.mark.parametrize("codec", ["lz4", "lzo"])
def test_swap_under_pressure_gives_every_byte_back(stage: Stage, codec: str) -> None:
    daemon = stage.daemon(pool__compressor=codec)
    daemon.swapon()
    cgroup = stage.cgroup(MEMORY_MIB)
    names = ("fill", "seq", "random", "rewrite", "verify")
    phases = stage.workload(cgroup, DATA_MIB, *names).phases()

    by_name = {name: next(phases) for name in names}  # it still runs after the last one, and holds its pages

    assert by_name["verify"].mismatches == 0
    assert by_name["fill"].pages_out >= pages(DATA_MIB - MEMORY_MIB)
    assert by_name["seq"].pages_in >= pages(DATA_MIB - MEMORY_MIB)
    status = daemon.ctl_json("status")
    pool = status["pool"]
    assert pool["compressor"] == codec
    assert pool["stored_pages"] >= pages(DATA_MIB - MEMORY_MIB)
    assert pool["same_filled_pages"] > 0  # a twentieth of the data each
    assert pool["incompressible_pages"] > 0
    # the data compresses to 0.385; anything near a page a page would mean that codec or allocator do nothing
    assert pool["frames"] < 0.5 * pool["stored_pages"]
    assert cgroup.oom_kills() == 0


def test_swapoff_under_use_brings_all_pages_back(stage: Stage) -> None:
    daemon = stage.daemon()
    device = daemon.swapon()
    cgroup = stage.cgroup(MEMORY_MIB)
    phases = stage.workload(cgroup, DATA_MIB, "fill", "rewrite", "verify").phases()
    next(phases)
    assert daemon.pool_sample().pages >= pages(DATA_MIB - MEMORY_MIB)

    cgroup.set_limit(2 * DATA_MIB * MIB)
    daemon.swapoff()

    assert not system.is_swap(device)
    assert daemon.loops() == []
    assert [phase.mismatches for phase in phases] == [0, 0]
    sample = daemon.pool_sample()
    assert (sample.pages, sample.pool_bytes) == (0, 0)


def test_codec_switched_while_swapped_on_leaves_old_pages_readable(stage: Stage) -> None:
    daemon = stage.daemon(pool__compressor="lz4")
    daemon.swapon()
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 160, "fill", "rewrite", "verify", rewrites=pages(40)).phases()
    next(phases)

    daemon.ctl("set", "pool.compressor=lzo")

    assert [phase.mismatches for phase in phases] == [0, 0]
    assert daemon.ctl_json("status")["pool"]["compressor"] == "lzo"


def test_frozen_daemon_refuses_pages_and_workload_survives(stage: Stage) -> None:
    daemon = stage.daemon()
    daemon.swapon()
    cgroup = stage.cgroup(256)
    phases = stage.workload(cgroup, 96, "fill", "settle", "verify", "settle", "verify").phases()
    next(phases)

    daemon.ctl("freeze")
    settled = next(phases)
    refused = daemon.ctl_json("status")["pool"]["refused"]
    assert settled.more["resident"] == settled.pages  # nothing could go
    assert sum(refused.values()) > 0
    assert next(phases).mismatches == 0

    daemon.ctl("thaw")
    settled = next(phases)
    assert settled.more["resident"] == 0
    assert next(phases).mismatches == 0


def test_status_while_swapped_on_agrees_with_the_kernel(stage: Stage) -> None:
    daemon = stage.daemon(size="512M")
    device = daemon.swapon()
    cgroup = stage.cgroup(64)
    phases = stage.workload(cgroup, 160, "fill", "verify").phases()
    next(phases)

    status = daemon.ctl_json("status")
    text = daemon.ctl("status")

    area = next(area for area in system.swaps() if area.path == device)
    assert area.priority == system.HIGHEST_PRIORITY
    assert area.size in range(512 * MIB - 2 * mmap.PAGESIZE, 512 * MIB + 1)  # one page is mkswap's header
    assert status["state"] == "serving"
    assert status["discard"] is True
    assert status["files"][0]["size"] == 512 * MIB
    # the kernel counts a slot before its page is written, and mkswap wrote one page that is no slot
    assert abs(status["pool"]["stored_pages"] - area.used // mmap.PAGESIZE) <= 2048
    assert all(isinstance(protection["on"], bool) for protection in status["protections"])
    for protection in status["protections"]:
        assert protection["name"] in text
    json.dumps(status)
    assert next(phases).mismatches == 0
