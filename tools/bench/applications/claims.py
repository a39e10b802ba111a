# SPDX-License-Identifier: GPL-2.0-or-later
"""The claims about applications that have to hold, from the runs of jobs.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.bench.applications import APPLICATIONS, jobs
from tools.bench.harness.figures import Figure, interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEAVY = "-j8 in 192 MiB"
"""The compilation's level at which a swap file on a slow disk has to take twice as long."""


def compilation(runs: Sequence[jobs.JobRun]) -> list[Figure]:
    """Return the claim about the compilation under pressure; nopressure has the one without."""
    heavy = jobs.ratios(runs, HEAVY, "seconds", "file-slow")
    name = f"compilation, {HEAVY}, zswapd ÷ swap file on a slow disk (time)"
    return [Figure(name, jobs.middle(heavy), 0.5, at_least=False)]


def no_pressure(runs: Sequence[jobs.JobRun]) -> list[Figure]:
    """Return the claims about programs that need no swap: at most 2 % slower, known within 2 %.

    The clock time depends on the other programs of the machine. So its claim is only that the lower
    end of its interval is not above the bound.
    """
    figures = []
    for level in APPLICATIONS["nopressure"]().levels:
        cpu = jobs.ratios(runs, level.name, "cpu", jobs.NO_SWAP)
        clock = jobs.ratios(runs, level.name, "seconds", jobs.NO_SWAP)
        median = jobs.middle(cpu)
        within = (
            max(abs(end - median) for end in interval(cpu))
            if median is not None and len(cpu) > 5
            else None
        )
        at_least = interval(clock)[0] if len(clock) > 5 else None
        named = f"no pressure, {level.name}, zswapd ÷ no swap"
        figures += [
            Figure(f"{named}, processor time", median, 1.02, at_least=False),
            Figure(f"{named}, processor time, known to within", within, 0.02, at_least=False),
            Figure(f"{named}, run time, lower end of its interval", at_least, 1.02, at_least=False),
        ]
    return figures


CLAIMS: dict[str, Callable[[Sequence[jobs.JobRun]], list[Figure]]] = {
    "compile": compilation,
    "nopressure": no_pressure,
}
"""The claims of each application; the others have no figure that has to hold."""
