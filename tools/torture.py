# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/torture`: it kills workers while a workload swaps through zswapd.

The run shows three things: every page comes back unchanged, no request fails, and a takeover is
short. Each kill takes a random signal of `--signals` and a random pause. The pause counts from the
moment at which the worker serves. With `--early` it counts from the worker's start, so successors
die in their takeover as well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import Workload, WorkloadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE = 4096
LONGEST_TAKEOVER_S = 60.0
_SERVES = re.compile(r"worker (\d+) serves .*, (\d+) pages, after (\d+) ms")
_KERNEL_COMPLAINT = re.compile(
    r"I/O error, dev (loop\d+)|[Ww]rite-error on swap|[Rr]ead-error on swap|blocked for more than"
)


@dataclass(slots=True)
class Outcome:
    """The result of a run.

    Attributes:
        planned: the kills of the plan.
        kills: the workers killed.
        deaths: the workers that died, as the daemon counts them.
        wrong_pages: the pages that came back changed.
        pages_verified: the pages compared, in all phases.
        failed_requests: the requests that the daemon answered with an error.
        kernel_complaints: lines of the kernel's log about I/O errors on swap or hung tasks.
        takeover_ms: milliseconds of each takeover that ran to its end, from the supervisor's start
            of the next worker to the first request that it can answer.
        outage_ms: milliseconds from each kill to the next worker's answer on the control socket.
        takeover_pages: pages in the pool at each takeover.
        seconds: the time of the whole run.
        error: why the run ended early; empty if it did not.
    """

    planned: int = 0
    kills: int = 0
    deaths: int = 0
    wrong_pages: int = 0
    pages_verified: int = 0
    failed_requests: int = 0
    kernel_complaints: list[str] = field(default_factory=list)
    takeover_ms: list[int] = field(default_factory=list)
    outage_ms: list[int] = field(default_factory=list)
    takeover_pages: list[int] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    def seconds_per_gib(self) -> float:
        """Return the seconds per stored GiB of the slowest takeover.

        A takeover of less than 64 MiB counts as one of 64 MiB, because its cost is mostly fixed.
        """
        rates = [ms / 1000 / max(pages * PAGE / (1 << 30), 1 / 16) for ms, pages in self._pairs()]
        return max(rates, default=0.0)

    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.takeover_ms, self.takeover_pages, strict=True))

    @property
    def cut_short(self) -> int:
        """The number of takeovers that the next kill ended."""
        return self.kills - len(self.takeover_ms)

    def shortcomings(self) -> list[str]:
        """Return a line for each broken promise, and for each thing that the run did not show.

        Times do not count here.
        """
        found = [f"ENDED EARLY: {self.error}"] if self.error else []
        if self.wrong_pages or self.failed_requests or self.kernel_complaints:
            found.append("pages or requests were lost")
        if self.kills != self.planned or not self.kills:
            found.append(f"{self.kills} workers were killed, {self.planned} should have been")
        if self.deaths != self.kills:
            found.append(f"{self.deaths} workers have died, {self.kills} were killed")
        if not self.pages_verified or not max(self.takeover_pages, default=0):
            found.append("no page was swapped out at any takeover, or none was verified")
        return found

    def good(self) -> bool:
        """Return whether the run was complete and no promise was broken; times do not count."""
        return not self.shortcomings()

    def lines(self) -> list[str]:
        """Return the lines of the summary."""
        text = [
            f"{self.kills} kills in {self.seconds:.0f} s, {self.pages_verified} pages verified,"
            f" {self.wrong_pages} wrong"
        ]
        text.append(
            f"failed requests: {self.failed_requests}; complaints of the kernel:"
            f" {len(self.kernel_complaints)}"
        )
        for name, times in (
            ("takeover", self.takeover_ms),
            ("outage, from kill to answer", self.outage_ms),
        ):
            if times:
                ordered = sorted(times)
                p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
                text.append(
                    f"{name}: median {median(times):.0f} ms, p99 {p99} ms, longest {ordered[-1]} ms"
                )
        if self.takeover_pages:
            stored = max(self.takeover_pages) * PAGE >> 20
            text.append(
                f"up to {stored} MiB stored at a takeover; longest {self.seconds_per_gib():.2f} s"
                " a GiB"
            )
        text += [f"kernel: {line}" for line in self.kernel_complaints[:10]]
        return text + self.shortcomings()


@dataclass(frozen=True, slots=True)
class TorturePlan:
    """The parameters of a run.

    Attributes:
        kills: the number of workers to kill.
        data_mib, memory_mib: the sizes of the workload and of its memory cgroup, in MiB.
        pause_s: the longest pause before a kill, in seconds.
        signals: the signals to choose from.
        early: count the pause from the worker's start instead of its first answer.
        seed: the seed of the random times and of the data.
    """

    kills: int = 20
    data_mib: int = 192
    memory_mib: int = 64
    pause_s: float = 1.0
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    early: bool = False
    seed: int = 1


class Killer(threading.Thread):
    """A thread that kills workers until the plan is done or `done` is set."""

    def __init__(self, daemon: Daemon, plan: TorturePlan, outcome: Outcome) -> None:
        super().__init__(name="killer", daemon=True)
        self._daemon, self._plan, self._outcome = daemon, plan, outcome
        self._random = random.Random(plan.seed)
        self.done = threading.Event()

    def run(self) -> None:
        """Kill one worker after another."""
        try:
            while self._outcome.kills < self._plan.kills and not self.done.is_set():
                self._kill_one()
        except Exception as exc:  # noqa: BLE001 - any failure ends the killing
            self._outcome.error = f"after {self._outcome.kills} kills: {exc}"
        finally:
            self.done.set()

    def _kill_one(self) -> None:
        worker = self._daemon.worker_pid()
        time.sleep(self._random.uniform(0, self._plan.pause_s))
        if self.done.is_set():
            return
        os.kill(worker, self._random.choice(self._plan.signals))
        begin = time.monotonic()
        self._outcome.kills += 1
        while self._daemon.worker_pid() == worker:
            if time.monotonic() - begin > LONGEST_TAKEOVER_S:
                raise HarnessError(
                    f"no new worker {LONGEST_TAKEOVER_S:.0f} s after a"
                    f" kill\n{self._daemon.log_text()[-2000:]}"
                )
            time.sleep(0.005)
        if not self._plan.early:
            self._daemon.ask("status")
            self._outcome.outage_ms.append(round((time.monotonic() - begin) * 1000))


def _silent(line: str) -> None:
    """Drop a line of progress."""


def torture(plan: TorturePlan, daemon: Daemon, *, say: Callable[[str], None] = _silent) -> Outcome:
    """Run the plan against a daemon that runs with swap on; leave it so.

    Args:
        plan: the parameters of the run.
        daemon: the daemon whose workers die.
        say: takes a line of progress.
    """
    outcome = Outcome(planned=plan.kills)
    deaths_before = daemon.ask("status")["worker"]["deaths"]
    devices = {Path(device).name for device in daemon.loops()}
    complaints_before = set(_kernel_complaints(devices))
    failed_before = daemon.ask("stats")["fuse"]["request_errors"]
    log_before = len(daemon.log_text())
    begin = time.monotonic()
    killer = Killer(daemon, plan, outcome)
    with MemoryCgroup("torture", plan.memory_mib * MIB) as cgroup:
        # 2000 rounds are more than any plan needs. The loop below ends with the killer.
        phases = ("fill", *("verify", "rewrite") * 2000)
        options = WorkloadOptions(
            plan.data_mib, phases=phases, seed=plan.seed, time_limit=600 + plan.kills * 10
        )
        try:
            with Workload(options, cgroup.path) as workload:
                for number, phase in enumerate(workload.phases()):
                    if not number:
                        killer.start()
                    outcome.wrong_pages = phase.mismatches
                    outcome.pages_verified += phase.pages if phase.name == "verify" else 0
                    say(
                        f"{outcome.kills} of {plan.kills} killed; {phase.name}: {phase.mismatches}"
                        " wrong pages"
                    )
                    if killer.done.is_set() and phase.name == "verify":
                        break
        except HarnessError as exc:
            outcome.error = outcome.error or str(exc)
        finally:
            killer.done.set()
            if killer.ident is not None:
                killer.join()
    outcome.seconds = time.monotonic() - begin
    outcome.failed_requests = daemon.ask("stats")["fuse"]["request_errors"] - failed_before
    outcome.deaths = daemon.ask("status")["worker"]["deaths"] - deaths_before
    for _number, pages, milliseconds in _SERVES.findall(daemon.log_text()[log_before:]):
        outcome.takeover_ms.append(int(milliseconds))
        outcome.takeover_pages.append(int(pages))
    outcome.kernel_complaints = [
        line for line in _kernel_complaints(devices) if line not in complaints_before
    ]
    return outcome


def _kernel_complaints(devices: set[str]) -> list[str]:
    """Return the kernel's log lines about failed requests, without other loop devices' lines."""
    text = subprocess.run(["dmesg"], check=True, capture_output=True, text=True, timeout=20).stdout
    found = ((line, _KERNEL_COMPLAINT.search(line)) for line in text.splitlines())
    return [line for line, match in found if match and (match[1] is None or match[1] in devices)]


def _signals(text: str) -> tuple[signal.Signals, ...]:
    try:
        return tuple(signal.Signals[f"SIG{name}"] for name in text.upper().split(","))
    except KeyError as exc:
        raise argparse.ArgumentTypeError(f"unknown signal {exc.args[0]}") from None


def _above_zero(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds of 0 or more")
    return number


def _setting(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text} is not of the form SECTION.KEY=VALUE")
    return text


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    plan = TorturePlan()
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="Kills zswapd's worker under real swap traffic, and checks every byte.",
    )
    parser.add_argument(
        "--kills",
        type=_above_zero,
        default=plan.kills,
        help="workers to kill (default %(default)s)",
    )
    parser.add_argument(
        "--data-mib",
        type=_above_zero,
        default=plan.data_mib,
        help="data of the workload (default %(default)s)",
    )
    parser.add_argument(
        "--memory-mib",
        type=_above_zero,
        default=plan.memory_mib,
        help="its memory cgroup (default %(default)s)",
    )
    parser.add_argument(
        "--pause",
        type=_not_negative,
        default=plan.pause_s,
        help="longest pause before a kill, in seconds (default %(default)s)",
    )
    parser.add_argument(
        "--signals", type=_signals, default=plan.signals, help="e.g. KILL,SEGV,ABRT (default KILL)"
    )
    parser.add_argument(
        "--early", action="store_true", help="kill successors in their takeover as well"
    )
    parser.add_argument(
        "--seed", type=int, default=plan.seed, help="seed of times and data (default %(default)s)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="SECTION.KEY=VALUE",
        help="a setting of the daemon",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the torture.

    Returns:
        The exit code: 0 all kills done and nothing lost, 1 otherwise, 2 could not run,
        130 interrupted.
    """
    args = _arguments(sys.argv[1:] if argv is None else argv)
    if os.geteuid() != 0:
        print(
            "scripts/torture needs root for swapon, loop devices and cgroups: sudo scripts/torture",
            file=sys.stderr,
        )
        return 2
    plan = TorturePlan(
        args.kills, args.data_mib, args.memory_mib, args.pause, args.signals, args.early, args.seed
    )
    settings = {
        "swap.priority": str(system.HIGHEST_PRIORITY),
        **dict(item.split("=", 1) for item in args.set),
    }
    try:
        with (
            system.interruptible(),
            Daemon(size=f"{args.data_mib * 2}M", settings=settings) as daemon,
        ):
            daemon.swapon()
            outcome = torture(
                plan, daemon, say=lambda line: print(line, file=sys.stderr, flush=True)
            )
            daemon.swapoff()
    except HarnessError as exc:
        print(f"scripts/torture: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; swapped off and cleaned up", file=sys.stderr)
        return 130
    print("\n".join(outcome.lines()))
    if args.json:
        args.json.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    return 0 if outcome.good() else 1


if __name__ == "__main__":
    sys.exit(main())
