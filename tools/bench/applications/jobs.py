# SPDX-License-Identifier: GPL-2.0-or-later
"""The runs of an application on all contenders: rounds, table, ratios, JSON, plot.

As in rounds.py, each contender is alone on the machine, the order rotates from round to round, and
ratios are taken within a round. A contender starts once in a round, and the levels run one after
the other. No page is on swap between two levels.

A run that exceeds its time limit is cut off. Its figures are bounds: lower for times, upper for
speeds. The table marks them, and a ratio may use them when the bound decides it.

A figure named `cpu` is the application's processor time. The processor time of the contender's
processes is added to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench.applications import TooSlowError
from tools.bench.applications.sampling import Sampling
from tools.bench.contenders import REGISTRY
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.figures import Panel, aligned, bars, interval, machine
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.workloads.report import SUBJECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tools.bench.applications import Application, Level
    from tools.bench.contenders import Contender

NO_SWAP = "none"


@dataclass(frozen=True, slots=True)
class JobRun:
    """One contender at one level in one round.

    Attributes:
        contender, level: their names.
        round: the number of the round, from 0.
        figures: the figures that the application measured.
        cut: whether the run was cut off, so that the figures are bounds.
        memory_mib: the largest reading of the contender's memory, in MiB; 0 if it keeps no pages
            in memory.
        error: why there are no figures; empty when the run was verified or cut off.
    """

    contender: str
    round: int
    level: str
    figures: Mapping[str, float]
    cut: bool = False
    memory_mib: float = 0.0
    error: str = ""


def run_level(
    application: Application, contender: Contender, number: int, level: Level, limit: float
) -> JobRun:
    """Run one level on a started contender."""
    figures: Mapping[str, float] = {}
    cut, error = False, ""
    sampling = Sampling(contender)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sampling)
            cgroup: Path | None = None
            if level.memory_mib is not None:
                cgroup = stack.enter_context(
                    MemoryCgroup(f"bench-{application.name}", level.memory_mib * MIB)
                ).path
            figures = application.run(level, cgroup, limit)
    except TooSlowError as exc:
        figures, cut = exc.figures, True
    except HarnessError as exc:
        error = str(exc)
    if "cpu" in figures:
        figures = {**figures, "cpu": figures["cpu"] + sampling.cpu_s}
    return JobRun(contender.name, number, level.name, figures, cut, sampling.peak / MIB, error)


def _round(
    application: Application,
    name: str,
    number: int,
    levels: Sequence[Level],
    limit: float,
    size: int,
) -> Iterator[JobRun]:
    contender = REGISTRY[name]()
    try:
        try:
            contender.start(size)
            for level in levels:
                # With a limit and no swap, the OOM killer would end the run.
                if name != NO_SWAP or level.memory_mib is None:
                    yield run_level(application, contender, number, level, limit)
        finally:
            contender.stop()
    except HarnessError as exc:
        yield JobRun(name, number, levels[0].name, {}, error=str(exc))


def run_all(
    application: Application,
    names: Sequence[str],
    levels: Sequence[Level],
    *,
    rounds: int,
    limit: float,
    device_mib: int,
    say: Callable[[str], None],
) -> list[JobRun]:
    """Run all rounds; return all runs, with the failed ones.

    Args:
        application: a prepared application.
        names: names of contenders in `REGISTRY`.
        levels: the levels of pressure, in this order.
        rounds: the number of rounds; each contender runs once in each.
        limit: the time limit of one run in seconds.
        device_mib: the size of the swap device in MiB.
        say: takes a line of progress.
    """
    runs: list[JobRun] = []
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            for run in _round(application, name, number, levels, limit, device_mib * MIB):
                runs.append(run)
                figures = ", ".join(f"{key} {value:.1f}" for key, value in run.figures.items())
                ending = " (cut off)" if run.cut else ""
                say(
                    f"round {number + 1}/{rounds} {name}, {run.level}:"
                    f" {run.error or figures + ending}"
                )
    return runs


def medians(runs: Sequence[JobRun], level: str) -> dict[str, dict[str, float]]:
    """Return the medians at a level by contender and figure, over the runs without error.

    `memory_mib` is one of the figures.
    """
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.contender for run in runs):
        own = [run for run in runs if (run.contender, run.level, run.error) == (name, level, "")]
        keys = set.intersection(*(set(run.figures) for run in own)) if own else set()
        if keys:
            result[name] = {key: median(run.figures[key] for run in own) for key in sorted(keys)}
            result[name]["memory_mib"] = median(run.memory_mib for run in own)
    return result


def ratios(runs: Sequence[JobRun], level: str, figure: str, rival: str) -> list[float]:
    """Return the subject's figure ÷ the rival's, for each round in which both have one.

    A round in which the subject was cut off does not count.
    """
    found = []
    for number in sorted({run.round for run in runs}):
        pair = {
            run.contender: run
            for run in runs
            if (run.round, run.level, run.error) == (number, level, "")
        }
        ours, theirs = pair.get(SUBJECT), pair.get(rival)
        if (
            ours
            and theirs
            and not ours.cut
            and figure in ours.figures
            and theirs.figures.get(figure)
        ):
            found.append(ours.figures[figure] / theirs.figures[figure])
    return found


def middle(values: Sequence[float]) -> float | None:
    """Return the median; None for no values."""
    return median(values) if values else None


def table(application: Application, runs: Sequence[JobRun]) -> str:
    """Return a table for each level: medians, and the subject's ratio in the first figure."""
    lines: list[str] = []
    figures = list(application.columns)
    for level in dict.fromkeys(run.level for run in runs):
        found = medians(runs, level)
        headings = [column.heading for column in application.columns.values()]
        rows = [[level, *headings, f"{SUBJECT} ÷ it", "memory MiB", "verified"]]
        for name in dict.fromkeys(run.contender for run in runs if run.level == level):
            own = [run for run in runs if (run.contender, run.level) == (name, level)]
            cut = any(run.cut for run in own)
            values = found.get(name, {})
            cells = [
                _cell(values.get(key), cut, application.columns[key].more_is_better)
                for key in figures
            ]
            against = [] if name == SUBJECT else ratios(runs, level, figures[0], name)
            cells.append(_ratio(against))
            cells.append(f"{values['memory_mib']:.0f}" if values.get("memory_mib") else "-")
            rows.append(
                [name, *cells, f"{sum(not run.error and not run.cut for run in own)}/{len(own)}"]
            )
        lines += [aligned(rows), ""]
    return "\n".join(lines[:-1])


def _ratio(values: Sequence[float]) -> str:
    """Return the median as text; with six rounds or more, with its 95 % interval too."""
    if len(values) < 6:
        return f"{median(values):.3f}" if values else "-"
    return "{:.3f} ({:.3f} to {:.3f})".format(median(values), *interval(values))


def _cell(value: float | None, cut: bool, more_is_better: bool) -> str:  # noqa: FBT001
    if value is None:
        return "-"
    sign = ("<" if more_is_better else ">") if cut else ""
    return f"{sign}{value:.1f}"


def plot(
    application: Application,
    by_level: Mapping[str, Mapping[str, Mapping[str, float]]],
    path: Path,
    source: str = "",
) -> None:
    """Draw the first two figures from medians by level, contender and figure."""
    levels = list(by_level)
    names = list(dict.fromkeys(name for found in by_level.values() for name in found))
    panels = []
    for figure, column in list(application.columns.items())[:2]:
        heights = {
            name: [by_level[level].get(name, {}).get(figure) for level in levels] for name in names
        }
        panels.append(
            Panel(
                application.name,
                column.heading,
                [level.replace(", ", "\n") for level in levels],
                heights,
            )
        )
    bars(panels, path, source)


def as_json(
    application: Application, runs: Sequence[JobRun], skipped: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document about the runs, for a JSON file."""
    levels = list(dict.fromkeys(run.level for run in runs))
    rivals = [name for name in dict.fromkeys(run.contender for run in runs) if name != SUBJECT]
    return {
        "workload": application.name,
        "machine": machine(),
        "skipped": dict(skipped),
        "runs": [dataclasses.asdict(run) for run in runs],
        "medians": {level: medians(runs, level) for level in levels},
        "ratios": {
            level: {
                rival: {key: ratios(runs, level, key, rival) for key in application.columns}
                for rival in rivals
            }
            for level in levels
        },
    }
