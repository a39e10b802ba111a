# SPDX-License-Identifier: GPL-2.0-or-later
"""`scripts/bench --check` has a line for each figure, and its exit code is their verdict; measurements are made up."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.zbench import bench, raw, scale
from scripts.zbench.applications import Application
from scripts.zbench.contenders import MemoryUse
from scripts.zbench.jobs import JobRun
from scripts.zbench.rounds import Run
from scripts.zbench.system import MIB
from tests.bench.test_harness import run, subject
from tests.bench.test_jobs import compiled
from tests.bench.test_scale import made


def check(monkeypatch: pytest.MonkeyPatch, directory: Path, *, speed: float, cost: float, free: float) -> int:
    """Run the check with zswapd at `speed`, `cost` a page at 2^24 pages, and `free` seconds of compilation without pressure."""
    runs = [run("nbdkit-zstd", 0, 1.0), run("zram-lz4", 0, 1.0, MemoryUse(500 * MIB)), subject(0, speed)]
    compilation = [*compiled("none", 0, 10.0, 99.0), *compiled("file-slow", 0, 10.0, 40.0), *compiled("zswapd", 0, free, 20.0)]
    asked: list[str] = []

    def measure(args: argparse.Namespace) -> tuple[list[Run], dict[str, object]]:
        asked.append(args.contenders)
        return runs, {}

    def run_scale(powers: Sequence[int], _contents: str) -> list[scale.Measurement]:
        return [made(power, cost if power == 24 else 1.0) for power in powers]

    def run_application(_application: Application, args: argparse.Namespace) -> tuple[list[JobRun], dict[str, object]]:
        asked.append(args.contenders)
        return compilation, {}

    monkeypatch.setattr(raw, "measure", measure)
    monkeypatch.setattr(scale, "run", run_scale)
    monkeypatch.setattr(bench, "run_application", run_application)
    monkeypatch.setattr(bench.os, "geteuid", lambda: 0)
    code = bench.main(["--check", "--rounds", "1", "--directory", str(directory)])
    assert asked == ["zram-lz4,nbdkit-zstd,zswapd", "none,file-slow,zswapd"]
    return code


def test_all_figures_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(monkeypatch, tmp_path, speed=3.001, cost=1.2, free=10.2) == 0
    assert sum(line.startswith("holds ") for line in capsys.readouterr().out.splitlines()) == 14
    assert json.loads((tmp_path / "scale.json").read_text())["measurements"]


@pytest.mark.parametrize(("speed", "cost", "free"), [(2.9, 1.2, 10.2), (3.001, 1.3, 10.2), (3.001, 1.2, 10.3)])
def test_one_that_does_not_hold_decides(
    speed: float, cost: float, free: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, tmp_path, speed=speed, cost=cost, free=free) == 1
    assert "FAILS " in capsys.readouterr().out
