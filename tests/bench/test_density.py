# SPDX-License-Identifier: GPL-2.0-or-later
"""The allocators' densities that docs/benchmarks.md promises, on a small scale, and the program that measures them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.zbench import bench, density

PAGES = 12_000


@pytest.fixture(scope="module", params=density.DISTRIBUTIONS)
def both(request: pytest.FixtureRequest) -> tuple[density.Measurement, density.Measurement]:
    zbud, zsmalloc = (density.measure(name, request.param, PAGES, seed=7) for name in ("zbud", "zsmalloc"))
    return zbud, zsmalloc


def test_densities_are_those_that_are_promised(both: tuple[density.Measurement, density.Measurement]) -> None:
    zbud, zsmalloc = both
    wanted = {"/usr/lib": 1.5, "Gutenberg": 1.0, "kernel build": 1.8, "random": 1.8}[zbud.distribution]
    assert zbud.bound >= zbud.filled > wanted
    assert 2 >= zbud.compacted >= zbud.churned > wanted
    # zsmalloc's share of what is possible is the same everywhere, but for zspages of many classes that are not full.
    assert zsmalloc.bound >= zsmalloc.filled > 0.88 * zsmalloc.bound
    assert zsmalloc.compacted > 0.82 * zsmalloc.bound
    assert zsmalloc.churned < zsmalloc.compacted


def test_what_one_eviction_costs(both: tuple[density.Measurement, density.Measurement]) -> None:
    zbud, zsmalloc = both
    assert 1 <= zbud.evicted_pages <= 2
    assert zsmalloc.evicted_pages >= zbud.evicted_pages
    assert zbud.refused <= zsmalloc.refused < 0.15
    assert max(zbud.evict_us, zsmalloc.evict_us) < 100


def test_program_prints_a_row_for_each_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench.main(["density", "--pages", "300", "--json", str(tmp_path / "all.json")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 8
    found = json.loads((tmp_path / "all.json").read_text())
    assert [one["allocator"] for one in found] == ["zbud", "zsmalloc"] * 4


def test_too_few_pages_are_refused() -> None:
    with pytest.raises(SystemExit):
        density.main(["--pages", "3"])
