# SPDX-License-Identifier: GPL-2.0-or-later
"""The report of the raw workload: medians, ratios, table, JSON, figures that have to hold.

A ratio is computed within each round, and the table shows the median of the ratios. On a shared
machine a whole round may be slow, and the quotient of two medians would mix rounds.
"""

from __future__ import annotations

import dataclasses
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench.harness.figures import Figure, aligned, machine, told

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tools.bench.workloads.rounds import Plan, Run

SUBJECT = "zswapd"
HEADINGS = {
    "out": "out MiB/s",
    "seq": "in seq MiB/s",
    "random": "in random µs",
    "p50": "p50 µs",
    "p99": "p99 µs",
    "p999": "p99.9 µs",
    "mixed": "mixed MiB/s",
    "mixed_p50": "p50 µs",
    "mixed_p99": "p99 µs",
    "mixed_p999": "p99.9 µs",
    "off": "swapoff MiB/s",
    "memory": "memory MiB",
    "peak": "peak MiB",
}
FIGURES = tuple(HEADINGS)


def medians(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the medians by contender and figure, over the runs without error."""
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.contender for run in runs):
        each = [run.figures() for run in runs if run.contender == name and not run.error]
        keys = set.intersection(*(set(figures) for figures in each)) if each else set()
        result[name] = {
            key: median(figures[key] for figures in each) for key in FIGURES if key in keys
        }
    return result


def ratios(runs: Sequence[Run], rival: str) -> dict[str, list[float]]:
    """Return subject ÷ rival by figure, a value for each round in which both had no error."""
    found: dict[str, list[float]] = {}
    for number in sorted({run.round for run in runs}):
        pair = {
            run.contender: run.figures() for run in runs if run.round == number and not run.error
        }
        if SUBJECT not in pair or rival not in pair:
            continue
        for key in FIGURES:
            if key in pair[SUBJECT] and pair[rival].get(key):
                found.setdefault(key, []).append(pair[SUBJECT][key] / pair[rival][key])
    return found


def figures_to_hold(runs: Sequence[Run]) -> list[Figure]:
    """Return the claims that --check tests."""
    zram = {key: median(values) for key, values in ratios(runs, "zram-lz4").items()}
    nbdkit = {key: median(values) for key, values in ratios(runs, "nbdkit-zstd").items()}
    faults = nbdkit.get("random")
    subject = [run for run in runs if run.contender == SUBJECT]
    density = [run.memory.pool / run.memory.stored for run in subject if run.memory.stored]
    verified = sum(run.verified for run in subject) / len(subject) if subject else None
    wrong = sum(run.wrong_pages for run in runs)
    return [
        Figure("swap-out throughput, zswapd ÷ zram", zram.get("out"), 1.3, at_least=True),
        Figure("sequential swap-in, zswapd ÷ zram", zram.get("seq"), 1.0, at_least=True),
        Figure("random faults, zswapd ÷ zram (time)", zram.get("random"), 2.0, at_least=False),
        Figure("memory at its peak, zswapd ÷ zram", zram.get("peak"), 1.05, at_least=False),
        Figure("swap-out throughput, zswapd ÷ nbdkit", nbdkit.get("out"), 3.0, at_least=True),
        Figure("sequential swap-in, zswapd ÷ nbdkit", nbdkit.get("seq"), 3.0, at_least=True),
        Figure(
            "random faults, nbdkit ÷ zswapd (time)",
            1 / faults if faults else None,
            3.0,
            at_least=True,
        ),
        Figure(
            "pool ÷ stored objects after the fill",
            max(density) if density else None,
            1.10,
            at_least=False,
        ),
        Figure("share of zswapd's runs with every byte verified", verified, 1.0, at_least=True),
        Figure("pages that differed, over all contenders", float(wrong), 0.0, at_least=False),
    ]


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
    return aligned(rows)


def as_json(runs: Sequence[Run], plan: Plan, skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return the document about the runs, for a JSON file."""
    rivals = dict.fromkeys(run.contender for run in runs if run.contender != SUBJECT)
    return {
        "workload": "raw",
        "machine": machine(),
        "plan": dataclasses.asdict(plan),
        "skipped": dict(skipped),
        "runs": [
            {**dataclasses.asdict(run), "figures": run.figures(), "verified": run.verified}
            for run in runs
        ],
        "medians": medians(runs),
        "ratios": {rival: ratios(runs, rival) for rival in rivals},
        "figures": told(figures_to_hold(runs)),
    }
