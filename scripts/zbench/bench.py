# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench`: one workload, or every figure that has to hold.

    scripts/bench                     the raw workload, as `scripts/bench raw`
    scripts/bench WORKLOAD [--help]   one workload: table; --json and --plot write files
    scripts/bench --check             all workloads that a figure is about, then a line for each figure; exits non-zero
                                      when one does not hold. An hour.

Workloads: raw and files (raw.py), disk (disk.py), compile, database, tabs and nopressure (applications/), shrink (shrink.py),
scale (scale.py) and density (density.py); the last two need no root.

Limits: figures from a box that does other things meanwhile are worth little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import density, disk, jobs, raw, report, scale, shrink
from .applications import APPLICATIONS
from .contenders import REGISTRY
from .figures import Figure, progress
from .system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from .applications import Application

ROUNDS = 3
DEVICE_MIB = 1024
LIMIT_S = 150.0


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _application_arguments(application: Application, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"scripts/bench {application.name}", description=type(application).__doc__)
    names = ",".join(application.contenders)
    parser.add_argument("--contenders", default=names, metavar="LIST", help=f"who runs (default {names})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each one runs (default {ROUNDS})")
    parser.add_argument("--levels", metavar="LIST", help="numbers of the levels, from 1 (default all): " + _levels(application))
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds of one run (default {LIMIT_S:.0f})")
    parser.add_argument("--device-mib", type=int, default=DEVICE_MIB, help=f"swap device (default {DEVICE_MIB})")
    parser.add_argument("--quick", action="store_true", help="a small amount, one round: a trial, no measurement")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the medians into FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.contenders.split(",") if name not in REGISTRY]:
        parser.error(f"unknown contender {', '.join(unknown)}; there are {', '.join(REGISTRY)}")
    args.chosen = list(application.short if args.quick else application.levels)
    if args.levels:
        numbers = [int(number) for number in args.levels.split(",")]
        if not all(1 <= number <= len(args.chosen) for number in numbers):
            parser.error(f"levels are from 1 to {len(args.chosen)}")
        args.chosen = [args.chosen[number - 1] for number in numbers]
    if args.rounds < 1 or args.limit <= 0:
        parser.error("rounds and limit are at least 1")
    if args.quick:
        args.rounds = 1
    return args


def _levels(application: Application) -> str:
    return "; ".join(f"{number} is {level.name}" for number, level in enumerate(application.levels, 1))


def run_application(application: Application, args: argparse.Namespace) -> tuple[list[jobs.JobRun], dict[str, Any]]:
    """Make an application ready and run it over all contenders; return the runs, and the document about them.

    Raises:
        HarnessError: it or every contender is missing something.
    """
    if reason := application.missing():
        raise HarnessError(f"{application.name} is left out: {reason}")
    names, skipped = raw.usable(args.contenders.split(","))
    application.prepare(quick=args.quick)
    runs = jobs.run_all(
        application, names, args.chosen, rounds=args.rounds, limit=args.limit, device_mib=args.device_mib, say=progress
    )
    return runs, jobs.as_json(application, runs, skipped)


def _application(name: str) -> Callable[[Sequence[str]], int]:
    def main_of_it(argv: Sequence[str]) -> int:
        application = APPLICATIONS[name]()
        args = _application_arguments(application, argv)
        runs, document = run_application(application, args)
        print(jobs.table(application, runs))
        if args.json:
            args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        if args.plot:
            jobs.plot(application, runs, args.plot)
        return 1 if any(run.error and run.contender == jobs.SUBJECT for run in runs) else 0

    return main_of_it


def _files(argv: Sequence[str]) -> int:
    return raw.main(argv, raw.FILES)


WORKLOADS: dict[str, Callable[[Sequence[str]], int]] = {
    "raw": raw.main,
    "files": _files,
    **{name: _application(name) for name in APPLICATIONS},
    "disk": disk.main,
    "scale": scale.main,
    "density": density.main,
    "shrink": shrink.main,
}
ROOTLESS = frozenset({"scale", "density"})


def compile_figures(runs: Sequence[jobs.JobRun]) -> list[Figure]:
    """Return the claims about the compilation: under the heaviest pressure, and under none."""
    levels = APPLICATIONS["compile"]().levels
    heavy = jobs.ratios(runs, levels[-1].name, "seconds", "file-slow")
    free = jobs.ratios(runs, levels[0].name, "seconds", jobs.NO_SWAP)
    return [
        Figure("compilation at heavy pressure, zswapd ÷ swap file on a slow disk", jobs.middle(heavy), 0.5, at_least=False),
        Figure("compilation without pressure, zswapd ÷ no swap", jobs.middle(free), 1.02, at_least=False),
    ]


def _check(argv: Sequence[str]) -> int:
    """Measure what every figure takes, print a line for each, and return whether all hold."""
    parser = argparse.ArgumentParser(prog="scripts/bench --check", description="Measures every figure that has to hold.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each workload (default {ROUNDS})")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="write raw.json, scale.json and compile.json there")
    args = parser.parse_args(argv)
    rounds = ["--rounds", str(args.rounds)]
    runs, raw_document = raw.measure(raw.arguments([*rounds, "--contenders", "zram-lz4,nbdkit-zstd,zswapd"]))
    measured = scale.run([16, 24], "small")
    application = APPLICATIONS["compile"]()
    options = [*rounds, "--contenders", "none,file-slow,zswapd", "--levels", f"1,{len(application.levels)}"]
    compiled, compile_document = run_application(application, _application_arguments(application, options))
    print(report.table(runs), scale.table(measured), jobs.table(application, compiled), "", sep="\n\n")
    figures = [*report.figures_to_hold(runs), *scale.figures_to_hold(measured), *compile_figures(compiled)]
    print("\n".join(figure.line() for figure in figures))
    if args.directory:
        args.directory.mkdir(parents=True, exist_ok=True)
        documents = {"raw": raw_document, "scale": scale.as_json(measured), "compile": compile_document}
        for name, document in documents.items():
            (args.directory / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0 if all(figure.holds for figure in figures) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one workload, or the check.

    Returns:
        The exit code: 0 good, 1 a figure or a run failed, 2 it could not run, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if argv[:1] == ["--check"]:
        name, work = "--check", _check
        del argv[0]
    else:
        name = argv.pop(0) if argv and not argv[0].startswith("-") else "raw"
        if name not in WORKLOADS:
            progress(f"scripts/bench: no workload {name}; there are {', '.join(WORKLOADS)}")
            return 2
        work = WORKLOADS[name]
    if os.geteuid() != 0 and name not in ROOTLESS and not {"--help", "-h"} & set(argv):
        progress(f"scripts/bench {name} needs root for swapon, loop devices and cgroups: sudo scripts/bench {name}")
        return 2
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return work(argv)
    except HarnessError as exc:
        progress(f"scripts/bench: {exc}")
        return 2
    except KeyboardInterrupt:
        progress("interrupted; swapped off and cleaned up")
        return 130
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python


if __name__ == "__main__":
    sys.exit(main())
