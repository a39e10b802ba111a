# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/demo, as a user sees it.

It verifies, it tells, it leaves nothing, even when it is interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import demo
from tools.bench.harness import system
from tools.demo import kernel_reserve

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(120)]

TOP = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-P", "-m", "tools.demo", "--data-mib", "96", "--memory-mib", "32"]


def start(tmp_path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOP), "TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        COMMAND,
        cwd=tmp_path,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    )


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
    assert re.search(
        r"stored [\d,]+ pages, \d+ MiB of data; pool [\d.]+ MiB of memory, ratio \d\.\d\d; out \d+"
        r" MiB/s",
        out,
    )
    assert "swapped off" in out
    assert_nothing_left(tmp_path, process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["starting zswapd", "swapped on", "writing the data"])
def test_interrupted_demo_leaves_nothing(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    process = start(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if moment in line:
            break
    time.sleep(0.1)

    process.send_signal(number)
    process.send_signal(number)  # an impatient user
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        for log in tmp_path.rglob("zswapd-run-*/log"):
            print(log.read_text())
        raise

    assert process.returncode == 130, err
    assert "nothing left behind" in out
    assert_nothing_left(tmp_path, process.pid)


def made_up_machine(root: Path, min_free: int) -> Path:
    setting = root / "proc/sys/vm/min_free_kbytes"
    setting.parent.mkdir(parents=True)
    setting.write_text(f"{min_free}\n")
    (root / "proc/meminfo").write_text("MemTotal:        2097152 kB\n")  # of which 2 % are 41943
    return setting


def test_kernel_that_keeps_too_little_free_keeps_more_while_the_demo_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = made_up_machine(tmp_path, 5632)
    with contextlib.suppress(KeyboardInterrupt), kernel_reserve(tmp_path):
        assert setting.read_text() == "41943\n"
        assert (
            "vm.min_free_kbytes: 41943 while this runs, in place of 5632" in capsys.readouterr().out
        )
        raise KeyboardInterrupt
    assert setting.read_text() == "5632\n"

    with kernel_reserve(tmp_path):
        setting.write_text("50000\n")  # another program, for a reason of its own
    with kernel_reserve(tmp_path):
        assert setting.read_text() == "50000\n"
    assert setting.read_text() == "50000\n"
    assert "50000" not in capsys.readouterr().out


def test_kernel_that_keeps_too_little_free_and_cannot_be_told_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: Path, text: str) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    made_up_machine(tmp_path, 5632)
    monkeypatch.setattr(Path, "write_text", read_only)
    with (
        pytest.raises(
            system.HarnessError, match=r"is 5632, too little .* Read-only file system"
        ) as caught,
        kernel_reserve(tmp_path),
    ):
        pytest.fail("it runs")
    assert "sysctl vm.min_free_kbytes" in str(caught.value)


def test_demo_makes_sure_of_the_kernels_reserve_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise system.HarnessError("too little")

    monkeypatch.setattr(demo, "kernel_reserve", refuse)
    monkeypatch.setattr(demo, "Daemon", lambda **_: pytest.fail("it starts"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert demo.main([]) == 1


def test_arguments_that_would_not_swap_are_refused(tmp_path: Path) -> None:
    command = [*COMMAND[:-4], "--data-mib", "32", "--memory-mib", "64"]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )

    assert done.returncode == 2
    assert "nothing is swapped" in done.stderr
