# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/torture that is interrupted swaps off, and leaves no daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.harness import system

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(120)]

TOP = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-P", "-m", "tools.torture", "--kills", "50", "--data-mib", "64"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_torture_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TOP), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        COMMAND,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert "killed" in process.stderr.readline(), "it has begun"
    process.send_signal(number)
    process.send_signal(number)  # an impatient user
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert "swapped off and cleaned up" in err
    assert list(tmp_path.iterdir()) == []
    assert system.mounts_below(tmp_path) == []
    assert system.loops_below(tmp_path) == []
