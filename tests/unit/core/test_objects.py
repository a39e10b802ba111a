# SPDX-License-Identifier: GPL-2.0-or-later
"""No Python object is kept for a page.

What the interpreter has allocated does not grow with the number of stored pages.

Memory of a page is its object in the arena, the index' share of it and its words in tables, none of
them Python's. An entry of a dict, an int or a bytes kept for each page would be 30 to 200 bytes;
the bound is one byte a page.
"""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import build
from zswapd.config import load
from zswapd.core import compress
from zswapd.core.core import Core, Inherited

pytestmark = pytest.mark.slow

PAGE = 4096
PAGES = 6000
FEW = 0.1
"""Blocks of the interpreter's allocator a page.

None, but for what something else happens to keep meanwhile.
"""
CONTENTS = [os.urandom(300 + 7 * number).ljust(PAGE, b"\0") for number in range(400)]


def page(number: int) -> bytes:
    """Return contents that compress, are same-filled, or do not compress.

    One in ten each of the last two.
    """
    if number % 10 == 0:
        return number.to_bytes(8, "little") * (PAGE // 8)
    if number % 10 == 1:
        return (
            CONTENTS[-1][:2000] * 2 + CONTENTS[number % 400][:96]
            if number % 20 == 1
            else os.urandom(PAGE)
        )
    return CONTENTS[number % 400]


class Growth:
    """What the interpreter allocates and keeps, a page, in a body; a context manager."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self.blocks = self.bytes = 0.0

    def __enter__(self) -> Growth:
        gc.collect()
        tracemalloc.start()
        self._before = sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(self, *_exc_info: object) -> None:
        gc.collect()
        after = sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        self.blocks = (after[0] - self._before[0]) / self._pages
        self.bytes = (after[1] - self._before[1]) / self._pages

    def is_none(self) -> bool:
        """Say whether nothing was kept for a page."""
        return self.blocks < FEW and self.bytes < 1


def core(pages: int, inherited: Inherited | None = None) -> Core:
    settings = (f"swap.size={pages * PAGE}", "memory.reserve=48M", "pool.limit=90%")
    assignments = [(*setting.split("=", 1), "--set") for setting in settings]
    config = load(codecs=compress.names(), assignments=assignments, root=Path("/"), page_size=PAGE)  # type: ignore[arg-type]
    return Core(config, inherited=inherited)


@pytest.fixture
def made() -> Iterator[Core]:
    one = core(2 * PAGES)
    yield one
    one.close()


def refill(one: Core) -> None:
    while one.frames.wants_refill():
        one.frames.refill_now()
    while one.nodes.wants_refill():
        one.nodes.refill_now()


def write(one: Core, first: int, count: int, generation: int = 0) -> None:
    device = one.devices["swap"]
    for number in range(first, first + count):
        assert device.write(number * PAGE, memoryview(page(number + generation))) is None
        refill(one)


@pytest.mark.parametrize("kind", ["store", "overwrite", "load", "discard and store"])
def test_swap_keeps_no_object_for_a_page(made: Core, kind: str) -> None:
    out = memoryview(bytearray(PAGE))
    write(made, 0, 600)  # what is allocated once and stays
    made.devices["swap"].read_into(0, out)
    if kind != "store":
        write(made, 600, PAGES)
    with Growth(PAGES) as growth:
        if kind in {"store", "overwrite"}:
            write(made, 600, PAGES, generation=kind == "overwrite")
        elif kind == "load":
            for number in range(600, 600 + PAGES):
                made.devices["swap"].read_into(number * PAGE, out)
        else:
            made.devices["swap"].discard(600 * PAGE, PAGES * PAGE)
            write(made, 600, PAGES, generation=3)
    assert growth.is_none(), (growth.blocks, growth.bytes)


def test_takeover_keeps_no_object_for_a_page(made: Core) -> None:
    write(made, 0, PAGES)
    fd = os.dup(made.arena.fd)
    few = core(2 * PAGES)
    write(few, 0, 10)
    few_fd = os.dup(few.arena.fd)
    few.close()

    def kept(descriptor: int) -> tuple[Growth, int]:
        with Growth(PAGES) as growth:
            successor = core(2 * PAGES, Inherited(descriptor))
        recovered = successor.statistics().recovery.recovered_pages
        successor.close()
        os.close(descriptor)
        return growth, recovered

    kept(os.dup(few_fd))
    (small, _), (large, recovered) = kept(few_fd), kept(fd)
    assert recovered == PAGES
    assert large.blocks - small.blocks < FEW
    assert large.bytes - small.bytes < 8, (
        "tables by the frame may differ, as more of them are in use"
    )


@pytest.mark.parametrize("allocator", ["zbud", "zsmalloc"])
def test_cache_keeps_no_object_for_a_page(allocator: str) -> None:
    stack = build(PAGE, frames=3 * PAGES, node_reserve=PAGES // 4, ephemeral=allocator)
    cache = stack.cache.cleancache
    pool = cache.init_fs()

    def put(first: int, count: int) -> None:
        for number in range(first, first + count):
            cache.put_page(pool, 1, number, memoryview(CONTENTS[number % 400]))

    put(0, 600)
    with Growth(PAGES) as growth:
        put(600, PAGES)
    kept = stack.tmem.pool_pages(pool)
    stack.close()
    assert kept == 600 + PAGES
    assert growth.is_none(), (growth.blocks, growth.bytes)


@pytest.mark.parametrize("what", ["an entry of a dict", "an int", "bytes"])
def test_what_is_kept_for_a_page_would_be_noticed(what: str) -> None:
    numbers: dict[int, bool] = {}
    kept: list[object] = []
    with Growth(PAGES) as growth:
        for number in range(PAGES):
            if what == "an entry of a dict":
                numbers[number % 250] = True
                numbers[number + 1000] = True
            else:
                kept.append(number + 1000 if what == "an int" else bytes(40))
    assert not growth.is_none()
