# SPDX-License-Identifier: GPL-2.0-or-later
"""The benchmark from end to end, on a small plan.

Its result is a document, not a verdict on speed.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]


@pytest.mark.bench
@pytest.mark.kernel
@pytest.mark.timeout(280)
def test_quick_bench_verifies_every_byte_of_every_contender(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    command = [str(TOP / "scripts/bench"), "raw", "--quick", "--json", str(target)]

    done = subprocess.run(
        command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=270
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    assert "zswapd" in document["medians"]
    assert all(run["verified"] for run in document["runs"])
