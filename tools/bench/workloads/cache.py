# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench cache`.

It reads a file on a slow device repeatedly, from the device and from its cache volume.

    scripts/bench cache                     read 16 MiB, at random and in order, with room for half
                                            of it in the reader's page cache
    scripts/bench cache --json FILE --check

The file's pages are the raw workload's. The first set has only pages that compress. The second one
(mixed) also has the 5 % that do not. The cache does not keep those, so a read with one of them has
to go to the device.

The slow device is nbdkit's delay filter (5 ms for each read, several reads at once), which nbdfuse
shows as a file. The reader is in a memory cgroup, so the kernel's page cache holds at most half of
the set. The program reads the cgroup's page cache after each pass, and its largest share is one of
the figures. Each pass gives a checksum of all bytes.

Limits: the reads go through the page cache and FUSE, like any reader's. Sequential reads also
measure the kernel's read-ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.figures import Figure, aligned, machine, told
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE = 4096
SET_MIB = 16
MEMORY_MIB = 8
"""The limit of the reader's cgroup in MiB.

The program is charged to the cgroup that it was started in, so all of this is for page cache.
"""
BLOCK = 16 << 10
DELAY_MS = 5
PASSES = {"device": 2, "volume": 5}
"""The passes that read the set again, by place."""
CONTENTS = ("compressible", "mixed")
ORDERS = ("random", "sequential")
READER_LIMIT_S = 120.0
WANTED = 20.0

_READER = """
import hashlib, json, os, random, sys, time
sys.stdin.readline()
path, block, order = sys.argv[1], int(sys.argv[2]), sys.argv[3]
fd = os.open(path, os.O_RDONLY)
blocks = list(range(os.fstat(fd).st_size // block))
if order == "random":
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    random.Random(1).shuffle(blocks)
sums = [b""] * len(blocks)
while True:
    begin = time.monotonic()
    for number in blocks:
        sums[number] = hashlib.md5(os.pread(fd, block, number * block)).digest()
    seconds, total = time.monotonic() - begin, hashlib.md5(b"".join(sums)).hexdigest()
    print(json.dumps([seconds, total]), flush=True)
    if not sys.stdin.readline():
        break
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """The reads of one set in one order, from one place.

    Attributes:
        contents: compressible or mixed.
        order: random or sequential.
        place: device or volume.
        first_s: the seconds of the first pass.
        again_s: the seconds of each further pass.
        page_cache: the largest share of the set that the page cache held after a pass.
    """

    contents: str
    order: str
    place: str
    first_s: float
    again_s: tuple[float, ...]
    page_cache: float

    @property
    def median_s(self) -> float:
        """The median seconds of the further passes."""
        return median(self.again_s)


@contextlib.contextmanager
def slow_file(directory: Path, contents: Path, delay_ms: int = DELAY_MS) -> Iterator[Path]:
    """Show `contents` as a file whose reads take `delay_ms`, while the body runs.

    Yields:
        The path of the slow file.

    Raises:
        HarnessError: nbdfuse does not come up.
    """
    mountpoint, ready = directory / "nbd", directory / "ready"
    mountpoint.mkdir()
    command = ["nbdfuse", "-P", str(ready), str(mountpoint / "disk"), "--command"]
    command += ["nbdkit", "-s", "--filter=delay", "file", str(contents), f"rdelay={delay_ms}ms"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 15
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise HarnessError("nbdfuse does not come up")
            time.sleep(0.02)
        yield mountpoint / "disk"
    finally:
        for place, _ in system.mounts_below(mountpoint):
            system.unmount(place)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait(10)
        ready.unlink(missing_ok=True)
        mountpoint.rmdir()


def _page_cache(cgroup: Path) -> int:
    """Return the bytes of page cache of a cgroup of either version."""
    text = (cgroup / "memory.stat").read_text()
    found = re.search(r"^(?:cache|file) (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def read(path: Path, which: tuple[str, str, str], passes: int, expected: str) -> Measurement:
    """Read a file once, and `passes` times again, in a cgroup of its own.

    Args:
        path: the path of the file.
        which: contents, order and place of the measurement.
        passes: the number of further passes.
        expected: the MD5 of the MD5s of its blocks.

    Raises:
        HarnessError: the checksum of a pass differs from `expected`.
    """
    _, order, place = which
    size = path.stat().st_size
    with MemoryCgroup(f"bench-cache-{place}", MEMORY_MIB * MIB) as cgroup:
        command = [sys.executable, "-c", _READER, str(path), str(BLOCK), order]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader:
            assert reader.stdin is not None
            assert reader.stdout is not None
            (cgroup.path / "cgroup.procs").write_text(str(reader.pid))
            times, share = [], 0.0
            for _ in range(passes + 1):
                reader.stdin.write("go\n")
                reader.stdin.flush()
                line = reader.stdout.readline()
                if not line:
                    raise HarnessError(f"the reader of {path} has ended")
                seconds, checksum = json.loads(line)
                if checksum != expected:
                    raise HarnessError(f"{path} is not what was written")
                times.append(seconds)
                share = max(share, _page_cache(cgroup.path) / size)
            reader.stdin.close()
            reader.wait(READER_LIMIT_S)
    return Measurement(*which, times[0], tuple(times[1:]), share)


def _make(contents: str, mib: int) -> bytes:
    """Return the bytes of a set of `mib` MiB."""
    command = [str(build()), "--mib", str(mib * 2), "--phases", "dump"]
    data = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    pages = (data[at : at + PAGE] for at in range(0, len(data), PAGE))
    if contents == CONTENTS[0]:
        pages = (page for page in pages if len(zlib.compress(page, 1)) < PAGE * 3 // 4)
    return b"".join(itertools.islice(pages, mib * MIB // PAGE))


def run(
    mib: int = SET_MIB, passes: Mapping[str, int] = PASSES, contents: Sequence[str] = CONTENTS
) -> list[Measurement]:
    """Measure all sets in both orders from their volumes, and the first one from the device.

    The device's time does not depend on the set.
    """
    found = []
    settings = {"cache.limit": "256M", "memory.reserve": "64M", "cache.sequential_cutoff": ""}
    for kind in contents:
        with tempfile.TemporaryDirectory(prefix="zbench-cache-") as name:
            directory = Path(name)
            data = _make(kind, mib)
            (directory / "contents").write_bytes(data)
            sums = [
                hashlib.md5(data[at : at + BLOCK]).digest() for at in range(0, len(data), BLOCK)
            ]
            expected = hashlib.md5(b"".join(sums)).hexdigest()
            with (
                slow_file(directory, directory / "contents") as slow,
                Daemon(size="64M", settings=settings, parent=directory) as daemon,
            ):
                for order in ORDERS:
                    if kind == contents[0]:
                        found.append(
                            read(slow, (kind, order, "device"), passes["device"], expected)
                        )
                    daemon.ctl("cache", "add", order, "--backing", str(slow))
                    volume = daemon.mountpoint / "cache" / order
                    found.append(read(volume, (kind, order, "volume"), passes["volume"], expected))
                    daemon.ctl("cache", "remove", order)
    return found


def faster(found: Sequence[Measurement], order: str) -> float:
    """Return device ÷ volume of the median seconds, for the set that compresses."""
    there = {
        one.place: one.median_s
        for one in found
        if (one.contents, one.order) == (CONTENTS[0], order)
    }
    return there["device"] / there["volume"]


def figures_to_hold(found: Sequence[Measurement]) -> list[Figure]:
    """Return the claims: the speed-up of random reads, and at most half of the set in page cache.

    Sequential reads have no claim: the kernel's read-ahead hides the device's latency there.
    """
    ratio, share = faster(found, ORDERS[0]), max(one.page_cache for one in found)
    return [
        Figure(
            "cache volume, random: read again, device ÷ volume (time)", ratio, WANTED, at_least=True
        ),
        Figure(
            "cache volume: share of the set in the kernel's page cache", share, 0.5, at_least=False
        ),
    ]


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as a table of text."""
    rows = [
        [
            "contents",
            "order",
            "from",
            "first s",
            "again s, median",
            "fastest",
            "slowest",
            "in page cache %",
        ]
    ]
    for one in found:
        numbers = (one.first_s, one.median_s, min(one.again_s), max(one.again_s))
        rows.append(
            [
                one.contents,
                one.order,
                one.place,
                *(f"{value:.3f}" for value in numbers),
                f"{one.page_cache * 100:.0f}",
            ]
        )
    return aligned(rows)


def as_json(found: Sequence[Measurement]) -> dict[str, Any]:
    """Return the document, for a JSON file."""
    measurements = [{**asdict(one), "median_s": one.median_s} for one in found]
    return {
        "workload": "cache",
        "machine": machine(),
        "measurements": measurements,
        "figures": told(figures_to_hold(found)),
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench cache", description="Reads a slow file through a cache volume."
    )
    arguments.add_results(parser)
    args = parser.parse_args(argv)
    if absent := system.missing_programs(["nbdkit", "nbdfuse"]):
        raise HarnessError(
            f"not installed: {', '.join(absent)}", hint="apt-get install nbdkit libnbd-bin"
        )
    found = run()
    print(table(found))
    figures = figures_to_hold(found)
    print("\n".join(["", *(figure.line() for figure in figures)]))
    if args.json:
        args.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    return 1 if args.check and not all(figure.holds for figure in figures) else 0
