# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap with most pages on an encrypted disk behind the pool, while workers are killed.

The disk of these tests fails to write, or stalls. A disk that cannot be read kills the process that
needs the page. Where the kernel pages out cold memory, that may be any process of the machine, so
these tests are in tests/vm/test_disk_faults.py.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import baddisk
from tests.support.baddisk import bad_disk, sparse_disk
from tests.support.capabilities import requires_loop
from tests.support.swap import Stage, next_worker, wait_for
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import HarnessError
from tools.bench.harness.workload import Phase
from tools.torture import TorturePlan, torture
from zswapd.core.backing.store import DATA_AT, LABEL

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(240)]


def test_torture_with_most_pages_on_the_disk(stage: Stage, tmp_path: Path) -> None:
    store = tmp_path / "store"
    daemon = stage.daemon(size="384M", backing__path=str(store), pool__limit="8M")
    daemon.swapon()
    outcome = torture(TorturePlan(kills=10, pause_s=0.7), daemon)
    print("\n".join(outcome.lines()))
    assert outcome.good(), outcome.lines()
    assert outcome.kills == 10
    stats = daemon.ask("stats")["core"]
    assert stats["backed"][0]["written_through_pages"] > 10_000
    assert stats["transfers"]["bd_reads"] > 5_000
    assert stats["transfers"]["failed_reads"] == stats["transfers"]["failed_writes"] == 0
    daemon.swapoff()
    after = daemon.ask("stats")["core"]
    assert after["backed"][0]["bd_count"] == after["zv"]["curr_pages"] == 0
    with store.open("rb") as file:
        assert file.read(len(LABEL)) == LABEL
        file.seek(DATA_AT)
        written = [page for page in iter(lambda: file.read(4096), b"") if any(page)]
    assert len(written) > 1000
    for page in written[:: len(written) // 200]:
        counts = Counter(page)
        entropy = -sum(n / 4096 * math.log2(n / 4096) for n in counts.values())
        assert entropy > 7.9, "what is on the disk is not noise"


requires_nbd = pytest.mark.skipif(
    bool(baddisk.missing()), reason=f"not installed: {baddisk.missing()}"
)
PHASES = ("fill", "settle", "random", "rewrite", "verify")


def trouble(daemon: Daemon) -> str:
    """Return what `status` says of the disk."""
    return str(daemon.ask("status")["backing"]["trouble"])


def phases_until(phases: Iterator[Phase], last: str) -> None:
    """Have a workload go on until it has done a phase."""
    assert any(phase.name == last for phase in phases)


@requires_nbd
def test_swap_goes_on_while_nothing_can_be_written_to_the_disk(
    stage: Stage, tmp_path: Path
) -> None:
    with bad_disk(tmp_path / "disk", 257) as disk:
        daemon = stage.daemon(size="256M", backing__path=str(disk.device), pool__limit="128M")
        daemon.swapon()
        workload = stage.workload(stage.cgroup(48), 128, *PHASES)
        phases = workload.phases()
        phases_until(phases, "settle")
        assert daemon.ctl_json("writeback", "--pages", "6000")["written_back"] > 3000, (
            "too little is on the disk"
        )
        disk.write_errors.touch()
        phases_until(phases, "rewrite")  # a part of it is read from the disk
        with pytest.raises(HarnessError, match=r"takes nothing: .*Input/output error"):
            daemon.ctl("writeback")
        assert "Input/output error" in trouble(daemon)
        assert "DEGRADED" in daemon.ctl("status")
        stats = daemon.ask("stats")["core"]
        assert stats["transfers"]["failed_writes"] > 0
        assert stats["transfers"]["bd_reads"] > 100
        assert stats["devices"][0]["refused_writes"] == 0, "the pool has room"
        disk.write_errors.unlink()
        wait_for(lambda: not trouble(daemon), "it does not recover", 15)
        assert daemon.ctl_json("writeback", "--pages", "1000")["written_back"] > 500
        phases_until(phases, "verify")
        assert workload.mismatches == 0
        assert not list(phases)
        workload.kill()
        daemon.swapoff()


@requires_nbd
def test_full_pool_waits_for_a_slow_disk_and_refuses_nothing(stage: Stage, tmp_path: Path) -> None:
    """The disk takes a request of some pages in 20 ms, and the kernel writes faster than that."""
    with bad_disk(tmp_path / "disk", 257, delay_ms=20) as disk:
        daemon = stage.daemon(
            size="256M", backing__path=str(disk.device), pool__limit="8M", backing__buffers="4M"
        )
        daemon.swapon()
        workload = stage.workload(stage.cgroup(48), 128, "fill")
        assert next(workload.phases()).mismatches == 0
        workload.kill()
        stats = daemon.ask("stats")
        print(stats["fuse"]["held"], stats["core"]["transfers"])
        assert stats["core"]["devices"][0]["refused_writes"] == 0
        assert stats["core"]["transfers"]["refused_writes"] == 0
        assert stats["fuse"]["held"]["held"] > 0, "the disk was not slow enough"
        daemon.swapoff()


@requires_loop()
def test_swap_goes_on_on_a_sparse_disk_that_is_full(stage: Stage, tmp_path: Path) -> None:
    with sparse_disk(tmp_path / "small", 257, 3) as disk:
        daemon = stage.daemon(size="256M", backing__path=str(disk.device), pool__limit="128M")
        daemon.swapon()
        workload = stage.workload(stage.cgroup(48), 128, *PHASES)
        phases = workload.phases()
        phases_until(
            phases, "settle"
        )  # one page of twenty does not compress: some 4 MiB for the disk
        wait_for(lambda: "No space left" in trouble(daemon), "the daemon does not say so")
        kept = daemon.ask("stats")["core"]["zv"]["curr_incompressible"]
        assert kept > 100, "what the disk does not take the pool has to keep"
        phases_until(phases, "rewrite")
        disk.grow(80)
        wait_for(lambda: not trouble(daemon), "it does not recover", 15)
        wait_for(
            lambda: daemon.ask("stats")["core"]["zv"]["curr_incompressible"] < kept // 4,
            "the rest does not go there",
        )
        phases_until(phases, "verify")
        assert workload.mismatches == 0
        assert not list(phases)
        workload.kill()
        daemon.swapoff()


@requires_nbd
def test_swap_goes_on_while_the_disk_stalls_and_its_worker_is_killed(
    stage: Stage, tmp_path: Path
) -> None:
    with bad_disk(tmp_path / "disk", 257) as disk:
        daemon = stage.daemon(size="256M", backing__path=str(disk.device), pool__limit="128M")
        daemon.swapon()
        workload = stage.workload(stage.cgroup(48), 128, *PHASES)
        phases = workload.phases()
        phases_until(phases, "settle")
        sent = daemon.ctl_json("writeback", "--pages", "6000")["written_back"]
        assert sent > 3000, "too little is on the disk"
        disk.pause()
        begin = time.monotonic()
        rest: list[str] = []
        others = threading.Thread(target=lambda: rest.extend(phase.name for phase in phases))
        others.start()  # random faults: most find their page in the pool, one needs the disk
        wait_for(
            lambda: daemon.ask("stats")["core"]["transfers"]["in_flight"],
            "no request reads the disk",
        )
        worker = daemon.worker_pid()
        os.kill(worker, signal.SIGKILL)
        next_worker(daemon, worker)
        assert time.monotonic() - begin < 3, "the takeover has waited for the disk"
        time.sleep(max(0.0, begin + 3 - time.monotonic()))
        assert others.is_alive()
        disk.resume()
        others.join(100)
        assert rest == ["random", "rewrite", "verify"]
        assert workload.mismatches == 0
        assert daemon.ask("stats")["core"]["transfers"]["bd_reads"] > 1000
        workload.kill()
        daemon.swapoff()
