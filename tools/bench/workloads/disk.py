# SPDX-License-Identifier: GPL-2.0-or-later
"""The program `scripts/bench disk`: gains and costs of the disk behind the pool, in five figures.

    hot       writes four times pool.limit, then sends nine of ten loads to a hot fifth of it; the
              share of the hot loads that memory serves, with writeback and without
    slow      runs the same pattern on a disk of 100 reads a second, behind the pool and as a plain
              swap device; the run time
    noise     writes data that does not compress, all of it written through, to this machine's disk
              and to a disk that takes 5 ms for each request; the run time ÷ the plain disk's
    swapped   swaps that data for real, to this machine's disk; the run time of the process ÷ that
              with a plain swap file
    cipher    runs `zswapctl writeback`, encrypted and not; the throughput

This program makes the requests (fio does for `noise`), with the sizes of swap: 128 KiB out, a page
in. Only `swapped` uses kernel swap, so the order of the pages is the same in all other runs. Every
page is checked after its read.

Limits: writes to the slow disk have no delay, which favours the plain device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from tools.bench import arguments
from tools.bench.contenders.swapfile import PLACE, LoopFile, SlowFile, SwapFile
from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.figures import Figure, aligned, machine, progress
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import Workload, WorkloadOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = 4096
OUT = 32
"""The pages that swap writes in one request."""
DATA_MIB, SLOW_MIB, CIPHER_MIB = 160, 16, 160
SLOW_READS = 12_000
NOISE = {"own disk": (256, 16384), "slow disk": (64, 500)}
"""MiB to write, and pages to read at random, for each disk."""
SWAPPED_MIB, SWAPPED_IN_MIB, SWAPPED_FAULTS = 512, 128, 16384
"""The data of the process that swaps, its memory, and the pages that it reads at random."""
WARM = 4
"""The mean loads of each hot page before `hot` begins to count."""
READ_DELAY_MS = 10
WRITEBACKS = 3
"""Runs of half a second, of which the fastest counts: other programs only make a run slower."""


class SlowDisk(SlowFile):
    """A disk that takes 10 ms for each read, one at a time: 100 reads a second."""

    options: ClassVar[tuple[str, ...]] = ("serialize=requests", f"rdelay={READ_DELAY_MS}ms")


class Pages:
    """The pages of a file or device: half noise, half zeros, so that each compresses to half.

    Each page begins with its number.
    """

    def __init__(self, path: Path, mib: int, *, direct: bool = False) -> None:
        self.count = mib * MIB // PAGE
        self._fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        self._noise = random.Random(1).randbytes(1 << 20)
        self._buffer = memoryview(mmap.mmap(-1, OUT * PAGE))  # aligned, for direct I/O

    def _page(self, number: int) -> bytes:
        at = number * 1009 % (len(self._noise) - PAGE // 2)
        return (
            number.to_bytes(8, "little") + self._noise[at : at + PAGE // 2 - 8] + bytes(PAGE // 2)
        )

    def write(self, first: int) -> None:
        """Write OUT pages from page `first` on."""
        for place in range(OUT):
            self._buffer[place * PAGE : (place + 1) * PAGE] = self._page(first + place)
        os.pwritev(self._fd, [self._buffer], first * PAGE)

    def read(self, number: int) -> None:
        """Read a page and check it.

        Raises:
            HarnessError: the page differs.
        """
        os.preadv(self._fd, [self._buffer[:PAGE]], number * PAGE)
        if self._buffer[:PAGE] != self._page(number):
            raise HarnessError(f"page {number} is not what was written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def is_hot(number: int) -> bool:
    """Return whether a page is hot: every fifth group of eight pages is."""
    return number // 8 % 5 == 0


def halves(pages: Pages) -> tuple[list[int], list[int]]:
    """Return the hot pages and the cold ones."""
    numbers = range(pages.count)
    return [number for number in numbers if is_hot(number)], [
        number for number in numbers if not is_hot(number)
    ]


def fill(pages: Pages) -> None:
    """Write all pages in order."""
    for first in range(0, pages.count, OUT):
        pages.write(first)


def _from_memory(daemon: Daemon, pages: Pages, loads: int, rng: random.Random) -> float:
    """Read nine hot pages for each cold one; return the hot loads' share from memory."""
    warm, cold = halves(pages)
    reads = 0
    for _ in range(loads // 900):
        before = _reads(daemon)
        for number in rng.choices(warm, k=900):
            pages.read(number)
        reads += _reads(daemon) - before
        for number in rng.choices(cold, k=100):
            pages.read(number)
    return 1 - reads / (loads // 900 * 900)


@contextlib.contextmanager
def serving(mib: int, backing: Path, **settings: str) -> Iterator[Daemon]:
    """Run a daemon over a disk; its default pool limit is a quarter of its swap file."""
    given = {"backing.path": str(backing), "pool.limit": f"{mib // 4}M", "memory.reserve": "32M"}
    given |= {name.replace("__", "."): value for name, value in settings.items()}
    with Daemon(size=f"{mib}M", settings=given, parent=PLACE) as daemon:
        yield daemon


def _reads(daemon: Daemon) -> int:
    return int(daemon.ask("stats")["core"]["transfers"]["bd_reads"])


def hot(place: Path) -> tuple[dict[str, Any], list[Figure]]:
    """Measure the share of hot pages' loads that memory serves."""
    found: dict[str, Any] = {}
    for name, on in (("with writeback", "true"), ("without", "false")):
        with serving(
            DATA_MIB, place / "store", backing__writeback=on, backing__promote=on
        ) as daemon:
            pages = Pages(daemon.file, DATA_MIB)
            fill(pages)
            rng, loads = random.Random(2), WARM * pages.count // 5
            found[f"{name}, at first"] = _from_memory(daemon, pages, loads, rng)
            found[name] = _from_memory(daemon, pages, loads, rng)
            pages.close()
        progress(f"hot: {name} {found[name]:.3f} of {loads} loads from memory")
    inverted = Figure(
        "hot pages' loads from memory without writeback (the inversion)",
        found["without"],
        0.9,
        at_least=False,
    )
    return found, [
        Figure("hot pages' loads from memory", found["with writeback"], 0.95, at_least=True),
        inverted,
    ]


def _pattern(pages: Pages) -> float:
    """Write all pages and read hot ones meanwhile, then read nine hot pages for each cold one.

    Returns:
        The seconds.
    """
    rng = random.Random(3)
    begin = time.perf_counter()
    kinds = halves(pages)
    for first in range(0, pages.count, OUT):
        pages.write(first)
        for _ in range(4):
            pages.read(rng.choice([number for number in kinds[0] if number < first + OUT]))
    for _ in range(SLOW_READS):
        pages.read(rng.choice(kinds[rng.random() < 0.1]))
    return time.perf_counter() - begin


def slow(_place: Path) -> tuple[dict[str, Any], list[Figure]]:
    """Measure the run times on a slow disk."""
    found: dict[str, Any] = {}
    for name in ("plain", "zswapd"):
        disk = SlowDisk()
        try:
            device = Path(disk.attach((SLOW_MIB + 1) * MIB))
            with contextlib.ExitStack() as stack:
                behind = name == "zswapd"
                path = (
                    stack.enter_context(serving(SLOW_MIB, device, backing__force="true")).file
                    if behind
                    else device
                )
                pages = Pages(path, SLOW_MIB, direct=not behind)
                found[name] = _pattern(pages)
                pages.close()
        finally:
            disk.stop()
        progress(f"slow: {name} {found[name]:.1f} s")
    ratio = found["plain"] / found["zswapd"]
    return found, [
        Figure(
            "disk of 100 reads a second: plain ÷ behind the pool, run time",
            ratio,
            5.0,
            at_least=True,
        )
    ]


def _fio(path: str, mib: int, reads: int) -> float:
    """Return the seconds of writing `mib` MiB of noise and reading `reads` pages of it."""
    common = [
        "--direct=1",
        "--ioengine=libaio",
        "--output-format=json",
        "--refill_buffers",
        f"--size={mib}M",
    ]
    seconds = 0.0
    for kind, job in (
        ("write", ["--rw=write", "--bs=128k", "--iodepth=16"]),
        (
            "read",
            [
                "--rw=randread",
                "--bs=4k",
                "--iodepth=8",
                f"--io_size={reads * PAGE}",
                "--randseed=7",
            ],
        ),
    ):
        out = system.run("fio", "--name=noise", f"--filename={path}", *common, *job, limit=200)
        (report,) = json.loads(out[out.index("{") :])["jobs"]
        seconds += report[kind]["runtime"] / 1000
    return seconds


def _noise_behind(store: Path, mib: int, reads: int) -> float:
    with serving(mib, store, pool__incompressible="refuse", backing__force="true") as daemon:
        loop = system.attach_loop(daemon.file)
        try:
            return _fio(loop, mib, reads)
        finally:
            system.detach_loop(loop)


def noise(place: Path, *, rounds: int = 3) -> tuple[dict[str, Any], list[Figure]]:
    """Measure the cost of data that does not compress."""
    found: dict[str, Any] = {}
    figures: list[Figure] = []
    for where, (mib, reads) in NOISE.items():
        plain, ours = list[float](), list[float]()
        for turn in range(rounds):
            disk = SlowFile()
            path = place / "plain"
            try:
                if where == "slow disk":
                    path = Path(disk.attach((mib + 1) * MIB))
                else:
                    system.run("fallocate", "--length", str((mib + 1) * MIB), path)
                plain.append(_fio(str(path), mib, reads))
                ours.append(_noise_behind(path, mib, reads))
            finally:
                disk.stop()
                (place / "plain").unlink(missing_ok=True)
            progress(
                f"noise: {where}, round {turn + 1}: plain {plain[-1]:.2f} s, zswapd"
                f" {ours[-1]:.2f} s"
            )
        found |= {f"{where}, plain": plain, f"{where}, zswapd": ours}
        ratio = median(one / other for one, other in zip(ours, plain, strict=True))
        figures.append(
            Figure(
                f"data that does not compress, {where}: zswapd ÷ plain, run time",
                ratio,
                1.15,
                at_least=False,
            )
        )
    return found, figures


def _swapping() -> dict[str, float]:
    """Return the seconds of each phase of a verified process whose pages do not compress."""
    options = WorkloadOptions(
        SWAPPED_MIB,
        ("fill", "seq", "random"),
        faults=SWAPPED_FAULTS,
        warm_mib=SWAPPED_IN_MIB * 9 // 10,
        poor=True,
    )
    with (
        MemoryCgroup("bench-disk", SWAPPED_IN_MIB * MIB) as cgroup,
        Workload(options, cgroup.path) as work,
    ):
        return {phase.name: phase.seconds for phase in work.finish()}


def _swapping_on_file(plain: SwapFile) -> dict[str, float]:
    try:
        plain.start(2 * SWAPPED_MIB * MIB)
        return _swapping()
    finally:
        plain.stop()


def _swapping_behind(store: Path, **settings: str) -> dict[str, float]:
    settings |= {"swap__priority": str(system.HIGHEST_PRIORITY), "backing__force": "true"}
    with serving(2 * SWAPPED_MIB, store, **settings) as daemon:
        daemon.swapon()
        return _swapping()


def swapped(place: Path, *, rounds: int = 5) -> tuple[dict[str, Any], list[Figure]]:
    """Measure the cost of data that does not compress for a process that swaps.

    zswapd writes it through, the default, or keeps it until the pool is full.
    """
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "plain": lambda: _swapping_on_file(SwapFile()),
        "a loop device alone": lambda: _swapping_on_file(LoopFile()),
        "written through": lambda: _swapping_behind(place / "store"),
        "kept up to pool.limit": lambda: _swapping_behind(
            place / "store", pool__incompressible="store"
        ),
    }
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name in [*kinds][turn % len(kinds) :] + [*kinds][: turn % len(kinds)]:
            phases = kinds[name]()
            found.setdefault(name, []).append(sum(phases.values()))
            for phase, seconds in phases.items():
                found.setdefault(f"{name}, {phase}", []).append(seconds)
            (place / "store").unlink(missing_ok=True)
            progress(
                f"swapped: round {turn + 1}, {name}: "
                + ", ".join(f"{each} {took:.2f} s" for each, took in phases.items())
            )
    for name in kinds:
        if name != "plain":
            found[f"{name} ÷ plain"] = [
                ours / plain for ours, plain in zip(found[name], found["plain"], strict=True)
            ]
    ratio = median(found["written through ÷ plain"])
    return found, [
        Figure(
            "real swap of data that does not compress: zswapd ÷ swap file, run time",
            ratio,
            1.15,
            at_least=False,
        )
    ]


def _writeback_rate(daemon: Daemon) -> float:
    """Write all pages, then run writeback; return its MiB/s."""
    pages = Pages(daemon.file, CIPHER_MIB)
    fill(pages)
    pages.close()
    begin = time.perf_counter()
    sent = daemon.ctl_json("writeback")["written_back"]
    return float(sent * PAGE / MIB / (time.perf_counter() - begin))


def cipher(place: Path, *, rounds: int = 5) -> tuple[dict[str, Any], list[Figure]]:
    """Measure the cost of encryption for writeback's throughput."""
    found: dict[str, list[float]] = {"plain": [], "encrypted": []}
    for turn in range(rounds):
        for name in ("plain", "encrypted") if turn % 2 else ("encrypted", "plain"):
            encrypt = str(name == "encrypted").lower()
            limits = {"pool__limit": f"{CIPHER_MIB}M", "backing__force": "true"}
            with serving(CIPHER_MIB, place / "store", backing__encrypt=encrypt, **limits) as daemon:
                found[name].append(max(_writeback_rate(daemon) for _ in range(WRITEBACKS)))
        progress(
            f"cipher: round {turn + 1}: "
            + ", ".join(f"{name} {rates[-1]:.0f} MiB/s" for name, rates in found.items())
        )
    ratio = median(
        ours / theirs for ours, theirs in zip(found["encrypted"], found["plain"], strict=True)
    )
    return dict(found), [
        Figure("writeback, encrypted ÷ not, throughput", ratio, 0.9, at_least=True)
    ]


PARTS = {"hot": hot, "slow": slow, "noise": noise, "swapped": swapped, "cipher": cipher}


def main(argv: Sequence[str]) -> int:
    """Measure; print a table and the figures; return 1 if a figure does not hold."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench disk", description="Measures the disk behind the pool."
    )
    known = arguments.names(lambda: list(PARTS), "part")
    parser.add_argument(
        "--parts",
        type=known,
        default=list(PARTS),
        metavar="LIST",
        help=f"parts, out of {', '.join(PARTS)} (default all)",
    )
    arguments.add_json(parser)
    args = parser.parse_args(argv)
    if absent := system.missing_programs(["nbdkit", "nbdfuse", "fio"]):
        raise HarnessError(
            f"not installed: {', '.join(absent)}", hint="apt-get install nbdkit libnbd-bin fio"
        )
    figures: list[Figure] = []
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="zbench-disk-", dir=PLACE) as place:
        for name in args.parts:
            measured[name], its = PARTS[name](Path(place))
            figures += its
    rows = [["", "what", "value"]]
    for name, values in measured.items():
        for what, value in values.items():
            each = value if isinstance(value, list) else [value]
            rows.append([name, what, " ".join(f"{one:.3g}" for one in each)])
    print(aligned(rows))
    print("\n".join(figure.line() for figure in figures))
    if args.json:
        document = {
            "machine": machine(),
            "measured": measured,
            "figures": [asdict(figure) for figure in figures],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(figure.holds for figure in figures) else 1
