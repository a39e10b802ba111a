# SPDX-License-Identifier: GPL-2.0-or-later
"""The raw workload (workload.c) on all contenders.

It measures the cost of a page on its way out and in, and the memory that it takes.

    scripts/bench raw                       print the table, from three rounds of 1 GiB through
                                            256 MiB
    scripts/bench raw --quick               run one round with a quarter of the data
    scripts/bench raw --check --json FILE   also exit non-zero when a figure does not hold
    scripts/bench files                     compare one, two and four swap files

Limits: other programs on the machine distort the figures, and one round is too few for a ratio.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.contenders import REGISTRY
from tools.bench.harness.figures import Panel, bars, progress
from tools.bench.harness.system import HarnessError, page_cluster_set
from tools.bench.workloads import report
from tools.bench.workloads.rounds import Plan, run_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tools.bench.harness.figures import Figure
    from tools.bench.workloads.rounds import Run

CONTENDERS = ("loop-ram", "file", "zram-lzo-rle", "zram-lz4", "nbdkit-zstd", "zswapd")
FILES = ("zswapd", "zswapd-2", "zswapd-4")


def parse(argv: Sequence[str], contenders: Sequence[str] = CONTENDERS) -> argparse.Namespace:
    """Return the options of the raw workload."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench raw", description="Compares zswapd with its rivals as a swap device."
    )
    known = arguments.names(lambda: list(REGISTRY), "contender")
    parser.add_argument(
        "--contenders",
        type=known,
        default=contenders,
        metavar="LIST",
        help=f"contenders (default {','.join(contenders)})",
    )
    parser.add_argument(
        "--once",
        type=known,
        default=[],
        metavar="LIST",
        help="contenders that run in the first round only",
    )
    for name, default, text in (
        ("--rounds", 3, "runs of each one (default 3)"),
        ("--data-mib", 1024, "data of the workload (default 1024)"),
        ("--memory-mib", 256, "its memory cgroup (default 256)"),
        ("--device-mib", 2560, "size of each swap device (default 2560)"),
        ("--faults", 0, "random faults to time (default a quarter of the pages)"),
    ):
        parser.add_argument(name, type=int, default=default, help=text)
    parser.add_argument(
        "--cpu", type=int, help="processor that the workload stays on (default: any)"
    )
    parser.add_argument(
        "--page-cluster",
        type=int,
        choices=range(11),
        metavar="N",
        help="vm.page-cluster during the run (default: unchanged)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="256 MiB through 64 MiB, one round: a trial, not a measurement",
    )
    parser.add_argument(
        "--plot", type=arguments.picture, metavar="FILE", help="draw the medians into FILE"
    )
    arguments.add_results(parser)
    args = parser.parse_args(argv)
    if min(args.rounds, args.data_mib, args.memory_mib) < 1 or args.device_mib < 2 * args.data_mib:
        parser.error(
            "rounds and sizes are at least 1, and --device-mib is at least twice --data-mib: on a"
            " smaller device the kernel frees swap slots early, which is another experiment"
        )
    if args.quick:
        args.rounds, args.data_mib, args.memory_mib = 1, 256, 64
    return args


def usable(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the contenders that can run here, and the reason for each of the others.

    Raises:
        HarnessError: no contender can run.
    """
    skipped = {name: reason for name in names if (reason := REGISTRY[name]().missing())}
    for name, reason in skipped.items():
        progress(f"{name} is left out: {reason}")
    there = [name for name in names if name not in skipped]
    if not there:
        raise HarnessError("no contender can run here")
    return there, skipped


def measure(args: argparse.Namespace) -> tuple[list[Run], dict[str, Any]]:
    """Run all rounds; return the runs, and the document about them."""
    plan = Plan(args.data_mib, args.memory_mib, args.device_mib, args.rounds, args.faults, args.cpu)
    names, skipped = usable(args.contenders)
    with page_cluster_set(args.page_cluster) as cluster:
        progress(
            f"{plan.data_mib} MiB through {plan.memory_mib} MiB, vm.page-cluster {cluster},"
            f" {plan.rounds} round(s)"
        )
        runs = run_all(names, plan, progress, args.once)
        return runs, report.as_json(runs, plan, skipped)


def main(argv: Sequence[str], contenders: Sequence[str] = CONTENDERS) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    args = parse(argv, contenders)
    runs, document = measure(args)
    print(report.table(runs))
    held: list[Figure] = report.figures_to_hold(runs)
    if args.check:
        print("\n".join(["", *(figure.line() for figure in held)]))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if args.plot:
        plot(document["medians"], args.plot)
    if args.check:
        return 0 if all(figure.holds for figure in held) else 1
    # A rival that the kernel killed only loses its row of the table. A failure of zswapd is an
    # error, and so is a wrong page of any contender.
    return (
        1
        if any(run.wrong_pages or (run.error and run.contender == report.SUBJECT) for run in runs)
        else 0
    )


def plot(medians: Mapping[str, Mapping[str, float]], path: Path, source: str = "") -> None:
    """Draw the medians by contender and figure: throughput, faults, memory."""
    found = {name: values for name, values in medians.items() if values}
    panels = [
        _panel(
            "throughput",
            "MiB/s",
            {"out": "out", "seq": "in,\nsequential", "mixed": "mixed", "off": "swapoff"},
            found,
        ),
        _panel("random faults", "µs", {"random": "mean", "p50": "p50", "p99": "p99"}, found),
        _panel("mixed, faults", "µs", {"mixed_p50": "p50", "mixed_p99": "p99"}, found),
        _panel("memory", "MiB", {"memory": "after fill", "peak": "peak"}, found),
    ]
    bars(panels, path, source)


def _panel(
    title: str, unit: str, keys: dict[str, str], found: Mapping[str, Mapping[str, float]]
) -> Panel:
    heights = {name: [values.get(key) for key in keys] for name, values in found.items()}
    return Panel(title, unit, list(keys.values()), heights)
