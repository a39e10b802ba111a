# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench`: one workload, or every figure that has to hold.

    scripts/bench                     run the raw workload, like `scripts/bench raw`
    scripts/bench WORKLOAD [--help]   run one workload, print its table; --json and --plot write
                                      files
    scripts/bench --check             run every workload with a figure that has to hold, and print
                                      a line for each figure; exit 1 when one does not hold. This
                                      takes half an hour.
    scripts/bench all                 run every workload, and write docs/benchmarks.md anew
    scripts/bench docs                write docs/benchmarks.md from stored figures

Workloads: raw and files (raw.py); compile, database, tabs and nopressure (applications/); disk,
swapoff, shrink, cache, profile, scale and density (modules of these names). scale, density and docs
need no root.

Limits: other programs on the machine make the figures worthless.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from tools.bench import benchmarks, everything
from tools.bench.applications import APPLICATIONS
from tools.bench.applications.runner import application_main
from tools.bench.harness.figures import progress
from tools.bench.harness.system import HarnessError, interruptible
from tools.bench.workloads import cache, density, disk, profile, raw, scale, shrink, swapoff

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
        The exit code: 0 good, 1 a figure or a run failed, 2 could not run, 130 interrupted.
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
    try:
        with interruptible():
            return work(argv)
    except HarnessError as exc:
        progress(f"scripts/bench: {exc}")
        return 2
    except KeyboardInterrupt:
        progress("interrupted; swapped off and cleaned up")
        return 130


if __name__ == "__main__":
    sys.exit(main())
