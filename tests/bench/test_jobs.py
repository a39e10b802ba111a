# SPDX-License-Identifier: GPL-2.0-or-later
"""Rounds of applications over contenders, on made-up ones.

What is a figure, what is a bound, and what is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from tools.bench import bench
from tools.bench.applications import (
    APPLICATIONS,
    Application,
    Column,
    Level,
    TooSlowError,
    claims,
    jobs,
)
from tools.bench.applications.jobs import JobRun
from tools.bench.applications.runner import application_arguments
from tools.bench.contenders import Contender, MemoryUse
from tools.bench.harness.system import MIB, HarnessError

HEAVY = Level("heavy", 8, None)


class Fake(Application):
    """An application that takes as long as its contender's name is told to."""

    name = "fake"
    contenders = ("file-slow", "zswapd")
    levels = (HEAVY,)
    short = (HEAVY,)
    columns: ClassVar[Mapping[str, Column]] = {
        "seconds": Column("s"),
        "rate": Column("a second", more_is_better=True),
    }

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


def run(
    application: Application,
    names: list[str],
    rounds: int = 1,
    levels: tuple[Level, ...] = (HEAVY,),
) -> list[JobRun]:
    return jobs.run_all(
        application, names, levels, rounds=rounds, limit=5, device_mib=64, say=lambda _line: None
    )


def test_each_is_alone_and_the_order_turns(done: list[str]) -> None:
    runs = run(Fake(4.0, 2.0, 1.0, 4.0), ["file-slow", "zswapd"], rounds=2)

    assert done == [
        "file-slow 64",
        "off",
        "zswapd 64",
        "off",
        "zswapd 64",
        "off",
        "file-slow 64",
        "off",
    ]
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
    jobs.plot(Fake(), document["medians"], tmp_path / "plot.svg")

    assert document["ratios"]["heavy"]["file-slow"]["seconds"] == [0.5]
    assert document["skipped"] == {"zram-lz4": "not here"}
    picture = (tmp_path / "plot.svg").read_text()
    assert "file-slow" in picture
    assert "heavy" in picture


@pytest.mark.parametrize(("ours", "holds"), [(20.0, True), (20.1, False)])
def test_figure_of_the_compilation_holds_from_its_bound_on(ours: float, holds: bool) -> None:
    runs = [
        JobRun(name, 0, claims.HEAVY, {"seconds": value})
        for name, value in (("file-slow", 40.0), ("zswapd", ours))
    ]

    assert [figure.holds for figure in claims.compilation(runs)] == [holds]
    assert [figure.holds for figure in claims.compilation(runs[:1])] == [False]
    assert claims.HEAVY in {level.name for level in APPLICATIONS["compile"]().levels}


def harmless(
    cpu: float, *, noise: float = 0.001, clock: float = 1.0, rounds: int = 12
) -> list[JobRun]:
    """Runs without pressure in which zswapd takes `cpu` times the processor time of nothing.

    And `clock` times its run time.
    """
    runs = []
    for number in range(rounds):
        drift = (
            1 + number / 4
        )  # of the machine, from round to round: a median of each side would tell nothing
        off = 1 + noise * (number % 5 - 2)
        for level in APPLICATIONS["nopressure"]().levels:
            runs.append(JobRun("none", number, level.name, {"cpu": drift, "seconds": drift}))
            runs.append(
                JobRun(
                    "zswapd",
                    number,
                    level.name,
                    {"cpu": drift * cpu * off, "seconds": drift * clock * off},
                )
            )
    return runs


@pytest.mark.parametrize(
    ("runs", "wanted"),
    [
        (harmless(1.019), [True, True, True]),
        (harmless(1.021), [False, True, True]),
        (harmless(1.0, noise=0.03), [True, False, True]),
        (harmless(1.0, clock=1.03), [True, True, False]),
        (harmless(1.0, rounds=5), [True, False, False]),
        ([], [False, False, False]),
    ],
    ids=["less", "more", "not told", "slower", "too few", "none"],
)
def test_two_percent_are_told_or_the_figure_does_not_hold(
    runs: list[JobRun], wanted: list[bool]
) -> None:
    assert [figure.holds for figure in claims.no_pressure(runs)] == wanted * 2


def test_table_shows_the_interval_where_there_are_rounds_enough() -> None:
    runs = [
        dataclasses.replace(one, level="heavy") for one in harmless(1.01) if one.level == "memory"
    ]

    class Cpu(Fake):
        columns: ClassVar[Mapping[str, Column]] = {"cpu": Column("processor s")}

    assert re.search(
        r"^none .* 1\.0\d\d \(1\.00\d to 1\.01\d\)", jobs.table(Cpu(), runs), re.MULTILINE
    )


def test_processor_time_of_the_contender_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(Plain):
        def processes(self) -> list[int]:
            return [os.getpid()]

    class Burning(Fake):
        def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
            return {"cpu": 1.0, "seconds": 1.0}

    monkeypatch.setattr(jobs, "REGISTRY", {"zswapd": lambda: Busy("zswapd", [])})
    (one,) = run(Burning(), ["zswapd"])
    assert 1.1 < one.figures["cpu"] < 5
    assert one.figures["seconds"] == 1.0


@pytest.mark.parametrize("name", bench.WORKLOADS)
def test_every_workload_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main([name, "--help"])
    assert caught.value.code == 0
    assert ("--json" in capsys.readouterr().out) is (name not in {"all", "docs"})


@pytest.mark.parametrize(
    "given",
    [
        ["--contenders", "zram"],
        ["--contenders", ","],
        ["--levels", "0"],
        ["--levels", "9"],
        ["--levels", "foo"],
        ["--levels", ","],
        ["--rounds", "0"],
        ["--limit", "0"],
        ["--limit", "nan"],
        ["--device-mib", "0"],
        ["--json", "/nowhere/file.json"],
        ["--plot", "plot.doc"],
    ],
)
def test_bad_arguments_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        application_arguments(Fake(), given)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_what_sigterm_meant_before_it_means_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    during = []
    monkeypatch.setitem(
        bench.WORKLOADS,
        "density",
        lambda _argv: during.append(signal.getsignal(signal.SIGTERM)) or 0,
    )
    assert bench.main(["density"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert during[0] is not before


def test_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["dance"]) == 2
    assert "compile, database, tabs" in capsys.readouterr().err
