# SPDX-License-Identifier: GPL-2.0-or-later
"""First do no harm: what does not need swap must not be slower because there is some.

Two programs that have all the memory they want: a compilation (that of compile.py, of the decoder
alone), and the raw workload's phases over memory that stays where it is. What is asked for is 2 %,
and one run differs from the next by more. So runs are short and many, each beside one without swap
(a round); what counts is the processor time of the program and of the daemon together, which others
on the machine move least; and the median ratio comes with the interval in which it lies with a
probability of 95 %. Where that is wider than 2 % to either side, nothing can be told, and the
figure does not hold.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, ClassVar

from tools.bench.applications.base import Application, Column, Level, children_cpu
from tools.bench.applications.compile import Compile
from tools.bench.harness.system import MIB
from tools.bench.harness.workload import Workload, WorkloadOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PHASES = ("fill", "seq", "mixed", "rewrite", "verify")
MEMORY = "memory"


class NoPressure(Application):
    """What runs without swap, with swap that nobody needs.

    Seconds of the processor, and of the clock.
    """

    name: ClassVar[str] = "nopressure"
    contenders: ClassVar[Sequence[str]] = ("none", "zram-lz4", "zswapd")
    levels: ClassVar[Sequence[Level]] = (Level("compile -j2", 2, None), Level(MEMORY, 512, None))
    short: ClassVar[Sequence[Level]] = (Level(MEMORY, 32, None),)
    columns: ClassVar[Mapping[str, Column]] = {"cpu": Column("processor s"), "seconds": Column("s")}
    rounds: ClassVar[int] = 12

    def __init__(self) -> None:
        self._compile = Compile()

    def missing(self) -> str:
        """Return why there is nothing to compile, or an empty string."""
        return self._compile.missing()

    def prepare(self, *, quick: bool) -> None:
        """Make the compilation ready if it takes part."""
        if not quick:
            self._compile.prepare(quick=True)

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Compile, or work in memory; the latter's time is that of all its phases."""
        if level.name != MEMORY:
            return self._compile.run(level, cgroup, limit)
        pages = level.amount * MIB // mmap.PAGESIZE
        options = WorkloadOptions(
            level.amount, phases=PHASES, faults=pages, rewrites=pages, time_limit=int(limit)
        )
        before = children_cpu()
        with Workload(options, cgroup) as workload:
            seconds = sum(phase.seconds for phase in workload.finish())
        return {"cpu": children_cpu() - before, "seconds": seconds}
