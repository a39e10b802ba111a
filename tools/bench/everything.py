# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs `scripts/bench all` and `scripts/bench --check`.

They measure the figures of docs/benchmarks.md, part by part.

    scripts/bench all                    measure all parts; write docs/figures/*.json,
                                         docs/benchmarks.md and its plots
    scripts/bench all --parts raw,scale  measure these parts; the page keeps the others
    scripts/bench all --quick            a trial of all parts in a few minutes, marked as a trial
    scripts/bench --check                measure the parts with a figure that has to hold; print a
                                         line for each figure, exit 1 if one fails
    scripts/bench --check --from DIR     the same, from stored figures

Each part is written as soon as it is done, so --parts continues an interrupted run. All parts take
half an hour, `raw` a third of that, on a machine that does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench import arguments, benchmarks
from tools.bench.applications import APPLICATIONS
from tools.bench.applications.runner import measure_application
from tools.bench.harness import system
from tools.bench.harness.figures import Figure, progress
from tools.bench.harness.system import HarnessError
from tools.bench.workloads import cache, density, profile, raw, scale, shrink, swapoff

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TOP = Path(__file__).resolve().parents[2]

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the measurement.

    Attributes:
        measure: the function that returns the document; its argument is whether it is a trial.
        minutes: the minutes that it takes on two processors.
        holds: whether the part has figures that have to hold.
    """

    measure: Callable[[bool], Document]
    minutes: float
    holds: bool


def _raw(quick: bool) -> Document:  # noqa: FBT001
    once = ["zram-lzo-rle", "file", "loop-ram", "zswapd-2", "zswapd-4"]
    names = ",".join(["zram-lz4", "nbdkit-zstd", "zswapd", *once])
    _, document = raw.measure(
        raw.parse(
            ["--contenders", names, "--once", ",".join(once), *(["--quick"] if quick else [])]
        )
    )
    for run in document["runs"]:
        # The details are about a hundred counters, which no table shows.
        run["memory"] = {**run["memory"], "details": {}}
    return document


def _application(name: str, *options: str) -> Callable[[bool], Document]:
    def measure(quick: bool) -> Document:  # noqa: FBT001
        given = ["--quick", "--limit", "60", "--device-mib", "256"] if quick else list(options)
        table, document = measure_application(name, given)
        print(table, flush=True)
        return document

    return measure


def _scale(quick: bool) -> Document:  # noqa: FBT001
    return scale.as_json(scale.run([12, 14] if quick else [16, 18, 20, 24], "small"))


def _swapoff(quick: bool) -> Document:  # noqa: FBT001
    names, skipped = raw.usable(["zram-lz4", "zswapd"])
    return swapoff.as_json(swapoff.run(names, (128, 192) if quick else swapoff.SIZES_MIB), skipped)


def _shrink(quick: bool) -> Document:  # noqa: FBT001
    causes = shrink.CAUSES[:1] if quick else shrink.CAUSES  # a trial makes no shortage
    return shrink.as_json(shrink.run(32 if quick else 1024, shrink.ALLOCATORS, causes))


def _cache(quick: bool) -> Document:  # noqa: FBT001
    if absent := system.missing_programs(["nbdkit", "nbdfuse"]):
        raise HarnessError(f"cache is left out, not installed: {', '.join(absent)}")
    return cache.as_json(cache.run(passes={"device": 1, "volume": 1}) if quick else cache.run())


def _density(quick: bool) -> Document:  # noqa: FBT001
    return density.as_json(density.run(2000 if quick else 60_000))


def _profile(quick: bool) -> Document:  # noqa: FBT001
    if reason := profile.missing():
        raise HarnessError(f"profile is left out: {reason}")
    plan = (1, 96, 32) if quick else (2, 1024, 256)
    return profile.as_json(profile.run([*TREES, (profile.HERE, None)], *plan))


TREES: list[tuple[str, Path]] = []
"""Further checkouts to profile, from --tree."""

COMPILE = (
    "--contenders",
    "file-slow,file,zram-lz4,nbdkit-zstd,zswapd",
    "--levels",
    "3,4",
    "--rounds",
    "2",
    "--limit",
    "50",
)
DATABASE = (
    "--contenders",
    "file-slow,file,zram-lz4,nbdkit-zstd,zswapd",
    "--levels",
    "3",
    "--rounds",
    "1",
    "--limit",
    "50",
)
TABS = (
    "--contenders",
    "file-slow,file,zram-lz4,nbdkit-zstd,zswapd",
    "--levels",
    "3",
    "--rounds",
    "1",
    "--limit",
    "60",
)

PARTS: dict[str, Part] = {
    "raw": Part(_raw, 9, holds=True),
    "scale": Part(_scale, 4, holds=True),
    "nopressure": Part(_application("nopressure", "--contenders", "none,zswapd"), 3.5, holds=True),
    "compile": Part(_application("compile", *COMPILE), 4, holds=True),
    "shrink": Part(_shrink, 2, holds=True),
    "swapoff": Part(_swapoff, 2, holds=True),
    "cache": Part(_cache, 0.5, holds=True),
    "density": Part(_density, 1, holds=True),
    "profile": Part(_profile, 1.5, holds=False),
    "database": Part(_application("database", *DATABASE), 2, holds=False),
    "tabs": Part(_application("tabs", *TABS), 2, holds=False),
}
"""The parts by name; those with figures that have to hold come first."""


def taken(document: Document, *, quick: bool, seconds: float) -> Document:
    """Return a document with its date, its commit, its minutes and whether it is a trial."""
    command = ["git", "-C", str(TOP), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    return {
        **document,
        "quick": quick,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": found.stdout.strip() or "unknown",
        "minutes": round(seconds / 60, 1),
    }


def measure(
    names: Sequence[str], directory: Path | None, *, quick: bool
) -> tuple[dict[str, Document], list[str]]:
    """Measure parts, and write each to `directory` as soon as it is done.

    Returns:
        The documents, and the names of the parts that could not be measured.
    """
    found: dict[str, Document] = {}
    failed = []
    for name in names:
        part = PARTS[name]
        progress(f"=== {name}" + ("" if quick else f", about {part.minutes:g} minutes"))
        began = time.monotonic()
        try:
            document = part.measure(quick)
        except (HarnessError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as exc:
            # The other parts take half an hour, so a failed one does not end the run.
            progress(f"{name}: {exc}")
            failed.append(name)
            continue
        found[name] = taken(document, quick=quick, seconds=time.monotonic() - began)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{name}.json").write_text(
                json.dumps(found[name], indent=1, ensure_ascii=False) + "\n"
            )
    return found, failed


def claims(found: Mapping[str, Document]) -> list[Figure]:
    """Return the figures that have to hold, of all parts.

    A missing part counts as one figure that does not hold.
    """
    figures = []
    for name, part in PARTS.items():
        if not part.holds:
            continue
        told = found.get(name, {}).get("figures") or [
            {"name": name, "value": None, "bound": 0.0, "at_least": True}
        ]
        figures += [
            Figure(one["name"], one["value"], one["bound"], one["at_least"]) for one in told
        ]
    return figures


def main(argv: Sequence[str]) -> int:
    """Measure, write and draw; return 1 if a part could not be measured, else 0."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench all", description="Measures every figure of docs/benchmarks.md."
    )
    known = arguments.names(lambda: list(PARTS), "part")
    parser.add_argument(
        "--parts",
        type=known,
        default=list(PARTS),
        metavar="LIST",
        help=f"parts, out of {', '.join(PARTS)} (default all)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small amounts, one round: a trial, no measurement"
    )
    parser.add_argument(
        "--tree",
        type=profile.tree,
        action="append",
        default=[],
        metavar="LABEL=DIR",
        help="another checkout for the profile",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=benchmarks.FIGURES,
        metavar="DIR",
        help="directory for the JSON (default docs/figures)",
    )
    args = parser.parse_args(argv)
    TREES[:] = args.tree
    found, failed = measure(args.parts, args.directory, quick=args.quick)
    print("\n".join(figure.line() for figure in claims(found) if figure.value is not None))
    if args.directory.resolve() == benchmarks.FIGURES:
        benchmarks.write()
    if failed:
        progress(f"not measured: {', '.join(failed)}")
    return 1 if failed else 0


def check(argv: Sequence[str]) -> int:
    """Measure the figures that have to hold and print a line for each; return 0 if all hold."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench --check", description="Measures every figure that has to hold."
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="write the measured figures there, as JSON"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=arguments.directory,
        metavar="DIR",
        help="measure nothing; take the figures stored there",
    )
    args = parser.parse_args(argv)
    if args.source:
        found = benchmarks.load(args.source)
    else:
        found, _ = measure(
            [name for name, part in PARTS.items() if part.holds], args.directory, quick=False
        )
    figures = claims(found)
    print("\n".join(figure.line() for figure in figures))
    return 0 if all(figure.holds for figure in figures) else 1


assert set(APPLICATIONS) <= set(PARTS)
