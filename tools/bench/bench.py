# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench`: one workload, or every figure that has to hold.

    scripts/bench                     the raw workload, as `scripts/bench raw`
    scripts/bench WORKLOAD [--help]   one workload: table; --json and --plot write files
    scripts/bench --check             all workloads that a figure is about, then a line for each figure; exits non-zero
                                      when one does not hold. Half an hour.
    scripts/bench all                 the same and the rest of what docs/benchmarks.md shows, which is written anew

Workloads: raw and files (raw.py); compile, database, tabs and nopressure (applications/); disk,
swapoff, shrink, cache, profile, scale and density in modules of their names; the last two need no
root. `docs` writes docs/benchmarks.md from what was measured, without measuring.

Limits: figures from a box that does other things meanwhile are worth little.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from tools.bench import benchmarks, everything
from tools.bench.applications import APPLICATIONS
from tools.bench.applications.runner import application_main
from tools.bench.harness.figures import progress
from tools.bench.harness.system import HarnessError
from tools.bench.workloads import cache, density, disk, profile, raw, scale, shrink, swapoff

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _files(argv: Sequence[str]) -> int:
    return raw.main(argv, raw.FILES)


WORKLOADS: dict[str, Callable[[Sequence[str]], int]] = {
    "raw": raw.main,
    "files": _files,
    **{name: application_main(name) for name in APPLICATIONS},
    "swapoff": swapoff.main,
    "disk": disk.main,
    "scale": scale.main,
    "density": density.main,
    "shrink": shrink.main,
    "cache": cache.main,
    "profile": profile.main,
    "all": everything.main,
    "docs": benchmarks.main,
}
ROOTLESS = frozenset({"scale", "density", "docs"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one workload, or the check.

    Returns:
        The exit code: 0 good, 1 a figure or a run failed, 2 it could not run, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    work: Callable[[Sequence[str]], int]
    if argv[:1] == ["--check"]:
        name, work = "--check", everything.check
        del argv[0]
    else:
        name = argv.pop(0) if argv and not argv[0].startswith("-") else "raw"
        if name not in WORKLOADS:
            progress(f"scripts/bench: no workload {name}; there are {', '.join(WORKLOADS)}")
            return 2
        work = WORKLOADS[name]
    if os.geteuid() != 0 and name not in ROOTLESS and not {"--help", "-h"} & set(argv):
        progress(
            f"scripts/bench {name} needs root for swapon, loop devices and cgroups: sudo"
            f" scripts/bench {name}"
        )
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
        signal.signal(
            signal.SIGTERM, signal.SIG_DFL if before is None else before
        )  # None: not set by Python


if __name__ == "__main__":
    sys.exit(main())
