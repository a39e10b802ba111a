# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap with a disk behind the pool: most of it on the disk, under kills, encrypted."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from scripts.zbench.torture import TorturePlan, torture
from tests.support import baddisk
from tests.support.baddisk import bad_disk
from tests.support.swap import Stage, next_worker, wait_for
from zswapd.backing.store import DATA_AT, LABEL

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


@pytest.mark.skipif(bool(baddisk.missing()), reason=f"not installed: {baddisk.missing()}")
def test_swap_goes_on_while_the_disk_stalls_and_its_worker_is_killed(stage: Stage, tmp_path: Path) -> None:
    with bad_disk(tmp_path / "disk", 257) as disk:
        daemon = stage.daemon(size="256M", backing__path=str(disk.device), pool__limit="128M")
        daemon.swapon()
        workload = stage.workload(stage.cgroup(48), 128, "fill", "settle", "random", "rewrite", "verify")
        phases = workload.phases()
        assert [next(phases).name for _ in range(2)] == ["fill", "settle"]
        sent = daemon.ctl_json("writeback", "--pages", "6000")["written_back"]
        assert sent > 3000, "too little is on the disk"
        disk.pause()
        begin = time.monotonic()
        rest: list[str] = []
        others = threading.Thread(target=lambda: rest.extend(phase.name for phase in phases))
        others.start()  # random faults: some find their page in the pool, sooner or later one needs the disk
        wait_for(lambda: daemon.ask("stats")["core"]["transfers"]["in_flight"], "nobody needs the disk")
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
