# SPDX-License-Identifier: GPL-2.0-or-later
"""From runs to medians, ratios, the table, the JSON and the figures that have to hold.

Ratios are computed pair by pair within a round and their median is shown: on a shared machine a round may be
slow as a whole, and the quotient of two medians would mix rounds.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .rounds import Plan, Run

SUBJECT = "zswapd"
FIGURES = ("out", "seq", "random", "p50", "p99", "memory", "peak")
HEADINGS = {
    "out": "out MiB/s",
    "seq": "in seq MiB/s",
    "random": "in random µs",
    "p50": "p50 µs",
    "p99": "p99 µs",
    "memory": "memory MiB",
    "peak": "peak MiB",
}
MORE_IS_BETTER = frozenset({"out", "seq"})


def medians(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return contender → figure → median over its runs without error."""
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.contender for run in runs):
        each = [run.figures() for run in runs if run.contender == name and not run.error]
        keys = set.intersection(*(set(figures) for figures in each)) if each else set()
        result[name] = {key: median(figures[key] for figures in each) for key in FIGURES if key in keys}
    return result


def ratios(runs: Sequence[Run], rival: str) -> dict[str, list[float]]:
    """Return figure → subject ÷ rival, one value for each round in which both ran without error."""
    found: dict[str, list[float]] = {}
    for number in sorted({run.round for run in runs}):
        pair = {run.contender: run.figures() for run in runs if run.round == number and not run.error}
        if SUBJECT not in pair or rival not in pair:
            continue
        for key in FIGURES:
            if key in pair[SUBJECT] and pair[rival].get(key):
                found.setdefault(key, []).append(pair[SUBJECT][key] / pair[rival][key])
    return found


@dataclass(frozen=True, slots=True)
class Figure:
    """One claim about zswapd and whether it held.

    Attributes:
        name: the claim, in words.
        value: what was measured; None when it was not.
        bound: what it has to reach, or not to pass.
        at_least: whether `bound` is a lower bound.
    """

    name: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether it was measured and keeps its bound."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        """Return it as a line of text."""
        shown = "not measured" if self.value is None else f"{self.value:.3f}"
        sign = "≥" if self.at_least else "≤"
        return f"{'holds' if self.holds else 'FAILS'}  {self.name}: {shown} ({sign} {self.bound:g})"


def figures_to_hold(runs: Sequence[Run]) -> list[Figure]:
    """Return the claims that --check holds zswapd to."""
    against = {key: median(values) for key, values in ratios(runs, "nbdkit-zstd").items()}
    faults = against.get("random")
    subject = [run for run in runs if run.contender == SUBJECT]
    density = [run.memory.pool / run.memory.stored for run in subject if run.memory.stored]
    verified = sum(run.verified for run in subject) / len(subject) if subject else None
    wrong = sum(run.wrong_pages for run in runs)
    return [
        Figure("swap-out throughput, zswapd ÷ nbdkit", against.get("out"), 2.0, at_least=True),
        Figure("sequential swap-in, zswapd ÷ nbdkit", against.get("seq"), 2.0, at_least=True),
        Figure("random faults, nbdkit ÷ zswapd (time)", 1 / faults if faults else None, 2.0, at_least=True),
        Figure("pool ÷ stored objects after the fill", max(density) if density else None, 1.10, at_least=False),
        Figure("share of zswapd's runs with every byte verified", verified, 1.0, at_least=True),
        Figure("pages that differed, over all contenders", float(wrong), 0.0, at_least=False),
    ]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])


def table(runs: Sequence[Run]) -> str:
    """Return the table of medians with the ratios below it."""
    rows = [["median of rounds", *(HEADINGS[key] for key in FIGURES), "verified"]]
    for name, values in medians(runs).items():
        own = [run for run in runs if run.contender == name]
        cells = [f"{values[key]:.1f}" if key in values else "-" for key in FIGURES]
        rows.append([name, *cells, f"{sum(run.verified for run in own)}/{len(own)}"])
    for rival in dict.fromkeys(run.contender for run in runs if run.contender != SUBJECT):
        against = ratios(runs, rival)
        if against:
            cells = [f"{median(against[key]):.2f}" if key in against else "-" for key in FIGURES]
            rows.append([f"{SUBJECT} ÷ {rival}", *cells, ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_row(row, widths).rstrip() for row in rows)


def machine(page_cluster: int) -> dict[str, Any]:
    """Return what the figures were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model[0].partition(": ")[2] if model else platform.machine(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE,
        "page_size": mmap.PAGESIZE,
        "page_cluster": page_cluster,
        "python": platform.python_version(),
    }


def as_json(runs: Sequence[Run], plan: Plan, page_cluster: int, skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return all there is to know about the runs, for a file."""
    rivals = dict.fromkeys(run.contender for run in runs if run.contender != SUBJECT)
    return {
        "machine": machine(page_cluster),
        "plan": dataclasses.asdict(plan),
        "skipped": dict(skipped),
        "runs": [{**dataclasses.asdict(run), "figures": run.figures(), "verified": run.verified} for run in runs],
        "medians": medians(runs),
        "ratios": {rival: ratios(runs, rival) for rival in rivals},
        "figures_to_hold": [{**dataclasses.asdict(figure), "holds": figure.holds} for figure in figures_to_hold(runs)],
    }
