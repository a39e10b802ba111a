# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench shrink`.

It measures how fast a full cache frees its memory, and the cost for reads of swap meanwhile.

    scripts/bench shrink                     1 GiB of cached pages, both allocators, by command and
                                             by a shortage
    scripts/bench shrink --mib 256 --check   256 MiB; exit 1 when a figure does not hold
    scripts/bench shrink --by command        no shortage, which takes gibibytes for a moment

The program reads a file through a daemon until the cache is full. Then a command tells the cache to
shrink to a twentieth, or another process makes a memory shortage and keeps it (shortage.py).
Meanwhile a thread reads a page of swap every millisecond, as the loop device would, and checks it.

The figures are the time until the system has nine tenths of the frames back, by the size of the
arena, and the time of reads of swap during and before the shrinking. A shortage begins when free
memory falls below the zones' low watermark.

Limits: on a shared machine, the slowest read is the other programs'.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import struct
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.figures import Figure, aligned, machine, progress, told
from tools.bench.harness.shortage import Shortage
from tools.bench.harness.system import MIB, HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = mmap.PAGESIZE
ALLOCATORS = ("zbud", "zsmalloc")
CAUSES = ("command", "pressure")
SWAPPED = 4000
"""The pages of swap that the reader reads."""
INTERVAL_S = 0.001
"""Seconds between two reads."""
BEFORE_S = 3.0
"""Seconds of reads before the shrinking, for comparison."""
LIMIT_S = 400.0
SHRINK_LIMIT_S = 60.0
PIECE_MIB = 8
"""MiB of the volume to read between two checks of the cache's size."""
VERIFIED_MIB = 128
"""MiB of the volume to read and verify after the shrinking."""
SHARE = 0.95
"""The share of the frames that the cache has to free."""
WANTED = 0.9
"""The share of the frames whose return is timed."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One shrinking.

    Attributes:
        allocator: the cache's allocator.
        by: the cause: command or pressure.
        cached_mib: the memory of the full cache in MiB.
        pages: the cached pages.
        back_s: seconds until the system had WANTED of the frames back.
        batch_ms: the longest time in which the daemon evicted and served no request.
        before_ms: reads of swap before the shrinking: median, 99th percentile, slowest.
        during_ms: reads of swap during the shrinking: the same three.
    """

    allocator: str
    by: str
    cached_mib: float
    pages: int
    back_s: float
    batch_ms: float
    before_ms: tuple[float, float, float]
    during_ms: tuple[float, float, float]


class Reader:
    """A thread that reads a page of swap every INTERVAL_S, and checks it.

    Args:
        path: the swap file; the constructor writes its pages.

    Attributes:
        wrong: the pages that came back changed.
    """

    def __init__(self, path: Path) -> None:
        rng = random.Random(1)
        self._fd = os.open(path, os.O_RDWR)
        self._pages = [rng.randbytes(900) + bytes(PAGE - 900) for _ in range(SWAPPED)]
        for number, page in enumerate(self._pages):
            os.pwrite(self._fd, page, number * PAGE)
        self._taken: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.wrong = ""
        self._thread.start()

    def _read(self) -> None:
        rng = random.Random(2)
        while not self._end.wait(INTERVAL_S):
            number = rng.randrange(SWAPPED)
            began = time.perf_counter()
            try:
                page = os.pread(self._fd, PAGE, number * PAGE)
            except OSError as error:
                self.wrong = f"page {number}: {error}"
                return
            self._taken.append((time.perf_counter() - began) * 1000)
            if page != self._pages[number]:
                self.wrong = f"page {number} has come back as another"
                return

    def forget(self) -> None:
        """Drop the reads until now from the next `take`."""
        self._taken = []

    def take(self) -> tuple[float, float, float]:
        """Return median, 99th percentile and slowest of the reads since the last call, in ms."""
        taken, self._taken = sorted(self._taken), []
        if not taken:
            raise HarnessError(f"nothing was read from swap: {self.wrong or 'a read hangs'}")
        return taken[len(taken) // 2], taken[len(taken) * 99 // 100], taken[-1]

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(LIMIT_S)
        os.close(self._fd)


def write_file(path: Path, mib: int) -> None:
    """Write a file of different pages that each compress to a third."""
    rng = random.Random(3)
    block = bytearray(
        b"".join(
            rng.randbytes(rng.randrange(900, 1700)).ljust(PAGE, b"\0") for _ in range(MIB // PAGE)
        )
    )
    with path.open("wb") as file:
        for number in range(mib):
            for offset in range(0, MIB, PAGE):
                struct.pack_into("=I", block, offset, number)
            file.write(block)


def read_file(path: Path, expected: Path) -> Iterator[None]:
    """Read a volume around in circles, past the kernel's page cache, and compare each piece.

    Yields:
        None after each piece of PIECE_MIB.

    Raises:
        HarnessError: a piece differs from the backing file.
    """
    with path.open("rb", buffering=0) as file, expected.open("rb", buffering=0) as backing:
        while True:
            for of in (file, backing):
                of.seek(0)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := file.read(MIB):
                if piece != backing.read(len(piece)):
                    raise HarnessError(
                        f"{path} is not what {expected} is, before byte {file.tell()}"
                    )
                if file.tell() % (PIECE_MIB * MIB) == 0:
                    yield


class Arena:
    """The memory of a daemon's pages: the largest file that its worker has open."""

    def __init__(self, worker: int) -> None:
        def size(entry: Path) -> int:
            try:
                return entry.stat().st_blocks * 512 if "deleted" in str(entry.readlink()) else 0
            except OSError:
                return 0

        self._path = max(Path(f"/proc/{worker}/fd").iterdir(), key=size)

    def backed_bytes(self) -> int:
        """Return the bytes of memory that the arena has."""
        return self._path.stat().st_blocks * 512


def measure(
    allocator: str, mib: int, directory: Path | None = None, by: str = "command"
) -> Measurement:
    """Fill a cache of `mib` MiB and make it shrink.

    Args:
        allocator: the cache's allocator.
        by: the cause: command or pressure.
        mib: the memory of the cache in MiB.
        directory: the directory for the file that is read.

    Raises:
        HarnessError: the cache does not fill, a byte differs, or the memory does not come back.
    """
    settings = {
        "memory.reserve": "32M",
        "cache.limit": f"{mib}M",
        "cache.allocator": allocator,
        "cache.sequential_cutoff": "",
    }
    with Daemon(size="256M", settings=settings, parent=directory) as daemon:
        backing = daemon.directory / "slow"
        write_file(backing, mib * 3)
        daemon.ctl("cache", "add", "disk", "--backing", str(backing))
        volume = daemon.mountpoint / "cache" / "disk"
        reader = Reader(daemon.file)
        try:
            return _measure(daemon, reader, (allocator, by), mib, read_file(volume, backing))
        finally:
            reader.close()


@contextlib.contextmanager
def _asked_to(daemon: Daemon, by: str, frames: int) -> Iterator[Callable[[], float]]:
    """Make the cache shrink while the body runs.

    Yields:
        A function that waits for the start and returns it as a value of time.monotonic().
    """
    if by == "pressure":
        with Shortage() as shortage:
            yield shortage.wait
        return
    asking = threading.Thread(target=daemon.ask, args=("shrink",), kwargs={"frames": frames})
    began = time.monotonic()
    asking.start()
    try:
        yield lambda: began
    finally:
        asking.join(SHRINK_LIMIT_S)


def _measure(
    daemon: Daemon, reader: Reader, which: tuple[str, str], mib: int, reading: Iterator[None]
) -> Measurement:
    end = time.monotonic() + LIMIT_S
    while (frames := daemon.ask("stats")["core"]["cache"]["frames"]) * PAGE < 0.9 * mib * MIB:
        if time.monotonic() > end:
            raise HarnessError(
                f"the cache has {frames * PAGE / MIB:.0f} of {mib} MiB after {LIMIT_S:.0f} s"
            )
        next(reading)
    time.sleep(1)  # the reserve is refilled after the last reader
    reader.take()
    time.sleep(BEFORE_S)
    before = reader.take()
    core = daemon.ask("stats")["core"]
    pages = core["cache"]["cleancache"]["pages"]
    # The frames that swap's reserve lacks go to it, not to the system.
    lacking = max(0, core["frames"]["reserve_target_frames"] - core["frames"]["free_frames"])
    arena = Arena(daemon.worker_pid())
    backed = arena.backed_bytes()
    with _asked_to(daemon, which[1], int(frames * SHARE)) as beginning:
        began = beginning()
        reader.forget()
        end = time.monotonic() + SHRINK_LIMIT_S
        while backed - arena.backed_bytes() < (WANTED * frames - lacking) * PAGE:
            if time.monotonic() > end:
                raise HarnessError(
                    f"{(backed - arena.backed_bytes()) / MIB:.0f} MiB came back in"
                    f" {SHRINK_LIMIT_S:.0f} s"
                )
            time.sleep(0.002)
        back = time.monotonic() - began
    during = reader.take()
    if reader.wrong:
        raise HarnessError(f"swap: {reader.wrong}")
    for _ in range(VERIFIED_MIB // PIECE_MIB):
        next(reading)
    batch = daemon.ask("stats")["shrinker"]["longest_batch_s"] * 1000
    return Measurement(*which, frames * PAGE / MIB, pages, back, batch, before, during)


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as a table of text."""
    rows = [
        ["", "MiB", "pages", "90 % back, s", "batch, ms", "reads before, ms", "reads meanwhile, ms"]
    ]
    for one in found:
        reads = [
            " / ".join(f"{value:.2f}" for value in times)
            for times in (one.before_ms, one.during_ms)
        ]
        cells = [
            f"{one.cached_mib:.0f}",
            str(one.pages),
            f"{one.back_s:.2f}",
            f"{one.batch_ms:.2f}",
        ]
        rows.append([f"{one.allocator}, by {one.by}", *cells, *reads])
    return aligned(rows) + "\nreads of swap: median / 99 % / slowest"


def figures_to_hold(found: Sequence[Measurement]) -> list[Figure]:
    """Return the claims: the time until the memory is free, and the slowest read meanwhile.

    The 99th percentile of the reads before is subtracted: it is the cost of other programs.
    """
    figures = []
    for one in found:
        of_it = f"cache on {one.allocator}, by {one.by}"
        figures += [
            Figure(f"{of_it}: 90 % given back, s", one.back_s, 2.0, at_least=False),
            Figure(
                f"{of_it}: longest eviction without serving, ms", one.batch_ms, 10.0, at_least=False
            ),
            Figure(
                f"{of_it}: slowest read of swap, added, ms",
                one.during_ms[2] - one.before_ms[1],
                10.0,
                at_least=False,
            ),
        ]
    return figures


def run(
    mib: int, allocators: Sequence[str], causes: Sequence[str], directory: Path | None = None
) -> list[Measurement]:
    """Measure each allocator with each cause."""
    found = []
    for by in causes:
        for name in allocators:
            progress(f"{mib} MiB on {name}, by {by} ...")
            found.append(measure(name, mib, directory, by))
    return found


def as_json(found: Sequence[Measurement]) -> dict[str, Any]:
    """Return the document, for a JSON file."""
    figures = told(figures_to_hold(found))
    return {
        "workload": "shrink",
        "machine": machine(),
        "runs": [asdict(one) for one in found],
        "figures": figures,
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench shrink", description="Measures how fast a cache frees its memory."
    )
    parser.add_argument(
        "--mib",
        type=int,
        default=1024,
        help="memory of the cache (default 1024; the file has three times that)",
    )
    known = arguments.names(lambda: list(ALLOCATORS), "allocator")
    parser.add_argument(
        "--allocators",
        type=known,
        default=ALLOCATORS,
        metavar="LIST",
        help="allocators of the cache (default both)",
    )
    causes = arguments.names(lambda: list(CAUSES), "cause")
    parser.add_argument(
        "--by", type=causes, default=CAUSES, metavar="LIST", help="command, pressure (default both)"
    )
    parser.add_argument(
        "--directory",
        type=arguments.directory,
        metavar="DIR",
        help="directory for the file (default the system's)",
    )
    arguments.add_results(parser)
    args = parser.parse_args(argv)
    if args.mib < 8:
        parser.error("a cache has 8 MiB at least")
    found = run(args.mib, args.allocators, args.by, args.directory)
    print(table(found))
    figures = figures_to_hold(found)
    print("\n".join(["", *(figure.line() for figure in figures)]))
    if args.json:
        args.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    return 1 if args.check and not all(figure.holds for figure in figures) else 0
