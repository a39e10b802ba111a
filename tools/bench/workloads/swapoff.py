# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench swapoff`.

It measures the swapoff of a full device.

    scripts/bench swapoff                      256 MiB to 2 GiB, each full to the last slot
    scripts/bench swapoff --plot FILE.svg --json FILE

The raw workload's data is 48 MiB larger than the device. MADV_PAGEOUT pages all of it out, until no
slot is left. Then the limit of its cgroup goes, and swapoff reads everything back, page by page.
After that the workload verifies every byte.

Limits: the kernel looks for the users of each slot in all processes with swapped pages; here only
one process has any.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.contenders import REGISTRY
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.figures import (
    COLOURS,
    Figure,
    aligned,
    machine,
    progress,
    quiet_pyplot,
    save,
    told,
)
from tools.bench.harness.system import MIB, HarnessError, memory_available, swaps
from tools.bench.harness.workload import Workload, WorkloadOptions
from tools.bench.workloads.raw import usable
from tools.bench.workloads.report import SUBJECT
from tools.bench.workloads.rounds import swap_everything_off

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tools.bench.contenders import Contender

CONTENDERS = ("zram-lz4", "nbdkit-zstd", "zswapd")
SIZES_MIB = (256, 1024, 2048)
MEMORY_MIB = 192
"""MiB that the cgroup may keep in memory; other programs may put as many MiB onto the device."""
BEYOND_MIB = 48
"""MiB by which the data is larger than the device."""
TIME_LIMIT_S = 400
FULL = 0.99


@dataclass(frozen=True, slots=True)
class Measurement:
    """The swapoff of one full device.

    Attributes:
        contender: the contender's name.
        size_mib: the size of the device in MiB.
        used: the share of its slots in use.
        seconds: the time of swapoff.
        rate: MiB/s during swapoff.
        wrong_pages: the pages that differed after swapoff.
        error: why there is no measurement, or empty.
    """

    contender: str
    size_mib: int
    used: float = 0.0
    seconds: float = 0.0
    rate: float = 0.0
    wrong_pages: int = 0
    error: str = ""


def measure(contender: Contender, size_mib: int) -> Measurement:
    """Fill a contender's device, run swapoff, and verify; always stop the contender."""
    needed = (2 * size_mib + 1024) * MIB
    if memory_available() < needed:
        raise HarnessError(
            f"{size_mib} MiB need {needed // MIB} MiB of memory, {memory_available() // MIB} are"
            " available"
        )
    options = WorkloadOptions(
        size_mib + BEYOND_MIB, phases=("fill", "settle", "verify"), time_limit=TIME_LIMIT_S
    )
    used, seconds, wrong = 0.0, 0.0, 0
    try:
        try:
            contender.start(size_mib * MIB)
            size = sum(area.size for area in swaps() if area.path in contender.devices())
            with (
                MemoryCgroup(f"bench-{contender.name}", MEMORY_MIB * MIB) as cgroup,
                Workload(options, cgroup.path) as workload,
            ):
                for phase in workload.phases():
                    wrong = phase.mismatches
                    if phase.name == "settle":
                        cgroup.set_limit(2 * (size_mib + BEYOND_MIB) * MIB)
                        used, seconds = swap_everything_off(contender)
        finally:
            contender.stop()
    except HarnessError as exc:
        return Measurement(contender.name, size_mib, error=str(exc))
    return Measurement(contender.name, size_mib, used * MIB / size, seconds, used / seconds, wrong)


def run(names: Sequence[str], sizes: Sequence[int]) -> list[Measurement]:
    """Measure each contender at each size."""
    found = []
    for size in sizes:
        for name in names:
            found.append(one := measure(REGISTRY[name](), size))
            shown = (
                one.error
                or f"{one.rate:.0f} MiB/s, {one.seconds:.1f} s, {one.used * 100:.1f} % in use"
            )
            progress(f"{size} MiB, {name}: {shown}")
    return found


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as a table of text."""
    rows = [["device MiB", "contender", "in use %", "swapoff s", "MiB/s", "verified"]]
    for one in found:
        numbers = (
            [f"{one.used * 100:.1f}", f"{one.seconds:.2f}", f"{one.rate:.0f}"]
            if not one.error
            else ["-"] * 3
        )
        rows.append(
            [
                str(one.size_mib),
                one.contender,
                *numbers,
                "no" if one.error or one.wrong_pages else "yes",
            ]
        )
    return aligned(rows)


def figures_to_hold(found: Sequence[Measurement]) -> list[Figure]:
    """Return the claims: full devices, all bytes back, equal cost of a page at every size."""
    ours = [one for one in found if one.contender == SUBJECT]
    rates = {one.size_mib: one.rate for one in ours if not one.error}
    slower = rates[min(rates)] / rates[max(rates)] if len(rates) > 1 else None
    return [
        Figure(
            "swapoff: share of the device in use",
            min((one.used for one in ours), default=None),
            FULL,
            at_least=True,
        ),
        Figure(
            "swapoff: pages that differed",
            float(sum(one.wrong_pages for one in found)),
            0.0,
            at_least=False,
        ),
        Figure(
            "swapoff: a page of the largest device ÷ of the smallest, time",
            slower,
            1.2,
            at_least=False,
        ),
    ]


def plot(found: Sequence[Mapping[str, Any]], path: Path, source: str = "") -> None:
    """Draw throughput and seconds by device size; `found` has the document's measurements."""
    pyplot = quiet_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for name in dict.fromkeys(one["contender"] for one in found):
        own = [one for one in found if one["contender"] == name and not one["error"]]
        for axis, key in zip(axes, ("rate", "seconds"), strict=True):
            sizes = [one["size_mib"] for one in own]
            axis.plot(
                sizes,
                [one[key] for one in own],
                marker="o",
                markersize=3,
                label=name,
                color=COLOURS.get(name),
            )
    for axis, unit in zip(axes, ("MiB/s", "s"), strict=True):
        axis.set_xlabel("MiB on the device, all of it in use")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    save(figure, path, source)


def as_json(found: Sequence[Measurement], skipped: Mapping[str, str]) -> dict[str, Any]:
    """Return the document, for a JSON file."""
    return {
        "workload": "swapoff",
        "machine": machine(),
        "skipped": dict(skipped),
        "measurements": [asdict(one) for one in found],
        "figures": told(figures_to_hold(found)),
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench swapoff", description="Measures the swapoff of a full device."
    )
    known = arguments.names(lambda: list(REGISTRY), "contender")
    shown = ",".join(CONTENDERS)
    sizes = ",".join(map(str, SIZES_MIB))
    parser.add_argument(
        "--contenders", type=known, default=CONTENDERS, metavar="LIST", help=f"default {shown}"
    )
    parser.add_argument(
        "--sizes",
        type=arguments.numbers(64, 1 << 16),
        default=SIZES_MIB,
        metavar="LIST",
        help=f"MiB (default {sizes})",
    )
    parser.add_argument(
        "--plot", type=arguments.picture, metavar="FILE", help="draw the rates into FILE"
    )
    arguments.add_results(parser)
    args = parser.parse_args(argv)
    names, skipped = usable(args.contenders)
    found = run(names, args.sizes)
    document = as_json(found, skipped)
    figures = figures_to_hold(found)
    print(table(found), "\n".join(figure.line() for figure in figures), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if args.plot:
        plot(document["measurements"], args.plot)
    if args.check:
        return 0 if all(figure.holds for figure in figures) else 1
    return (
        1
        if any(one.wrong_pages or (one.error and one.contender == SUBJECT) for one in found)
        else 0
    )
