# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver of a cache that shrinks, on a small one.

The real numbers are `scripts/bench shrink`'s.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tools.bench import bench
from tools.bench.harness import shortage
from tools.bench.harness.system import HarnessError
from tools.bench.workloads import shrink

MIB = 16


def made(
    *, back_s: float = 1.5, batch_ms: float = 1.1, slowest_ms: float = 6.0
) -> shrink.Measurement:
    return shrink.Measurement(
        "zbud", "pressure", 1024, 500_000, back_s, batch_ms, (0.1, 0.3, 0.9), (0.2, 1.5, slowest_ms)
    )


@pytest.mark.mount
def test_cache_is_filled_shrinks_and_everything_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "shrink",
        "--mib",
        str(MIB),
        "--allocators",
        "zsmalloc",
        "--by",
        "command",
        "--directory",
        str(tmp_path),
    ]
    assert bench.main([*words, "--json", str(tmp_path / "all.json")]) == 0
    (run,) = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert 0.9 * MIB <= run["cached_mib"] <= MIB
    assert run["pages"] * shrink.PAGE > 2 * MIB << 20
    assert 0 < run["back_s"] < 30
    assert run["batch_ms"] > 0
    assert 0 < run["before_ms"][0] <= run["before_ms"][1] <= run["before_ms"][2]
    assert "cache on zsmalloc, by command: 90 % given back" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["all.json"]


@pytest.mark.mount
def test_volume_that_is_not_its_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = shrink.read_file
    monkeypatch.setattr(
        shrink, "read_file", lambda path, _expected: honest(path, tmp_path / "other")
    )
    (tmp_path / "other").write_bytes(bytes(MIB << 20))
    with pytest.raises(HarnessError, match="is not what"):
        shrink.measure("zbud", MIB, tmp_path)


@pytest.mark.parametrize(
    ("measured", "fails"),
    [
        (made(), None),
        (made(back_s=2.1), "given back"),
        (made(batch_ms=10.5), "without serving"),
        (made(slowest_ms=10.4), "slowest read"),
    ],
)
def test_each_figure_can_fail(measured: shrink.Measurement, fails: str | None) -> None:
    failing = [figure.line() for figure in shrink.figures_to_hold([measured]) if not figure.holds]
    assert len(failing) == (fails is not None)
    assert all(fails in line for line in failing if fails)
    assert "zbud" in shrink.table([measured]).splitlines()[1]


@pytest.mark.parametrize(
    "words",
    [["--mib", "2"], ["--allocators", "slab"], ["--by", "magic"], ["--directory", "/nowhere"]],
)
def test_senseless_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["shrink", *words])


ZONES = """
Node 0, zone      DMA
  pages free     3000
        boost    0
        min      10
        low      20
        high     30
        managed  3840
        protection: (0, 2900, 23000, 23000)
Node 0, zone   Normal
  pages free     5000
        min      1000
        low      4500
        high     9000
        managed  4000000
        protection: (0, 0, 0, 0)
Node 0, zone  Movable
  pages free     0
        min      0
        low      0
        high     0
        managed  0
        protection: (0, 0, 0, 0)
"""


def test_shortage_is_of_the_zone_that_is_best_off() -> None:
    assert shortage.pages_above_low(ZONES) == 500
    assert shortage.pages_above_low(ZONES.replace("free     5000", "free     4400")) == -100
    assert shortage.pages_above_low(), "this machine's"


def test_box_with_too_little_to_take_from_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shortage.FACTOR.read_text()
    monkeypatch.setattr(shortage, "memory_available", lambda: 2 << 30)
    with pytest.raises(HarnessError, match="too little to take from"), shortage.Shortage():
        pass
    assert shortage.FACTOR.read_text() == before


@pytest.mark.kernel
def test_shortage_that_does_not_come_is_told_and_undone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    factor = tmp_path / "factor"
    factor.write_text("10\n")
    monkeypatch.setattr(shortage, "FACTOR", factor)
    monkeypatch.setattr(shortage, "memory_available", lambda: (shortage.KEPT_MIB * 3 + 64) << 20)
    monkeypatch.setattr(
        shortage, "STEP_MIB", shortage.KEPT_MIB * 2
    )  # one step, of 32 MiB in the process that takes it
    with shortage.Shortage() as short:
        assert factor.read_text() == str(shortage.MOST)
        with pytest.raises(HarnessError, match="not short of memory"):
            short.wait()
    assert factor.read_text() == "10\n"


@pytest.mark.bench
@pytest.mark.kernel
@pytest.mark.timeout(280)
@pytest.mark.parametrize("allocator", shrink.ALLOCATORS)
def test_memory_is_back_in_time_when_the_box_is_short_of_it(
    allocator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shrink.run(512, [allocator], ["pressure"])
    figures = shrink.figures_to_hold(found)
    print(shrink.table(found))
    assert found[0].back_s > 0
    assert [figure.line() for figure in figures if not figure.holds] == []
