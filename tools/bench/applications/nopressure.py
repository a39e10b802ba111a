# SPDX-License-Identifier: GPL-2.0-or-later
"""The cost of swap for programs that do not need it.

Two programs have all the memory they want: a compilation (compile.py, the decoder alone), and the
raw workload's phases on memory that is never swapped. The claim is at most 2 %, and single runs
differ by more. So there are many short runs, each with a run without swap in the same round. The
figure is the processor time of the program and the daemon together, because other programs on the
machine change it least. The median ratio comes with its 95 % interval. If the interval is wider
than 2 % to either side, the result is unknown, and the figure does not hold.
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
    """Programs that need no swap, with and without it: processor seconds and clock seconds."""

    name: ClassVar[str] = "nopressure"
    contenders: ClassVar[Sequence[str]] = ("none", "zram-lz4", "zswapd")
    levels: ClassVar[Sequence[Level]] = (Level("compile -j2", 2, None), Level(MEMORY, 512, None))
    short: ClassVar[Sequence[Level]] = (Level(MEMORY, 32, None),)
    columns: ClassVar[Mapping[str, Column]] = {"cpu": Column("processor s"), "seconds": Column("s")}
    rounds: ClassVar[int] = 12

    def __init__(self) -> None:
        self._compile = Compile()

    def missing(self) -> str:
        """Return why the compilation cannot run, or an empty string."""
        return self._compile.missing()

    def prepare(self, *, quick: bool) -> None:
        """Prepare the compilation if it takes part."""
        if not quick:
            self._compile.prepare(quick=True)

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Compile, or run the raw workload; its time is the sum of its phases."""
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
