# SPDX-License-Identifier: GPL-2.0-or-later
"""The report of `scripts/bench cache`; tests/kernel/test_cache.py runs the workload for real."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from tools.bench.harness import system
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.workloads import cache


def made(volume_s: float, page_cache: float = 0.4) -> list[cache.Measurement]:
    return [
        cache.Measurement(
            "compressible", order, place, 9.0, (seconds, 9 * seconds, seconds / 9), page_cache
        )
        for order in cache.ORDERS
        for place, seconds in (("device", 5.0), ("volume", volume_s))
    ]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [(made(0.25), [True, True]), (made(0.26), [False, True]), (made(0.1, 0.51), [True, False])],
)
def test_figures_hold_from_their_bounds_on_by_medians(
    found: list[cache.Measurement], wanted: list[bool]
) -> None:
    assert [figure.holds for figure in cache.figures_to_hold(found)] == wanted
    assert "sequential" in cache.table(found)


def test_sets_are_what_they_are_called() -> None:
    def poor(contents: str) -> int:
        data = cache._make(contents, 2)
        assert len(data) == 2 * MIB
        pages = [data[at : at + cache.PAGE] for at in range(0, len(data), cache.PAGE)]
        assert len(set(pages)) == len(pages)
        return sum(len(zlib.compress(page, 1)) > cache.PAGE * 9 // 10 for page in pages)

    assert poor("compressible") == 0
    assert 5 < poor("mixed") < 60


@pytest.mark.kernel
def test_set_that_comes_back_as_another_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(cache.BLOCK * 4))
    with pytest.raises(HarnessError, match="is not what was written"):
        cache.read(tmp_path / "file", ("compressible", "random", "device"), 1, "0" * 32)


@pytest.mark.kernel
def test_page_cache_is_what_the_readers_cgroup_holds(tmp_path: Path) -> None:
    """A set that fits is there in full: the share is of something that can be measured."""
    data = bytes(range(256)) * 16 * 256  # a mebibyte
    (tmp_path / "file").write_bytes(data)
    system.run("sync", tmp_path / "file")
    system.run("dd", f"if={tmp_path / 'file'}", "iflag=nocache", "count=0")
    import hashlib

    sums = [
        hashlib.md5(data[at : at + cache.BLOCK]).digest() for at in range(0, len(data), cache.BLOCK)
    ]
    one = cache.read(
        tmp_path / "file",
        ("mixed", "sequential", "device"),
        2,
        hashlib.md5(b"".join(sums)).hexdigest(),
    )
    assert one.page_cache > 0.9
    assert len(one.again_s) == 2
