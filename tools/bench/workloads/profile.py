# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench profile`.

It measures where the worker's processor time goes while the raw workload swaps out and in.

    scripts/bench profile                    profile this checkout's zswapd
    scripts/bench profile --tree before=DIR  profile another checkout's too, in turn with this one's
                                             ("after")
    scripts/bench profile --json FILE

`perf record` (Debian's linux-perf) samples the worker 997 times a second by its processor clock,
which virtual machines have too. It does so during the fill and during the sequential reads. The
report sums the samples by part: the kernel, LZ4, the compiled page path, Python's interpreter, and
others. It also names the busiest functions. A part's share times the worker's processor time for a
page is the cost of a page in that part.

Another checkout needs its environment (scripts/test makes one). It runs under this harness.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.figures import aligned, machine, progress
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import Phase, Workload, WorkloadOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = "after"
PHASES = {"fill": "swap-out", "seq": "swap-in, in order"}
FREQUENCY = 997
"""Samples a second; a prime, so that no periodic work runs in step with it."""
TOP = 8
END_LIMIT_S = 30.0

PARTS = (
    ("LZ4", r"^LZ4_|\|.*lz4"),
    ("checksum", r"^XXH|\|.*xxhash"),
    ("kernel", r"\|\[(?!vdso)"),
    ("compiled page path", r"\|.*__mypyc"),
    ("hook", r"\|_lowlevel|\|.*fuse3"),
    ("page path in C", r"\|_(?!disk|populate|block)\w+\.cpython"),
    ("interpreter", r"\|(lib)?python"),
    ("libc", r"\|libc[.-]|\|ld-linux|\|\[vdso"),
)
"""The parts and their patterns for "symbol|object"; a sample counts for the first that fits."""
ORDER = (
    "LZ4",
    "checksum",
    "page path in C",
    "compiled page path",
    "interpreter",
    "libc",
    "hook",
    "kernel",
    "other",
)


@dataclass(frozen=True, slots=True)
class Profile:
    """One phase of one program.

    Attributes:
        label, phase: the names of the program and of the phase.
        rate: MiB/s through the swap device.
        cpu_us: the worker's processor time in µs for each page.
        shares: the percentage of the samples, by part.
        busiest: (function, its object, percentage of the samples) of the busiest functions.
        samples: the number of samples.
    """

    label: str
    phase: str
    rate: float
    cpu_us: float
    shares: dict[str, float]
    busiest: tuple[tuple[str, str, float], ...]
    samples: int


def part_of(symbol: str, thing: str) -> str:
    """Return the part that a function of an object belongs to."""
    named = f"{symbol}|{Path(thing).name}"
    return next((part for part, pattern in PARTS if re.search(pattern, named)), "other")


def parse(report: str) -> tuple[dict[str, float], tuple[tuple[str, str, float], ...]]:
    """Parse the output of `perf report`, lines of percent|object|symbol.

    Returns:
        The parts' shares, and the busiest functions.
    """
    shares = dict.fromkeys(ORDER, 0.0)
    functions = []
    for line in report.splitlines():
        words = [word.strip() for word in line.split("|")]
        if line.startswith("#") or len(words) != 3 or not re.fullmatch(r"[\d.]+%?", words[0]):
            continue
        percent = float(words[0].rstrip("%"))
        symbol = re.sub(r"^\[.\] ", "", words[2])
        shares[part_of(symbol, words[1])] += percent
        functions.append((symbol, Path(words[1]).name, percent))
    functions.sort(key=lambda one: -one[2])
    return shares, tuple(functions[:TOP])


@contextlib.contextmanager
def recording(pid: int, into: Path) -> Iterator[None]:
    """Sample a process while the body runs.

    Raises:
        HarnessError: perf fails.
    """
    asking, answering = os.pipe(), os.pipe()
    command = [
        "perf",
        "record",
        "-q",
        "-e",
        "cpu-clock",
        "-F",
        str(FREQUENCY),
        "-p",
        str(pid),
        "-o",
        str(into),
    ]
    command += ["--delay=-1", f"--control=fd:{asking[0]},{answering[1]}"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(asking[0], answering[1]),
    ) as perf:
        for theirs in (asking[0], answering[1]):
            os.close(theirs)
        try:
            with contextlib.suppress(BrokenPipeError):
                os.write(asking[1], b"enable\n")
                os.read(answering[0], 16)  # perf samples now, or has ended
            yield
        finally:
            perf.send_signal(2)
            try:
                perf.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                perf.kill()
            for ours in (asking[1], answering[0]):
                os.close(ours)
        assert perf.stderr is not None
        words = perf.stderr.read().strip()
    if not into.exists():
        raise HarnessError(f"perf has recorded nothing: {words}", hint="apt-get install linux-perf")


def _report(data: Path) -> tuple[str, int]:
    options = ["--stdio", "-q", "-F", "overhead,dso,sym", "-t", "|", "--percent-limit", "0"]
    text = system.run("perf", "report", "-i", data, *options, limit=120)
    counted = system.run("perf", "script", "-i", data, "-F", "pid", limit=120)
    return text, len(counted.splitlines())


def measure(label: str, tree: Path | None, data_mib: int, memory_mib: int) -> list[Profile]:
    """Profile one program during the workload's fill and its sequential reads.

    Args:
        label: the name of the program.
        tree: its checkout; None for this one.
        data_mib: the data of the workload in MiB.
        memory_mib: the limit of its cgroup in MiB.
    """
    plan = ("fill", "settle", "seq", "verify")
    options = WorkloadOptions(data_mib, phases=plan, warm_mib=memory_mib * 9 // 10, time_limit=200)
    settings = {"swap.priority": str(system.HIGHEST_PRIORITY)}
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="zbench-profile-") as place,
        Daemon(size=f"{2 * data_mib + 512}M", settings=settings, tree=tree) as daemon,
    ):
        daemon.swapon()
        worker = daemon.worker_pid()
        with (
            MemoryCgroup("bench-profile", memory_mib * MIB) as cgroup,
            contextlib.ExitStack() as stack,
        ):
            workload = Workload(options, cgroup.path)
            phases = workload.phases()
            for name in plan:
                data = Path(place) / name
                before = system.processor_seconds(worker)
                with recording(worker, data) if name in PHASES else contextlib.nullcontext():
                    if name == plan[0]:
                        stack.enter_context(workload)  # the fill begins here
                    phase = next(phases)
                if name in PHASES:
                    cpu = system.processor_seconds(worker) - before
                    found.append(_profile(label, phase, cpu, *_report(data)))
            for _ in phases:
                pass  # to the end, where the workload reports a wrong page
    return found


def _profile(label: str, phase: Phase, cpu: float, report: str, samples: int) -> Profile:
    pages = phase.pages_in + phase.pages_out
    shares, busiest = parse(report)
    rate = pages * 4096 / MIB / phase.seconds
    return Profile(
        label,
        PHASES[phase.name],
        rate,
        cpu / pages * 1e6 if pages else 0.0,
        shares,
        busiest,
        samples,
    )


def combined(found: Sequence[Profile]) -> list[Profile]:
    """Return a profile for each label and phase: medians, with the last round's functions."""
    result = []
    for label, phase in dict.fromkeys((one.label, one.phase) for one in found):
        own = [one for one in found if (one.label, one.phase) == (label, phase)]
        shares = {part: median(one.shares[part] for one in own) for part in ORDER}
        rate, cpu = median(one.rate for one in own), median(one.cpu_us for one in own)
        result.append(
            Profile(
                label, phase, rate, cpu, shares, own[-1].busiest, sum(one.samples for one in own)
            )
        )
    return result


def run(
    trees: Sequence[tuple[str, Path | None]], rounds: int, data_mib: int, memory_mib: int
) -> list[Profile]:
    """Profile all programs in turn."""
    found = []
    for number in range(rounds):
        for label, tree in trees if number % 2 == 0 else reversed(trees):
            each = measure(label, tree, data_mib, memory_mib)
            shown = "; ".join(
                f"{one.phase} {one.rate:.0f} MiB/s, {one.cpu_us:.2f} µs a page" for one in each
            )
            progress(f"round {number + 1}/{rounds} {label}: {shown}")
            found += each
    return combined(found)


def table(found: Sequence[Profile]) -> str:
    """Return a table of µs for each page by part, and the busiest functions."""
    rows = [["phase", "program", "MiB/s", "µs a page", *ORDER]]
    for one in found:
        parts = [f"{one.shares[part] * one.cpu_us / 100:.2f}" for part in ORDER]
        rows.append([one.phase, one.label, f"{one.rate:.0f}", f"{one.cpu_us:.2f}", *parts])
    lines = [aligned(rows), ""]
    for one in found:
        busiest = ", ".join(
            f"{name} ({thing}) {percent:.1f} %" for name, thing, percent in one.busiest
        )
        lines.append(f"{one.phase}, {one.label}: {busiest}")
    return "\n".join(lines)


def as_json(found: Sequence[Profile]) -> dict[str, Any]:
    """Return the document, for a JSON file."""
    return {
        "workload": "profile",
        "machine": machine(),
        "profiles": [asdict(one) for one in found],
        "figures": [],
    }


def missing() -> str:
    """Return why no program can be profiled here, or an empty string."""
    return (
        ""
        if not system.missing_programs(["perf"])
        else "perf is not installed (apt-get install linux-perf)"
    )


def tree(text: str) -> tuple[str, Path]:
    """Return label and checkout from LABEL=DIR, for argparse."""
    label, _, path = text.partition("=")
    if not label or not path or not (Path(path) / ".venv/bin/zswapd").exists():
        raise argparse.ArgumentTypeError(
            f"{text}: LABEL=DIR, a checkout with its environment (scripts/test makes one)"
        )
    return label, Path(path).absolute()


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench profile", description="Shows where the worker's processor time goes."
    )
    parser.add_argument(
        "--tree",
        type=tree,
        action="append",
        default=[],
        metavar="LABEL=DIR",
        help="profile another checkout too",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        choices=range(1, 21),
        default=3,
        metavar="N",
        help="rounds of each program (default 3)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="96 MiB through 32, one round: not a measurement"
    )
    arguments.add_json(parser)
    args = parser.parse_args(argv)
    if reason := missing():
        raise HarnessError(reason)
    rounds, data_mib, memory_mib = (1, 96, 32) if args.quick else (args.rounds, 1024, 256)
    found = run([*args.tree, (HERE, None)], rounds, data_mib, memory_mib)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n")
    return 0
