# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap with a disk behind the pool: most of it on the disk, under kills, encrypted."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from scripts.zbench.torture import TorturePlan, torture
from tests.support.swap import Stage
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
