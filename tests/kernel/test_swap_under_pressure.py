# SPDX-License-Identifier: GPL-2.0-or-later
"""A process with more data than memory, swapped onto zswapd: every byte has to come back."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path

import pytest

from tests.support.swap import Stage, wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import MIB

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

    by_name = {
        name: next(phases) for name in names
    }  # it still runs after the last one, and holds its pages

    assert by_name["verify"].mismatches == 0
    assert by_name["fill"].pages_out >= pages(DATA_MIB - MEMORY_MIB)
    assert by_name["seq"].pages_in >= pages(DATA_MIB - MEMORY_MIB)
    status = daemon.ctl_json("status")
    pool = status["pool"]
    assert pool["compressor"] == codec
    assert pool["stored_pages"] >= pages(DATA_MIB - MEMORY_MIB)
    assert pool["same_filled_pages"] > 0  # a twentieth of the data each
    assert pool["incompressible_pages"] > 0
    assert pool["frames"] * mmap.PAGESIZE <= 1.10 * pool["compressed_bytes"]
    # the data compresses to 0.385; anything near a page a page would mean that codec or allocator
    # do nothing
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
    assert area.size in range(
        512 * MIB - 2 * mmap.PAGESIZE, 512 * MIB + 1
    )  # one page is mkswap's header
    assert status["state"] == "serving"
    assert status["discard"] is True
    assert status["files"][0]["size"] == 512 * MIB
    assert status["pool"]["ratio"] == round(
        status["pool"]["stored_pages"] / status["pool"]["frames"], 4
    )
    shown = re.search(r"ratio ([0-9.]+)", text)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(status["pool"]["ratio"], abs=0.05), (
        "asked a moment later, when frames were freed"
    )
    # the kernel counts a slot before its page is written, and mkswap wrote one page that is no slot
    assert abs(status["pool"]["stored_pages"] - area.used // mmap.PAGESIZE) <= 2048
    assert all(isinstance(protection["on"], bool) for protection in status["protections"])
    for protection in status["protections"]:
        assert protection["name"] in text
    json.dumps(status)
    assert next(phases).mismatches == 0


def faults_of_the_serving_thread(daemon: Daemon) -> int:
    """Return the thread's page faults, minor and major: each asks the kernel for memory."""
    worker = daemon.worker_pid()
    fields = Path(f"/proc/{worker}/task/{worker}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[7]) + int(fields[9])


def test_pages_go_out_and_come_in_without_memory_from_the_kernel(stage: Stage) -> None:
    daemon = stage.daemon()
    daemon.swapon()
    phases = stage.workload(stage.cgroup(64), 192, "fill", "verify", "rewrite", "verify").phases()
    fuse = daemon.ask("stats")["fuse"]
    before = faults_of_the_serving_thread(daemon)

    for phase in phases:
        assert phase.mismatches == 0
        # None, but for the thread's other tasks (the tick, housekeeping) now and then; a page path
        # that asked has thousands.
        assert faults_of_the_serving_thread(daemon) - before < 10, phase.name
    after = daemon.ask("stats")["fuse"]
    for name in ("written_bytes", "read_bytes"):
        assert after[name] - fuse[name] > 64 * MIB


def test_what_a_process_has_swapped_out_goes_when_it_ends(stage: Stage) -> None:
    """The kernel discards free slots, the pool gives their frames up.

    And housekeeping gives the memory back.
    """
    daemon = stage.daemon(memory__reserve="16M")
    daemon.swapon()
    workload = stage.workload(stage.cgroup(64), 256, "fill", "verify")
    next(workload.phases())
    stored = daemon.pool_sample()
    assert stored.pages >= pages(64)
    full = daemon.ask("stats")["core"]["arena_backed_bytes"]

    workload.kill()

    # what is left is in clusters of 2 MiB of which the kernel has not freed every slot
    wait_for(
        lambda: daemon.pool_sample().pages <= stored.pages // 4, "the kernel has discarded nothing"
    )
    core = lambda: daemon.ask("stats")["core"]  # noqa: E731 - a name for what is waited for
    wait_for(
        lambda: core()["arena_backed_bytes"] <= full - stored.pool_bytes // 2,
        "the memory does not come back",
    )
    assert core()["frames"]["trimmed_frames"] > 0
    assert daemon.ask("stats")["fuse"]["discards"] > 0
