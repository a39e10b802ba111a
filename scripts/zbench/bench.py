# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench`: compares zswapd with its rivals on this machine.

    scripts/bench                     the table, from three rounds of 1 GiB through 256 MiB
    scripts/bench --quick             a quarter of the data, one round
    scripts/bench --check --json FILE   also exit non-zero when a figure does not hold
    scripts/bench density             the allocators alone (density.py); without root

Limits: figures from a box that does other things meanwhile are worth little, and ratios from one round not
much more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import density, report
from .contenders import REGISTRY
from .rounds import Plan, run_all
from .system import HarnessError, page_cluster_set

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Compares zswapd with its rivals as a swap device.")
    names = ",".join(REGISTRY)
    parser.add_argument("--contenders", default=names, metavar="LIST", help=f"who runs (default {names})")
    parser.add_argument("--rounds", type=int, default=3, help="how often each one runs (default 3)")
    parser.add_argument("--data-mib", type=int, default=1024, help="data of the workload (default 1024)")
    parser.add_argument("--memory-mib", type=int, default=256, help="its memory cgroup (default 256)")
    parser.add_argument("--device-mib", type=int, default=2560, help="swap device, the same for all (default 2560)")
    parser.add_argument("--faults", type=int, default=0, help="random faults to time (default a quarter of the pages)")
    parser.add_argument("--cpu", type=int, help="processor that the workload stays on (default: any)")
    parser.add_argument("--page-cluster", type=int, help="vm.page-cluster for the run only (default: as it is)")
    parser.add_argument("--quick", action="store_true", help="256 MiB through 64 MiB, one round: a trial, no measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure that has to hold does not")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.contenders.split(",") if name not in REGISTRY]:
        parser.error(f"unknown contender {', '.join(unknown)}; there are {names}")
    if min(args.rounds, args.data_mib, args.memory_mib) < 1 or args.device_mib < 2 * args.data_mib:
        parser.error(
            "rounds and sizes are at least 1, and --device-mib at least twice --data-mib: below that the "
            "kernel frees swap slots early, which is another experiment"
        )
    if args.quick:
        args.rounds, args.data_mib, args.memory_mib = 1, 256, 64
    return args


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _bench(args: argparse.Namespace) -> int:
    plan = Plan(args.data_mib, args.memory_mib, args.device_mib, args.rounds, args.faults, args.cpu)
    skipped: dict[str, str] = {}
    names: list[str] = []
    for name in args.contenders.split(","):
        if reason := REGISTRY[name]().missing():
            skipped[name] = reason
            _say(f"{name} is left out: {reason}")
        else:
            names.append(name)
    if not names:
        raise HarnessError("no contender can run here")
    with page_cluster_set(args.page_cluster) as cluster:
        _say(f"{plan.data_mib} MiB through {plan.memory_mib} MiB, vm.page-cluster {cluster}, {plan.rounds} round(s)")
        runs = run_all(names, plan, _say)
        document = report.as_json(runs, plan, cluster, skipped)
    print(report.table(runs))
    held = report.figures_to_hold(runs)
    print("\n".join(["", *(figure.line() for figure in held)]))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if args.check:
        return 0 if all(figure.holds for figure in held) else 1
    # A rival that the kernel killed costs its row of the table; zswapd's failure, and anybody's wrong page, are errors.
    return 1 if any(run.wrong_pages or (run.error and run.contender == report.SUBJECT) for run in runs) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Returns:
        The exit code: 0 good, 1 a figure or a run failed, 2 it could not run, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["density"]:
        return density.main(argv[1:])
    args = _arguments(argv)
    if os.geteuid() != 0:
        _say("scripts/bench needs root for swapon, loop devices and cgroups: sudo scripts/bench")
        return 2
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _bench(args)
    except HarnessError as exc:
        _say(f"scripts/bench: {exc}")
        return 2
    except KeyboardInterrupt:
        _say("interrupted; swapped off and cleaned up")
        return 130


if __name__ == "__main__":
    sys.exit(main())
