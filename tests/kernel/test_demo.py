# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/demo, as a user sees it: it verifies, it tells, it leaves nothing, even when it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.zbench import system

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(120)]

TOP = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-P", "-m", "scripts.zbench.demo", "--data-mib", "96", "--memory-mib", "32"]


def start(tmp_path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOP), "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(COMMAND, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def assert_nothing_left(tmp_path: Path, pid: int) -> None:
    assert list(tmp_path.iterdir()) == []
    assert system.mounts_below(tmp_path) == []
    assert system.loops_below(tmp_path) == []
    assert not list(Path("/sys/fs/cgroup").glob(f"**/zswapd-demo-{pid}"))


def test_demo_verifies_and_leaves_nothing(tmp_path: Path) -> None:
    process = start(tmp_path)
    out, err = process.communicate(timeout=100)

    assert process.returncode == 0, err
    assert "all 96 MiB verified" in out
    assert re.search(r"stored [\d,]+ pages, \d+ MiB of data; pool [\d.]+ MiB of memory, ratio \d\.\d\d; out \d+ MiB/s", out)
    assert "swapped off" in out
    assert_nothing_left(tmp_path, process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["starting zswapd", "swapped on", "writing the data"])
def test_interrupted_demo_leaves_nothing(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if moment in line:
            break
    time.sleep(0.1)

    process.send_signal(number)
    process.send_signal(number)  # an impatient user
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130, err
    assert "nothing left behind" in out
    assert_nothing_left(tmp_path, process.pid)


def test_arguments_that_would_not_swap_are_refused(tmp_path: Path) -> None:
    command = [*COMMAND[:-4], "--data-mib", "32", "--memory-mib", "64"]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=20)

    assert done.returncode == 2
    assert "nothing would be swapped" in done.stderr
