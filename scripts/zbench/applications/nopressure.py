# SPDX-License-Identifier: GPL-2.0-or-later
"""First do no harm: what does not need swap must not be slower because there is some.

Two programs that have all the memory they want: the compilation of compile.py, and the raw workload's phases over memory that
stays where it is.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, ClassVar

from ..system import MIB
from ..workload import Workload, WorkloadOptions
from .base import Application, Column, Level
from .compile import Compile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PHASES = ("fill", "seq", "mixed", "rewrite", "verify")
MEMORY = "memory"


class NoPressure(Application):
    """What runs without swap, with swap that nobody needs."""

    name: ClassVar[str] = "nopressure"
    contenders: ClassVar[Sequence[str]] = ("none", "zram-lz4", "zswapd")
    levels: ClassVar[Sequence[Level]] = (Level("compile -j2", 2, None), Level(MEMORY, 1024, None))
    short: ClassVar[Sequence[Level]] = (Level(MEMORY, 32, None),)
    columns: ClassVar[Mapping[str, Column]] = {"seconds": Column("s")}

    def __init__(self) -> None:
        self._compile = Compile()
        self._quick = False

    def missing(self) -> str:
        """Return why there is nothing to compile, or an empty string."""
        return self._compile.missing()

    def prepare(self, *, quick: bool) -> None:
        """Make the compilation ready if it takes part."""
        if not quick:
            self._compile.prepare(quick=False)

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Compile, or work in memory; the latter's time is that of all its phases."""
        if level.name != MEMORY:
            return self._compile.run(level, cgroup, limit)
        pages = level.amount * MIB // mmap.PAGESIZE
        options = WorkloadOptions(level.amount, phases=PHASES, faults=pages, rewrites=pages, time_limit=int(limit))
        with Workload(options, cgroup) as workload:
            return {"seconds": sum(phase.seconds for phase in workload.finish())}
