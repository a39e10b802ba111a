# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of applications over contenders, on made-up ones: what is a figure, what is a bound, and what is an error."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from scripts.zbench import bench, jobs
from scripts.zbench.applications import APPLICATIONS, Application, Column, Level, TooSlowError
from scripts.zbench.contenders import Contender, MemoryUse
from scripts.zbench.jobs import JobRun
from scripts.zbench.system import MIB, HarnessError

HEAVY = Level("heavy", 8, None)


class Fake(Application):
    """An application that takes as long as its contender's name is told to."""

    name = "fake"
    contenders = ("file-slow", "zswapd")
    levels = (HEAVY,)
    short = (HEAVY,)
    columns: ClassVar[Mapping[str, Column]] = {"seconds": Column("s"), "rate": Column("a second", more_is_better=True)}

    def __init__(self, *results: float | Exception) -> None:
        self._results = list(results)

    def missing(self) -> str:
        return ""

    def prepare(self, *, quick: bool) -> None:
        pass

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        result = self._results.pop(0)
        if isinstance(result, Exception):
            raise result
        return {"seconds": result, "rate": 1 / result}


class Plain(Contender):
    """A contender that notes what is done with it."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name = name  # type: ignore[misc]
        self._done = done

    def missing(self) -> str:
        return ""

    def start(self, size: int) -> None:
        self._done.append(f"{self.name} {size // MIB}")

    def devices(self) -> list[str]:
        return []

    def memory_used(self) -> MemoryUse:
        return MemoryUse(7 * MIB)

    def stop(self) -> None:
        self._done.append("off")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with contenders, which are made up."""
    noted: list[str] = []
    made = {name: lambda name=name: Plain(name, noted) for name in ("none", "file-slow", "zswapd")}
    monkeypatch.setattr(jobs, "REGISTRY", made)
    return noted


def run(application: Application, names: list[str], rounds: int = 1, levels: tuple[Level, ...] = (HEAVY,)) -> list[JobRun]:
    return jobs.run_all(application, names, levels, rounds=rounds, limit=5, device_mib=64, say=lambda _line: None)


def test_each_is_alone_and_the_order_turns(done: list[str]) -> None:
    runs = run(Fake(4.0, 2.0, 1.0, 4.0), ["file-slow", "zswapd"], rounds=2)

    assert done == ["file-slow 64", "off", "zswapd 64", "off", "zswapd 64", "off", "file-slow 64", "off"]
    assert jobs.ratios(runs, "heavy", "seconds", "file-slow") == [0.5, 0.25]
    assert jobs.medians(runs, "heavy")["zswapd"] == {"seconds": 1.5, "rate": 0.75, "memory_mib": 7}


def test_rival_that_is_cut_off_gives_a_bound_and_the_subject_gives_none(done: list[str]) -> None:
    slow = run(Fake(TooSlowError(5, {"seconds": 5}), 2.0), ["file-slow", "zswapd"])
    assert jobs.ratios(slow, "heavy", "seconds", "file-slow") == [0.4]
    assert re.search(r"^file-slow +>5\.0 .* 0/1$", jobs.table(Fake(), slow), re.MULTILINE)

    ours = run(Fake(4.0, TooSlowError(5, {"seconds": 5})), ["file-slow", "zswapd"])
    assert jobs.ratios(ours, "heavy", "seconds", "file-slow") == []


def test_error_is_reported_and_the_contender_taken_off(done: list[str]) -> None:
    runs = run(Fake(HarnessError("DATA WAS LOST"), 2.0), ["zswapd", "file-slow"])

    assert done == ["zswapd 64", "off", "file-slow 64", "off"]
    assert [one.error for one in runs] == ["DATA WAS LOST", ""]
    assert "zswapd" not in jobs.medians(runs, "heavy")


def test_no_swap_runs_only_without_a_limit(done: list[str]) -> None:
    limited = Level("limited", 1, 64)

    runs = run(Fake(1.0), ["none"], levels=(limited, HEAVY))

    assert [one.level for one in runs] == ["heavy"]


def test_json_and_plot_have_all(done: list[str], tmp_path: Path) -> None:
    runs = run(Fake(4.0, 2.0), ["file-slow", "zswapd"])

    document = json.loads(json.dumps(jobs.as_json(Fake(), runs, {"zram-lz4": "not here"})))
    jobs.plot(Fake(), runs, tmp_path / "plot.svg")

    assert document["ratios"]["heavy"]["file-slow"]["seconds"] == [0.5]
    assert document["skipped"] == {"zram-lz4": "not here"}
    picture = (tmp_path / "plot.svg").read_text()
    assert "file-slow" in picture
    assert "heavy" in picture


def compiled(contender: str, number: int, free: float, heavy: float) -> list[JobRun]:
    levels = APPLICATIONS["compile"]().levels
    return [JobRun(contender, number, levels[at].name, {"seconds": value}) for at, value in ((0, free), (-1, heavy))]


@pytest.mark.parametrize(
    ("free", "heavy", "wanted"),
    [(10.2, 20.0, [True, True]), (10.3, 20.0, [True, False]), (10.0, 20.1, [False, True])],
)
def test_figures_of_the_compilation_hold_from_their_bounds_on(free: float, heavy: float, wanted: list[bool]) -> None:
    runs = [*compiled("none", 0, 10.0, 99.0), *compiled("file-slow", 0, 10.0, 40.0), *compiled("zswapd", 0, free, heavy)]

    assert [figure.holds for figure in bench.compile_figures(runs)] == wanted
    assert [figure.holds for figure in bench.compile_figures(runs[:4])] == [False, False]


@pytest.mark.parametrize("name", bench.WORKLOADS)
def test_every_workload_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([name, "--help"])
    assert caught.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [["--contenders", "zram"], ["--levels", "0"], ["--levels", "9"], ["--rounds", "0"], ["--limit", "0"]]
)
def test_bad_arguments_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench._application_arguments(Fake(), given)
    assert caught.value.code == 2


def test_what_sigterm_meant_before_it_means_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    during = []
    monkeypatch.setitem(bench.WORKLOADS, "density", lambda _argv: during.append(signal.getsignal(signal.SIGTERM)) or 0)
    assert bench.main(["density"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert during[0] is not before


def test_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["dance"]) == 2
    assert "compile, database, tabs" in capsys.readouterr().err
