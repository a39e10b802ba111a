# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs `scripts/bench compile`, `database`, `tabs` and `nopressure`.

They take an application from its arguments to its table and its document.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.applications import APPLICATIONS, jobs
from tools.bench.applications.claims import CLAIMS
from tools.bench.contenders import REGISTRY
from tools.bench.harness.figures import progress, told
from tools.bench.harness.system import HarnessError
from tools.bench.workloads import raw, report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tools.bench.applications import Application

DEVICE_MIB = 1024
LIMIT_S = 150.0


def application_arguments(application: Application, argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed options of an application; `chosen` has the levels to run."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {application.name}", description=type(application).__doc__
    )
    shown, rounds = ",".join(application.contenders), application.rounds
    known = arguments.names(lambda: list(REGISTRY), "contender")
    levels = arguments.numbers(1, len(application.levels))
    parser.add_argument(
        "--contenders", type=known, metavar="LIST", help=f"contenders (default {shown})"
    )
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"runs of each contender (default {rounds})"
    )
    parser.add_argument(
        "--levels",
        type=levels,
        metavar="LIST",
        help="numbers of the levels, from 1 (default all): " + _levels(application),
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT_S,
        help=f"time limit of a run, s (default {LIMIT_S:.0f})",
    )
    parser.add_argument(
        "--device-mib",
        type=int,
        default=DEVICE_MIB,
        help=f"size of the swap device (default {DEVICE_MIB})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small data, one round: a trial, not a measurement"
    )
    parser.add_argument(
        "--plot", type=arguments.picture, metavar="FILE", help="draw the medians into FILE"
    )
    arguments.add_json(parser)
    args = parser.parse_args(argv)
    args.contenders = args.contenders or list(application.contenders)
    args.chosen = list(application.short if args.quick else application.levels)
    if args.levels:
        if max(args.levels) > len(args.chosen):
            parser.error(f"levels are from 1 to {len(args.chosen)}")
        args.chosen = [args.chosen[number - 1] for number in args.levels]
    if args.rounds < 1 or not args.limit > 0 or args.device_mib < 1:
        parser.error("rounds, limit and the device's size are at least 1")
    if args.quick:
        args.rounds = 1
    return args


def _levels(application: Application) -> str:
    return "; ".join(
        f"{number} is {level.name}" for number, level in enumerate(application.levels, 1)
    )


def run_application(
    application: Application, args: argparse.Namespace
) -> tuple[list[jobs.JobRun], dict[str, Any]]:
    """Prepare an application and run it on all contenders.

    Returns:
        The runs, and the document about them.

    Raises:
        HarnessError: the application or every contender lacks a program.
    """
    if reason := application.missing():
        raise HarnessError(f"{application.name} is left out: {reason}")
    names, skipped = raw.usable(args.contenders)
    application.prepare(quick=args.quick)
    runs = jobs.run_all(
        application,
        names,
        args.chosen,
        rounds=args.rounds,
        limit=args.limit,
        device_mib=args.device_mib,
        say=progress,
    )
    document = jobs.as_json(application, runs, skipped)
    claims = CLAIMS.get(application.name)
    return runs, {**document, "figures": told(claims(runs)) if claims else []}


def measure_application(name: str, argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Measure an application; return its table and its document."""
    application = APPLICATIONS[name]()
    runs, document = run_application(application, application_arguments(application, argv))
    return jobs.table(application, runs), document


def application_main(name: str) -> Callable[[Sequence[str]], int]:
    """Return the program that runs an application."""

    def main_of_it(argv: Sequence[str]) -> int:
        application = APPLICATIONS[name]()
        args = application_arguments(application, argv)
        runs, document = run_application(application, args)
        print(jobs.table(application, runs))
        if args.json:
            args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        if args.plot:
            jobs.plot(application, document["medians"], args.plot)
        return 1 if any(run.error and run.contender == report.SUBJECT for run in runs) else 0

    return main_of_it
