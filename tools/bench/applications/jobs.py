# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs an application (applications/) over all contenders: rounds, table, ratios, JSON, plot.

As in rounds.py: each contender is alone on the box, the order turns from round to round, ratios are
taken within a round. A contender is put on once a round and the levels run one after the other;
between two of them nothing is on swap.

A run that is not done within its time is cut off; what it showed until then is a bound (times at
least, speeds at most), marked as one in the table, and good enough for a ratio that the bound
decides.

An application that measures its own processor time (a figure named `cpu`) is charged with that of
the contender's processes, too.
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
        contender, level: by name.
        round: from 0.
        figures: what the application measured.
        cut: whether it was not done in time, so that the figures are bounds.
        memory_mib: the most that the contender took, of the readings; 0 if it keeps nothing in
            memory.
        error: why there are no figures; empty when it ran to its end, verified, or was cut.
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
    """Run one level on a contender that is on."""
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
                if (
                    name != NO_SWAP or level.memory_mib is None
                ):  # with a limit and no swap there is only the OOM killer
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
    """Run all rounds and return all runs, those that failed included.

    Args:
        application: made ready.
        names: of contenders, in `REGISTRY`.
        levels: of pressure, in this order.
        rounds: how often each contender runs.
        limit: seconds of one run.
        device_mib: size of the swap device.
        say: takes one line of progress at a time.
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
    """Return contender → figure → median at a level, over the runs without error.

    Memory_mib among the figures.
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
    """Return subject ÷ rival for each round in which both have the figure.

    The subject's runs that were cut are left out.
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
    """Return the median, None of nothing."""
    return median(values) if values else None


def table(application: Application, runs: Sequence[JobRun]) -> str:
    """Return a table for each level.

    Medians, and the subject's ratio to each rival in the first figure.
    """
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
    """Return the median, with the interval it lies in where there are rounds enough to tell one."""
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
    """Draw the first two figures; `by_level` has the medians by level, contender and figure."""
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
    """Return all there is to know about the runs, for a file."""
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
