# SPDX-License-Identifier: GPL-2.0-or-later
"""`scripts/bench all` and `--check`.

A line for each figure, an exit code that is their verdict, documents that are kept.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.bench import bench, benchmarks, everything
from tools.bench.everything import PARTS, Part
from tools.bench.harness.figures import Figure, machine, told
from tools.bench.harness.system import HarnessError


def document(name: str, *values: float | None) -> dict[str, Any]:
    """A document with claims that a value of 1 keeps."""
    figures = [
        Figure(f"{name} {number}", value, 1.0, at_least=True) for number, value in enumerate(values)
    ]
    return {"workload": name, "machine": machine(), "figures": told(figures)}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the parts yield; None is one that cannot be measured."""

    def set_them(**given: dict[str, Any] | None) -> None:
        def made(name: str) -> Part:
            def measure(_quick: bool) -> dict[str, Any]:
                if given[name] is None:
                    raise next(errors)
                return given[name]

            return Part(measure, 1, holds=name != "tabs")

        errors = itertools.cycle(
            [HarnessError("nothing is installed"), RuntimeError("2^24 pages: killed")]
        )
        monkeypatch.setattr(everything, "PARTS", {name: made(name) for name in given})
        monkeypatch.setattr(bench.os, "geteuid", lambda: 0)

    return set_them


def lines(capsys: pytest.CaptureFixture[str], word: str) -> int:
    return sum(line.startswith(f"{word} ") for line in capsys.readouterr().out.splitlines())


def test_all_figures_hold(
    parts: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(raw=document("raw", 1.0, 2.0), scale=document("scale", 1.0), tabs=document("tabs"))
    assert bench.main(["--check", "--directory", str(tmp_path / "new")]) == 0
    assert lines(capsys, "holds") == 3
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "raw.json",
        "scale.json",
    ], "tabs hold nothing"
    kept = json.loads((tmp_path / "new/raw.json").read_text())
    assert (kept["quick"], len(kept["date"]), bool(kept["commit"])) == (False, 10, True)

    assert bench.main(["--check", "--from", str(tmp_path / "new")]) == 0
    assert lines(capsys, "holds") == 3


@pytest.mark.parametrize("value", [0.99, None])
def test_one_that_does_not_hold_decides(
    value: float | None, parts: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    parts(raw=document("raw", 1.0, value), scale=document("scale", 1.0))
    assert bench.main(["--check"]) == 1
    assert lines(capsys, "FAILS") == 1


def test_part_that_cannot_be_measured_fails_and_the_others_go_on(
    parts: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(raw=None, scale=document("scale", 1.0), tabs=document("tabs"))
    assert bench.main(["--check"]) == 1
    out = capsys.readouterr().out
    assert "FAILS  raw: not measured" in out
    assert "holds  scale 0" in out

    assert bench.main(["all", "--directory", str(tmp_path), "--parts", "raw,tabs"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tabs.json"]
    assert "raw: 2^24 pages: killed" in capsys.readouterr().err


def test_trial_is_marked_as_one(parts: Callable[..., None], tmp_path: Path) -> None:
    parts(tabs=document("tabs"))
    assert bench.main(["all", "--quick", "--directory", str(tmp_path)]) == 0
    assert benchmarks.caption(benchmarks.load(tmp_path)["tabs"]).startswith("**A trial of seconds")


def test_every_claim_belongs_to_a_part_of_the_check() -> None:
    """What a figure has to hold is in --check, whichever workload it is of."""
    assert {name for name, part in PARTS.items() if part.holds} == {
        "raw", "scale", "nopressure", "compile", "shrink", "swapoff", "cache", "density",
    }  # fmt: skip
    assert sum(part.minutes for part in PARTS.values()) <= 32
