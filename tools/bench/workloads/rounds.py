# SPDX-License-Identifier: GPL-2.0-or-later
"""Who runs when, and what one run yields.

Each contender is alone on the box: its device is put on, the workload runs through all its phases,
the device is taken off. Within a round every contender runs once, and the order turns by one from
round to round, so that slow drift of the machine (a noisy neighbour, a warm cache) hits all of them
alike. Ratios are taken within a round only.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tools.bench.contenders import REGISTRY, Contender, MemoryUse
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.system import MIB, HarnessError, memory_available, swap_off, swaps
from tools.bench.harness.workload import KILLED, Phase, Workload, WorkloadOptions
from tools.bench.workloads.report import SUBJECT

PHASES = ("fill", "settle", "seq", "random", "mixed", "rewrite", "settle", "verify")
"""Between the last two everything is swapped off, so what is verified last has come back that way.
"""

SWAPOFF_LIMIT_S = 280.0
TRIES = 4
"""How often a rival may run in a round.

With zram the kernel kills the workload now and then, though there is room (docs/benchmarks.md), and
a round without it has no ratio; how often that was is told. What is measured has one try.
"""

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """What every contender is put through.

    Attributes:
        data_mib: data of the workload.
        memory_mib: limit of its cgroup.
        device_mib: size of the swap device.
        rounds: how often each contender runs.
        faults: random faults measured.
        cpu: processor that the workload stays on; None for any.
        time_limit: seconds one workload may take.
    """

    data_mib: int
    memory_mib: int
    device_mib: int
    rounds: int
    faults: int
    cpu: int | None = None
    time_limit: int = 300

    def workload(self) -> WorkloadOptions:
        """Return what the workload shall do.

        A tenth of the cgroup is left out of what the fill writes before its clock starts: for page
        tables and the program.
        """
        return WorkloadOptions(
            self.data_mib,
            phases=PHASES,
            faults=self.faults,
            warm_mib=self.memory_mib * 9 // 10,
            time_limit=self.time_limit,
            cpu=self.cpu,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One contender in one round.

    Attributes:
        contender: its name.
        round: from 0.
        phases: what the workload reported, in order.
        memory: what the contender took when all data was on swap (after the settling that follows
            the fill).
        memory_peak: the most of the readings between phases, bytes.
        error: why it ended early; empty when it ran to its end with every byte verified.
        swapoff: MiB that were on swap when it was swapped off with the data still in use, and the
            seconds that took; zeros if it did not come to that.
        kills: runs before this one, in the same round, whose workload was killed.
    """

    contender: str
    round: int
    phases: tuple[Phase, ...]
    memory: MemoryUse
    memory_peak: int
    error: str = ""
    swapoff: tuple[float, float] = (0.0, 0.0)
    kills: int = 0

    def _phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def verified(self) -> bool:
        """Whether every byte came back as it was written."""
        verified = self._phase("verify")
        return not self.error and verified is not None and self.wrong_pages == 0

    @property
    def wrong_pages(self) -> int:
        """How many pages differed."""
        return max((phase.mismatches for phase in self.phases), default=0)

    def figures(self) -> dict[str, float]:
        """Return the figures by name; one whose phase is missing is left out.

        out, seq and off (swapoff) are MiB/s of pages that went through the swap device while the
        phase ran, mixed is that of both directions together; random, p50, p99 and p999 are µs a
        fault, and mixed_p50 and so on those of the mixed phase; memory and peak are MiB.
        """
        found: dict[str, float] = {}
        if fill := self._phase("fill"):
            found["out"] = fill.pages_out * mmap.PAGESIZE / MIB / fill.seconds
        if seq := self._phase("seq"):
            found["seq"] = seq.pages_in * mmap.PAGESIZE / MIB / seq.seconds
        if (random := self._phase("random")) and "us_mean" in random.more:
            found["random"] = random.more["us_mean"]
            found |= {name: random.more[f"us_{name}"] for name in ("p50", "p99", "p999")}
        if (mixed := self._phase("mixed")) and "us_mean" in mixed.more:
            found["mixed"] = (
                (mixed.pages_in + mixed.pages_out) * mmap.PAGESIZE / MIB / mixed.seconds
            )
            found |= {f"mixed_{name}": mixed.more[f"us_{name}"] for name in ("p50", "p99", "p999")}
        if self.swapoff[1]:
            found["off"] = self.swapoff[0] / self.swapoff[1]
        if self.memory.total:
            found["memory"] = self.memory.total / MIB
            found["peak"] = self.memory_peak / MIB
        return found


def run_once(contender: Contender, number: int, plan: Plan) -> Run:
    """Run one contender once and take it off again, whatever happens."""
    phases: list[Phase] = []
    after_fill: MemoryUse | None = None
    swapoff = (0.0, 0.0)
    error = ""
    peak = 0
    try:
        try:
            contender.start(plan.device_mib * MIB)
            with (
                MemoryCgroup(f"bench-{contender.name}", plan.memory_mib * MIB) as cgroup,
                Workload(plan.workload(), cgroup.path) as workload,
            ):
                for phase in workload.phases():
                    phases.append(phase)
                    # Between phases: a reading takes processor time, and moves the workload
                    # (docs/benchmarks.md).
                    peak = max(peak, contender.memory_now())
                    if phase.name == "settle" and after_fill is None:
                        after_fill = contender.memory_used()
                    elif phase.name == "settle":
                        # All of it fits from here on, and what the kernel charges before it frees a
                        # slot.
                        cgroup.set_limit(2 * plan.data_mib * MIB)
                        swapoff = swap_everything_off(contender)
        finally:
            contender.stop()
    except HarnessError as exc:
        error = str(exc)
    memory = after_fill or MemoryUse(0)
    return Run(
        contender.name, number, tuple(phases), memory, max(peak, memory.total), error, swapoff
    )


def swap_everything_off(contender: Contender) -> tuple[float, float]:
    """Swap all devices off; return the MiB that were on them, and the seconds it took."""
    devices = contender.devices()
    used = sum(area.used for area in swaps() if area.path in devices)
    started = time.monotonic()
    for device in devices:
        swap_off(device, limit=SWAPOFF_LIMIT_S)
    return used / MIB, time.monotonic() - started


def check_room(plan: Plan) -> None:
    """Refuse a plan that would push the machine itself into memory pressure.

    Raises:
        HarnessError: less than the whole data plus 512 MiB is available.
    """
    needed = (plan.data_mib + 512) * MIB
    if memory_available() < needed:
        raise HarnessError(
            f"{plan.data_mib} MiB of data need {needed // MIB} MiB of memory,"
            f" {memory_available() // MIB} are available",
            hint="fewer --data-mib, or --quick",
        )


def run_all(
    names: Sequence[str], plan: Plan, say: Callable[[str], None], once: Collection[str] = ()
) -> list[Run]:
    """Run all rounds and return all runs, those that failed included.

    Args:
        names: of contenders, in `REGISTRY`.
        once: those of them that run in the first round only.
        plan: what they are put through.
        say: takes one line of progress at a time.
    """
    check_room(plan)
    runs: list[Run] = []
    for number in range(plan.rounds):
        there = [name for name in names if not number or name not in once]
        turn = number % len(there) if there else 0
        runs += [
            _run_until_it_lives(name, number, plan, say) for name in [*there[turn:], *there[:turn]]
        ]
    return runs


def _run_until_it_lives(name: str, number: int, plan: Plan, say: Callable[[str], None]) -> Run:
    """Run a contender, a rival again if the kernel has killed its workload for want of memory.

    Return the last run.
    """
    kills = 0
    while True:
        run = replace(run_once(REGISTRY[name](), number, plan), kills=kills)
        figures = ", ".join(f"{key} {value:.1f}" for key, value in run.figures().items())
        say(f"round {number + 1}/{plan.rounds} {name}: {run.error or figures}")
        kills += 1
        if KILLED not in run.error or name.startswith(SUBJECT) or kills == TRIES:
            return run
