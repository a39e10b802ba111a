# SPDX-License-Identifier: GPL-2.0-or-later
"""The rounds of the raw workload, and the figures of one run.

Each contender is alone on the machine: it sets up its device, the workload runs through all phases,
and the contender removes the device. In a round every contender runs once. The order rotates by one
from round to round, so slow drift of the machine (a noisy neighbour, a warm cache) hits all
contenders alike. Ratios are taken within a round only.
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
"""The phases in order; swapoff comes before the last one, which so verifies its pages too."""

SWAPOFF_LIMIT_S = 280.0
TRIES = 4
"""The runs that a rival may have in a round.

With zram the kernel sometimes kills the workload though there is room (docs/benchmarks.md), and a
round without the rival has no ratio. The report counts these kills. zswapd has one try.
"""

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a comparison, the same for every contender.

    Attributes:
        data_mib: the data of the workload in MiB.
        memory_mib: the limit of its cgroup in MiB.
        device_mib: the size of the swap device in MiB.
        rounds: the number of rounds.
        faults: the number of random faults to time.
        cpu: the processor that the workload stays on; None for any.
        time_limit: the time limit of one workload in seconds.
    """

    data_mib: int
    memory_mib: int
    device_mib: int
    rounds: int
    faults: int
    cpu: int | None = None
    time_limit: int = 300

    def workload(self) -> WorkloadOptions:
        """Return the options of the workload.

        The fill writes nine tenths of the cgroup's limit before its clock starts. The last tenth is
        for page tables and the program.
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
        contender: the contender's name.
        round: the number of the round, from 0.
        phases: the workload's reports, in order.
        memory: the contender's memory when all data is on swap, at the end of the first `settle`.
        memory_peak: the largest reading between phases, in bytes.
        error: why the run ended early; empty when it ran to its end with every byte verified.
        swapoff: the MiB on swap at swapoff, with the data in use, and the seconds of swapoff;
            zeros if the run ended before.
        kills: the runs before this one in the same round whose workload was killed.
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
        """Whether every byte came back unchanged."""
        verified = self._phase("verify")
        return not self.error and verified is not None and self.wrong_pages == 0

    @property
    def wrong_pages(self) -> int:
        """The number of pages that differed."""
        return max((phase.mismatches for phase in self.phases), default=0)

    def figures(self) -> dict[str, float]:
        """Return the figures by name, without those of missing phases.

        out, seq and off (swapoff) are the MiB/s of pages through the swap device during the phase;
        mixed counts both directions. random, p50, p99 and p999 are µs for each fault; mixed_p50
        and so on are those of the mixed phase. memory and peak are MiB.
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
    """Run one contender once, and always stop it."""
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
                    # A reading takes processor time and moves the workload to another processor
                    # (docs/benchmarks.md), so it comes between phases.
                    peak = max(peak, contender.memory_now())
                    if phase.name == "settle" and after_fill is None:
                        after_fill = contender.memory_used()
                    elif phase.name == "settle":
                        # All data fits from here on, with the pages that the kernel charges before
                        # it frees their slots.
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
    """Run swapoff for all devices; return the MiB that were on them, and the seconds."""
    devices = contender.devices()
    used = sum(area.used for area in swaps() if area.path in devices)
    started = time.monotonic()
    for device in devices:
        swap_off(device, limit=SWAPOFF_LIMIT_S)
    return used / MIB, time.monotonic() - started


def check_room(plan: Plan) -> None:
    """Refuse a plan that would bring the machine itself under memory pressure.

    Raises:
        HarnessError: less memory than the data plus 512 MiB is available.
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
    """Run all rounds; return all runs, with the failed ones.

    Args:
        names: names of contenders in `REGISTRY`.
        plan: the parameters of the comparison.
        say: takes a line of progress.
        once: the names that run in the first round only.
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
    """Run a contender, and a rival again if the OOM killer ended it; return the last run."""
    kills = 0
    while True:
        run = replace(run_once(REGISTRY[name](), number, plan), kills=kills)
        figures = ", ".join(f"{key} {value:.1f}" for key, value in run.figures().items())
        say(f"round {number + 1}/{plan.rounds} {name}: {run.error or figures}")
        kills += 1
        if KILLED not in run.error or name.startswith(SUBJECT) or kills == TRIES:
            return run
