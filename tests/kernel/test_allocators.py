# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap over the allocator that is not the default, with an ephemeral half beside it."""

from __future__ import annotations

import pytest

from scripts.zbench.torture import TorturePlan, torture
from tests.support.swap import Stage

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(200)]


def test_swap_over_zbud_survives_kills(stage: Stage) -> None:
    daemon = stage.daemon(size="384M", pool__allocator="zbud", cache__limit="25%", cache__allocator="zsmalloc")
    daemon.swapon()
    outcome = torture(TorturePlan(kills=6, data_mib=96, memory_mib=32, pause_s=0.5), daemon)
    assert outcome.good(), outcome.lines()
    assert outcome.kills == 6
    core = daemon.ask("stats")["core"]
    assert core["zsmalloc"] is None
    assert core["zbud"]["used_frames"] == core["frames"]["used_frames"] > 0
    assert core["zv"]["curr_pages"] <= core["zbud"]["objects"]
    assert core["cache"]["zsmalloc"]["used_frames"] == 0
    daemon.swapoff()
    assert daemon.ask("status")["pool"]["frames"] == 0
