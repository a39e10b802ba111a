# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/bench density`.

It measures the pages that each allocator stores in a frame, and the time of its operations.

    scripts/bench density                    print the table
    scripts/bench density --plot FILE.svg    also draw a plot
    scripts/bench density --json FILE        also write all figures

It needs no swap and no root: it drives the allocators alone, each on its own arena. The objects
have the sizes of compressed 4 KiB pages, in four distributions. Each object has its header. A page
that gains nothing from a shared frame is a whole body with a header beside it, as in swap;
`refused` counts the pages that the cache would not take for that reason.

Two more fills go through swap's admission (zv, set to refuse poorly compressed pages). One has the
seed's limits: 7/8 of a page for each page and 5/8 on average. The other has 3/4 for each page.

After the fill comes the churn: half of the pages go at random, and then as many pages as there are
come and go. Compaction follows. Eviction is measured through the whole ephemeral half, with the
index.

Limits: the times are those of this process and of this build; other programs on the machine make
them longer, never shorter.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tools.bench import arguments
from tools.bench.harness.figures import Figure, machine, progress, quiet_pyplot, save, told
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.choice import make_allocator
from zswapd.core.allocators.frametable import PERSISTENT
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.cache import CacheHalf
from zswapd.core.pam.base import HEADER_BYTES
from zswapd.core.pam.zv import Zv
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from zswapd.core.allocators.zbud import ZbudPool
    from zswapd.core.allocators.zsmalloc import ZsPool

PAGE = 4096
ALLOCATORS = ("zbud", "zsmalloc")
BIN = 254
USR_LIB = (
    7644,
    4226,
    11868,
    20356,
    43443,
    39374,
    32903,
    37631,
    42400,
    51921,
    56255,
    59346,
    36545,
    12872,
    6513,
    3482,
)
GUTENBERG = (70, 68, 43, 36, 46, 78, 142, 244, 561, 1272, 3889, 17826, 3896, 358, 465, 804)
"""Pages by compressed size, in bins of 254 bytes from 32 bytes on.

Nitin Gupta counted them in 2012 with LZO: 2 GB of /usr/lib, and 220 MB of texts.
"""
SEED = ("/usr/lib", "Gutenberg")
"""The names of these two distributions."""


def _histogram(counts: Sequence[int]) -> Callable[[random.Random], int]:
    def draw(rng: random.Random) -> int:
        (number,) = rng.choices(range(len(counts)), counts)
        return 32 + BIN * number + rng.randrange(BIN)

    return draw


def _build(rng: random.Random) -> int:
    """Return a random compressed size, distributed as in the anonymous memory of compilers.

    Many pages are nearly empty, most shrink to a third, a few do not shrink.
    """
    kind = rng.random()
    if kind < 0.15:
        return 8  # same-filled
    if kind < 0.30:
        return rng.randrange(40, 400)
    if kind < 0.96:
        return int(min(3500.0, max(200.0, rng.gauss(1350, 500))))
    return PAGE


DISTRIBUTIONS: dict[str, Callable[[random.Random], int]] = {
    "/usr/lib": _histogram(USR_LIB),
    "Gutenberg": _histogram(GUTENBERG),
    "kernel build": _build,
    "random": lambda rng: rng.randrange(1, PAGE + 1),
}


LIMITS = {"7/8": PAGE * 7 // 8, "3/4": PAGE * 3 // 4}
"""zv_max_zsize: the default and a lower value. zv_max_mean_zsize is the default, 5/8 of a page."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One allocator under one distribution.

    Attributes:
        allocator, distribution: their names.
        mean: the mean size of a compressed page in bytes.
        bound: pages in a frame if objects with headers were in memory without a gap.
        filled, churned, compacted: pages in a frame after each step.
        used: bytes of objects with headers ÷ all bytes in frames, after each of these steps.
        alloc_us, free_us: µs for each page, in the fill and in the churn.
        move_us: µs for each object that compaction moved; 0 if it moved none.
        evict_us: µs for each frame that eviction freed.
        evicted_pages: pages evicted with each of these frames.
        refused: the share of pages that the cache does not take.
        admitted: pages in a frame after a fill through each of LIMITS.
        turned_away: the share of pages that the admission refused.
    """

    allocator: str
    distribution: str
    mean: float
    bound: float
    filled: float
    churned: float
    compacted: float
    used: tuple[float, float, float]
    alloc_us: float
    free_us: float
    move_us: float
    evict_us: float
    evicted_pages: float
    refused: float
    admitted: tuple[float, float]
    turned_away: tuple[float, float]


class _Pages:
    """The pages in one allocator, stored as swap stores them."""

    def __init__(self, allocator: ZsPool | ZbudPool, words: memoryview) -> None:
        self._allocator, self._words = allocator, words
        self.held: list[tuple[int, int, int]] = []
        self.bytes = 0

    def add(self, size: int) -> None:
        body = 0
        length = size + HEADER_BYTES
        if length > self._allocator.max_shared:
            body, length = self._allocator.alloc(PAGE), HEADER_BYTES + 8
        handle = self._allocator.alloc(length)
        if not handle:
            raise MemoryError("the arena is too small for the distribution")
        self._words[handle >> 3] = len(self.held) + 1
        self.held.append((handle, body, size))
        self.bytes += length + (PAGE if body else 0)

    def remove(self, place: int) -> None:
        last = self.held.pop()
        gone = last
        if place < len(self.held):
            gone, self.held[place] = self.held[place], last
            self._words[last[0] >> 3] = place + 1
        handle, body, size = gone
        self._allocator.free(handle)
        if body:
            self._allocator.free(body)
        self.bytes -= PAGE + HEADER_BYTES + 8 if body else size + HEADER_BYTES

    def moved(self, _old: int, new: int) -> None:
        place = self._words[new >> 3] - 1
        self.held[place] = (new, *self.held[place][1:])

    def density(self) -> tuple[float, float]:
        frames = self._allocator.used_frames()
        return len(self.held) / frames, self.bytes / (frames * PAGE)


def measure(allocator: str, distribution: str, pages: int, seed: int) -> Measurement:
    """Run one allocator through fill, churn, compaction and eviction."""
    rng = random.Random(seed)
    draw = DISTRIBUTIONS[distribution]
    sizes = [draw(rng) for _ in range(pages)]
    later = [draw(rng) for _ in range(pages)]
    arena, frames = _frames(pages * 2 + 512)
    pool = make_allocator(allocator, frames, PERSISTENT, None, max_zspage_frames=8)
    kept = _Pages(pool, arena.words64)
    alloc_us = _timed(lambda: list(map(kept.add, sizes))) / pages
    filled, bound = kept.density(), PAGE * pages / kept.bytes
    victims = [rng.randrange(pages - number) for number in range(pages // 2)]
    free_us = _timed(lambda: list(map(kept.remove, victims))) / len(victims)
    for size in later:
        kept.add(size)
        kept.remove(rng.randrange(len(kept.held)))
    churned = kept.density()
    before = pool.objects_moved
    compaction_us = _timed(lambda: pool.compact(kept.moved, 1 << 62))
    moves = pool.objects_moved - before
    compacted = kept.density()
    pool.check()
    arena.close()
    evict_us, evicted, refused = _evict(allocator, sizes)
    through = [_admit(allocator, sizes, limit) for limit in LIMITS.values()]
    return Measurement(
        allocator,
        distribution,
        mean=sum(sizes) / pages,
        bound=bound,
        filled=filled[0],
        churned=churned[0],
        compacted=compacted[0],
        used=(filled[1], churned[1], compacted[1]),
        alloc_us=alloc_us,
        free_us=free_us,
        move_us=compaction_us / moves if moves else 0.0,
        evict_us=evict_us,
        evicted_pages=evicted,
        refused=refused,
        admitted=(through[0][0], through[1][0]),
        turned_away=(through[0][1], through[1][1]),
    )


def _admit(allocator: str, sizes: Sequence[int], max_zsize: int) -> tuple[float, float]:
    """Fill an allocator through swap's limits; return pages in a frame and the refused share."""
    arena, frames = _frames(len(sizes) * 2 + 512)
    pool = make_allocator(allocator, frames, PERSISTENT, None, max_zspage_frames=8)
    codec = _Sizes(sizes)
    zv = Zv(pool, frames, codec, {codec.codec: codec}, total_frames=1 << 40, keep_poor=False)
    zv.max_zsize = max_zsize
    page = memoryview(random.Random(2).randbytes(PAGE))
    kept = sum(zv.create(0, 0, index, page, replacing=False) > 0 for index in range(len(sizes)))
    density = kept / pool.used_frames()
    arena.close()
    return density, 1 - kept / len(sizes)


def _frames(count: int) -> tuple[Arena, PageFrames]:
    arena = Arena(count, PAGE, kind="memfd")
    frames = PageFrames(arena, reserve_frames=count)
    frames.refill_now()
    frames.reserve_target = 0
    return arena, frames


def _timed(work: Callable[[], object]) -> float:
    """Return the processor time of `work` in µs."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e6


class _Sizes:
    """A compressor whose output has the next size of a list."""

    name, codec = "sizes", 9

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes, self._data = iter(sizes), random.Random(1).randbytes(2 * PAGE)

    def compress(self, _page: memoryview) -> bytes:
        return self._data[: next(self._sizes)]

    def decompress(self, _data: memoryview, page_size: int) -> bytes:
        return bytes(page_size)


def _evict(allocator: str, sizes: Sequence[int]) -> tuple[float, float, float]:
    """Return µs for each frame that eviction frees, its evicted pages, and the refused share."""
    arena, frames = _frames(len(sizes) + 16)
    nodes = Objnodes(len(sizes), reserve=len(sizes) // 8)
    codec = _Sizes(sizes)
    cache = CacheHalf(
        frames,
        tmem := Tmem(nodes),
        nodes,
        codec,
        {codec.codec: codec},
        allocator=allocator,
        max_zspage_frames=8,
        wanted_run=8,
    )
    pool = cache.cleancache.init_fs()
    page = memoryview(random.Random(2).randbytes(PAGE))
    for index in range(len(sizes)):
        cache.cleancache.put_page(pool, 1, index, page)
    stored = tmem.pool_pages(pool)
    freed = 0

    def evict() -> None:
        nonlocal freed
        freed = cache.eviction.evict(frames.ephemeral_frames)

    evict_us = _timed(evict)
    arena.close()
    return evict_us / freed, stored / freed, 1 - stored / len(sizes)


HEADINGS = (
    "",
    "",
    "mean B",
    "bound",
    "filled",
    "churned",
    "compacted",
    "used %",
    "alloc",
    "free",
    "move",
    "evict",
    "lost",
    "refused",
    *(f"admitted, {name}" for name in LIMITS),
)


def table(found: Sequence[Measurement]) -> str:
    """Return the measurements as a table for Markdown."""
    rows = [HEADINGS, ("---",) * 2 + ("---:",) * (len(HEADINGS) - 2)]
    for one in found:
        used = " ".join(f"{share * 100:.0f}" for share in one.used)
        times = [f"{value:.2f}" for value in (one.alloc_us, one.free_us, one.move_us, one.evict_us)]
        density = [f"{value:.2f}" for value in (one.bound, one.filled, one.churned, one.compacted)]
        ends = (f"{one.evicted_pages:.1f}", f"{one.refused * 100:.0f} %")
        through = [
            f"{pages:.2f} ({away * 100:.0f} %)"
            for pages, away in zip(one.admitted, one.turned_away, strict=True)
        ]
        rows.append(
            (
                one.distribution,
                one.allocator,
                f"{one.mean:.0f}",
                *density,
                used,
                *times,
                *ends,
                *through,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figures_to_hold(found: Sequence[Measurement]) -> list[Figure]:
    """Return the claims: pages in a frame with the two distributions of the seed's authors.

    zbud's figure is the lowest of all steps. zsmalloc's is that of a fill which keeps all pages.
    The first distribution also has that of a fill which refuses pages longer than 3/4 of a page.
    """
    figures = []
    for one in (one for one in found if one.distribution in SEED):
        of_it = f"{one.allocator}, {one.distribution}, pages a frame"
        if one.allocator == "zbud":
            figures.append(
                Figure(of_it, min(one.filled, one.churned, one.compacted), 1.5, at_least=True)
            )
        else:
            figures.append(Figure(of_it, one.filled, 1.9, at_least=True))
        if (one.allocator, one.distribution) == ("zsmalloc", SEED[0]):
            figures.append(
                Figure(
                    f"{of_it}, of those up to 3/4 of a page", one.admitted[1], 1.9, at_least=True
                )
            )
    return figures


def plot(found: Sequence[Measurement], path: Path, source: str = "") -> None:
    """Draw the pages in a frame after each step, with the bound, into a file."""
    pyplot = quiet_pyplot()
    steps = ("filled", "churned", "compacted")
    figure, axes = pyplot.subplots(
        1, len(DISTRIBUTIONS), sharey=True, figsize=(11, 3.2), layout="constrained"
    )
    for axis, name in zip(axes, DISTRIBUTIONS, strict=True):
        of_it = {one.allocator: one for one in found if one.distribution == name}
        for place, (allocator, colour) in enumerate(
            zip(ALLOCATORS, ("#c28f2c", "#2c6fc2"), strict=True)
        ):
            values = [getattr(of_it[allocator], step) for step in steps]
            axis.bar(
                [x + place * 0.4 for x in range(len(steps))],
                values,
                width=0.38,
                color=colour,
                label=allocator,
            )
        axis.axhline(
            of_it["zsmalloc"].bound,
            color="black",
            linewidth=0.8,
            linestyle=":",
            label="without a gap",
        )
        axis.set_title(f"{name}, mean {of_it['zbud'].mean:.0f} B", fontsize=9)
        axis.set_xticks([x + 0.2 for x in range(len(steps))], steps, fontsize=8)
    axes[0].set_ylabel("pages a frame")
    axes[0].legend(fontsize=7)
    save(figure, path, source)


def run(pages: int, seed: int = 1) -> list[Measurement]:
    """Measure each allocator under each distribution."""
    found = []
    for distribution in DISTRIBUTIONS:
        for allocator in ALLOCATORS:
            progress(f"{distribution}, {allocator} ...")
            found.append(measure(allocator, distribution, pages, seed))
    return found


def as_json(found: Sequence[Measurement]) -> dict[str, Any]:
    """Return the document, for a JSON file."""
    figures = told(figures_to_hold(found))
    return {
        "workload": "density",
        "machine": machine(),
        "measurements": [asdict(one) for one in found],
        "figures": figures,
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write the files of the options; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench density", description="Compares the allocators."
    )
    parser.add_argument(
        "--pages", type=int, default=60_000, help="pages in each fill (default 60000: 150 MiB)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--plot", type=arguments.picture, metavar="FILE", help="draw pages per frame into FILE"
    )
    arguments.add_results(parser)
    args = parser.parse_args(argv)
    if args.pages < 100:
        parser.error("fewer than 100 pages say nothing")
    found = run(args.pages, args.seed)
    print(table(found))
    figures = figures_to_hold(found)
    print("\n".join(["", *(figure.line() for figure in figures)]))
    if args.json:
        args.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    if args.plot:
        plot(found, args.plot)
    return 1 if args.check and not all(figure.holds for figure in figures) else 0
