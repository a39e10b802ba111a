# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench scale`: the cost of a page by the number of pages.

    scripts/bench scale                    2^16, 2^18 … 2^24 small pages; 4 minutes, 2 GiB of memory
    scripts/bench scale --contents real    the raw workload's pages, up to 2^20; 2 GiB of memory
    scripts/bench scale --plot FILE.svg --json FILE

It runs below FUSE and without root. The synchronous core runs in this process, driven as the FUSE
edge drives it: writes of 128 KiB, reads of single pages and of 32 KiB. Each number of pages has a
process of its own and a device of that size. The steps are:

- store: all pages in order, then a quarter of them anew at random places (overwrite);
- load: all pages in order, eight at a time, then single pages at random; each is compared;
- takeover: a second core takes over the arena of the first, as after a worker's death;
- discard: one request for the whole device.

Small pages are same-filled, each with a different word. They do not use the codec, so the cost is
that of index, allocator and memory, which could grow with the number. 2^24 of them are 64 GiB of
swap in 512 MiB.

Times are processor time for each page. The reserve is refilled between requests, and that time does
not count, because another thread does it in the daemon. Limits: the figures contain the machine's
last-level cache; with many pages, a random page is one more miss.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.harness.figures import Figure, aligned, machine, quiet_pyplot, save, told
from tools.bench.harness.workload import build
from zswapd.config import load
from zswapd.core import compress
from zswapd.core.core import Core, Inherited

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zswapd.config import Config

PAGE = 4096
WRITE_PAGES = 32
READ_PAGES = 8
RANDOM_AT_MOST = 1 << 18
DEFAULT_POWERS = {"small": "16,18,20,22,24", "real": "16,18,20"}
ONE_LIMIT_S = 560.0
REPEATS = 5
REPEATED_TO = 1 << 18
TOP = Path(__file__).resolve().parents[3]
WORD = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Measurement:
    """The costs for one number of pages.

    Attributes:
        pages, contents: the number of pages and their kind.
        store_us, overwrite_us, load_us, load_random_us: µs for each page.
        takeover_us, takeover_s: the takeover, in µs for each page and in seconds.
        discard_us, discard_s: one discard of the whole device, in µs for each page and in seconds.
        index_bytes: bytes of index nodes for each page, with populated nodes that are free.
        heap_bytes: bytes for each page by which the process grew without the arena: index, bitmap,
            Python objects, page tables.
        arena_bytes: bytes of the arena for each page, with frame table and reserve.
    """

    pages: int
    contents: str
    store_us: float
    overwrite_us: float
    load_us: float
    load_random_us: float
    takeover_us: float
    takeover_s: float
    discard_us: float
    discard_s: float
    index_bytes: float
    heap_bytes: float
    arena_bytes: float


class _Clock:
    """A sum of this process's processor time between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.process_time()

    def __exit__(self, *_exc_info: object) -> None:
        self.seconds += time.process_time() - self._since


def _small(number: int, generation: int) -> bytes:
    return WORD.pack((number << 8 | generation) * 0x9E3779B97F4A7C15 & (1 << 64) - 1 | 1) * (
        PAGE // 8
    )


def _real(bank: bytes) -> Callable[[int, int], bytes]:
    pages = len(bank) // PAGE

    def page(number: int, generation: int) -> bytes:
        at = (number * 7 + generation) % pages * PAGE
        return bank[at : at + PAGE]

    return page


def _config(pages: int) -> Config:
    settings = (
        f"swap.size={pages * PAGE}",
        "memory.reserve=64M",
        "pool.limit=90%",
        "pool.zv_page_count_policy_percent=100",
    )
    assignments = [(*setting.split("=", 1), "--set") for setting in settings]
    return load(codecs=compress.names(), assignments=assignments, root=Path("/"), page_size=PAGE)  # type: ignore[arg-type]


def _status_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _grown() -> int:
    return _status_bytes("RssAnon") + _status_bytes("VmPTE")


def _refill(core: Core) -> None:
    while core.frames.wants_refill():
        core.frames.refill_now()
    while core.nodes.wants_refill():
        core.nodes.refill_now()


def measure(pages: int, contents: str) -> Measurement:
    """Drive one core through all steps, in this process.

    Raises:
        ValueError: a page came back changed, or was refused.
    """
    config = _config(pages)
    page = _small if contents == "small" else _real(_bank())
    before = _grown()
    core = Core(config)
    generations = bytearray(pages)
    store, overwrite = _Clock(), _Clock()
    _store(core, page, range(0, pages, WRITE_PAGES), store)
    count = min(pages // 4, RANDOM_AT_MOST)
    _overwrite(core, page, generations, overwrite, count)
    heap = _grown() - before - pages  # a byte of generation for each page is this program's
    seen = core.statistics()
    load, load_random = _Clock(), _Clock()
    rng = random.Random(2)
    _load(core, page, generations, range(0, pages, READ_PAGES), READ_PAGES, load)
    _load(core, page, generations, [rng.randrange(pages) for _ in range(count)], 1, load_random)
    fd = os.dup(core.arena.fd)
    core.close()
    del core
    gc.collect()
    takeover, discard = _Clock(), _Clock()
    with takeover:
        core = Core(config, inherited=Inherited(fd))
    os.close(fd)
    if core.statistics().recovery.recovered_pages != pages:
        raise ValueError(
            f"of {pages} pages {core.statistics().recovery.recovered_pages} were taken over"
        )
    _load(core, page, generations, range(0, pages, max(pages // 1024, 1)), 1, _Clock())
    with discard:
        core.devices["swap"].discard(0, pages * PAGE)
    if core.frames.used_frames:
        raise ValueError(
            f"{core.frames.used_frames} frames are in use after a discard of everything"
        )
    core.close()
    return Measurement(
        pages,
        contents,
        store_us=store.seconds / pages * 1e6,
        overwrite_us=overwrite.seconds / count * 1e6,
        load_us=load.seconds / pages * 1e6,
        load_random_us=load_random.seconds / count * 1e6,
        takeover_us=takeover.seconds / pages * 1e6,
        takeover_s=takeover.seconds,
        discard_us=discard.seconds / pages * 1e6,
        discard_s=discard.seconds,
        index_bytes=seen.tmem.objnode_bytes / pages,
        heap_bytes=heap / pages,
        arena_bytes=seen.arena_backed_bytes / pages,
    )


def _bank() -> bytes:
    """Return 64 MiB of the raw workload's pages."""
    command = [str(build()), "--mib", "64", "--phases", "dump"]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def _store(
    core: Core, page: Callable[[int, int], bytes], firsts: Sequence[int], clock: _Clock
) -> None:
    device = core.devices["swap"]
    for first in firsts:
        data = memoryview(b"".join(page(number, 0) for number in range(first, first + WRITE_PAGES)))
        with clock:
            refused = device.write(first * PAGE, data)
        if refused is not None:
            raise ValueError(f"pages from {first} on were refused: {refused.name}")
        _refill(core)


def _overwrite(
    core: Core, page: Callable[[int, int], bytes], generations: bytearray, clock: _Clock, count: int
) -> None:
    device = core.devices["swap"]
    rng = random.Random(1)
    for _ in range(count):
        number = rng.randrange(len(generations))
        generations[number] = generations[number] + 1 & 0xFF
        data = memoryview(page(number, generations[number]))
        with clock:
            refused = device.write(number * PAGE, data)
        if refused is not None:
            raise ValueError(f"page {number} was refused: {refused.name}")
        _refill(core)


def _load(
    core: Core,
    page: Callable[[int, int], bytes],
    generations: bytearray,
    firsts: Sequence[int],
    count: int,
    clock: _Clock,
) -> None:
    device = core.devices["swap"]
    out = memoryview(bytearray(count * PAGE))
    for first in firsts:
        with clock:
            device.read_into(first * PAGE, out)
        for place in range(count):
            if out[place * PAGE : (place + 1) * PAGE] != page(
                first + place, generations[first + place]
            ):
                raise ValueError(f"page {first + place} came back as another")


def measure_apart(pages: int, contents: str) -> Measurement:
    """Measure in a new process, whose heap has no free memory that would hide growth.

    Small numbers of pages have several runs, and the result is their medians.

    Raises:
        RuntimeError: the process failed; the message has its output.
    """
    command = [
        sys.executable,
        "-m",
        "tools.bench.workloads.scale",
        "--one",
        str(pages),
        "--contents",
        contents,
    ]
    each = []
    for _ in range(REPEATS if pages <= REPEATED_TO else 1):
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=ONE_LIMIT_S, cwd=TOP
        )
        if done.returncode:
            raise RuntimeError(f"{pages} pages: {done.stderr[-800:]}")
        each.append(json.loads(done.stdout))
    numbers = {
        name: median(one[name] for one in each)
        for name in each[0]
        if name not in {"pages", "contents"}
    }
    return Measurement(pages, contents, **numbers)


COLUMNS = {
    "store_us": "store µs",
    "overwrite_us": "overwrite µs",
    "load_us": "load µs",
    "load_random_us": "at random µs",
    "takeover_us": "takeover µs",
    "takeover_s": "all s",
    "discard_us": "discard µs",
    "discard_s": "all s",
    "index_bytes": "index B",
    "heap_bytes": "heap B",
    "arena_bytes": "arena B",
}


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as a table of costs for each page."""
    rows = [
        (f"2^{one.pages.bit_length() - 1}", *(f"{getattr(one, name):.2f}" for name in COLUMNS))
        for one in found
    ]
    return aligned([("pages", *COLUMNS.values()), *rows])


def figures_to_hold(found: Sequence[Measurement]) -> list[Figure]:
    """Return the claims: the cost of a page at most pages ÷ fewest, and its bytes on the heap.

    Sequential figures are store and load; random ones are overwrite and random load. The growth of
    the process has a fixed part, which is small enough for a page from 2^20 pages on.
    """
    fewest, most = min(found, key=_pages), max(found, key=_pages)
    cost = (most.store_us + most.load_us) / (fewest.store_us + fewest.load_us)
    at_random = (most.overwrite_us + most.load_random_us) / (
        fewest.overwrite_us + fewest.load_random_us
    )
    there = {one.pages for one in found} >= {1 << 16, 1 << 24}
    many = most.pages >= 1 << 20
    return [
        Figure(
            "cost of a page in order, at 2^24 pages ÷ at 2^16",
            cost if there else None,
            1.2,
            at_least=False,
        ),
        Figure(
            "cost of a page at random, at 2^24 pages ÷ at 2^16",
            at_random if there else None,
            1.2,
            at_least=False,
        ),
        Figure("bytes of index a page, at the most pages", most.index_bytes, 16.0, at_least=False),
        Figure(
            "bytes a page that the process grows by, but the arena",
            most.heap_bytes if many else None,
            16.0,
            at_least=False,
        ),
    ]


def _pages(one: Measurement) -> int:
    return one.pages


def plot(found: Sequence[Measurement], path: Path, source: str = "") -> None:
    """Draw the costs of a page, a takeover and a discard by the number of pages."""
    pyplot = quiet_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    numbers = [one.pages for one in found]
    for name in (
        "store_us",
        "overwrite_us",
        "load_us",
        "load_random_us",
        "takeover_us",
        "discard_us",
    ):
        left.plot(
            numbers,
            [getattr(one, name) for one in found],
            marker="o",
            markersize=3,
            label=name.removesuffix("_us"),
        )
    for name in ("takeover_s", "discard_s"):
        right.plot(
            numbers,
            [getattr(one, name) for one in found],
            marker="o",
            markersize=3,
            label=name.removesuffix("_s"),
        )
    right.set_yscale("log")
    left.set_ylim(bottom=0)
    for axis, unit in ((left, "µs a page"), (right, "s for all pages")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("stored pages")
        axis.set_ylabel(unit)
        axis.legend(fontsize=7)
    save(figure, path, source)


def as_json(found: Sequence[Measurement]) -> dict[str, Any]:
    """Return the document, for a JSON file."""
    figures = told(figures_to_hold(found))
    return {
        "workload": "scale",
        "machine": machine(),
        "measurements": [asdict(one) for one in found],
        "figures": figures,
    }


def run(powers: Sequence[int], contents: str) -> list[Measurement]:
    """Measure 2^power pages for each power."""
    found = []
    for power in powers:
        print(f"2^{power} pages, {contents} ...", file=sys.stderr, flush=True)
        found.append(measure_apart(1 << power, contents))
    return found


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench scale",
        description="Measures the cost of a page by the number of pages.",
    )
    powers = arguments.numbers(10, 24)
    parser.add_argument(
        "--powers",
        type=powers,
        metavar="LIST",
        help="numbers of pages as powers of two, 10 to 24 (default 16,18,20,22,24; real: to 20)",
    )
    parser.add_argument("--contents", choices=("small", "real"), default="small")
    parser.add_argument(
        "--plot", type=arguments.picture, metavar="FILE", help="draw the costs into FILE"
    )
    arguments.add_results(parser)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(asdict(measure(args.one, args.contents))))
        return 0
    found = run(sorted(args.powers or powers(DEFAULT_POWERS[args.contents])), args.contents)
    print(table(found))
    figures = figures_to_hold(found)
    print("\n".join(["", *(figure.line() for figure in figures)]))
    if args.json:
        args.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)
    return 1 if args.check and not all(figure.holds for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
