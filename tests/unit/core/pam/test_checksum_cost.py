# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checksum costs a load, by kind of page: the figures of docs/benchmarks.md.

`pytest --tier bench tests/unit/core/pam/test_checksum_cost.py -s` prints the table. With and
without in turn, the fastest of many, so that a busy machine changes little.
"""

from __future__ import annotations

import time

import pytest

from tests.support.stack import Stack, build
from tests.support.strategies import page

PAGES = 1000
ROUNDS = 40
PAGE = 4096
KINDS = ("words", "half", "sparse", "noise")
LIMIT_US = 0.6
"""Of a page that is read whole, stored as it is; twice what it takes."""


def filled(kind: str, *, checksum: bool) -> Stack:
    stack = build(PAGE, frames=3000, checksum=checksum, node_reserve=2000)
    stack.frontswap.init(1)
    for number in range(PAGES):
        assert stack.frontswap.store(1, number, memoryview(page(kind, number % 50, PAGE))) is None
    return stack


def load_us(stack: Stack, out: memoryview) -> float:
    load = stack.frontswap.load
    start = time.process_time()
    for number in range(PAGES):
        load(1, number, out)
    return (time.process_time() - start) / PAGES * 1e6


@pytest.mark.bench
@pytest.mark.parametrize("kind", KINDS)
def test_checksum_costs_a_load_little(kind: str) -> None:
    without, with_one = filled(kind, checksum=False), filled(kind, checksum=True)
    out = memoryview(bytearray(PAGE))
    times = [(load_us(without, out), load_us(with_one, out)) for _ in range(ROUNDS)]
    off, on = min(pair[0] for pair in times), min(pair[1] for pair in times)
    print(
        f"\n{kind}: {off:.2f} µs without, {on:.2f} with: {on - off:.2f} more,"
        f" {(on - off) / off:.0%} of a load below FUSE"
    )
    without.close()
    with_one.close()
    assert on - off < LIMIT_US
