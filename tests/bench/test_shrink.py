# SPDX-License-Identifier: GPL-2.0-or-later
"""The driver of a cache that shrinks, on a small one; the real numbers are `scripts/bench shrink`'s."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from scripts.zbench import bench, shrink
from scripts.zbench.system import HarnessError

MIB = 16


def made(*, back_s: float = 1.5, batch_ms: float = 1.1, slowest_ms: float = 6.0) -> shrink.Measurement:
    return shrink.Measurement("zbud", 1024, 500_000, back_s, batch_ms, (0.1, 0.3, 0.9), (0.2, 1.5, slowest_ms))


@pytest.mark.mount
def test_cache_is_filled_shrinks_and_everything_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shrink", "--mib", str(MIB), "--allocators", "zsmalloc", "--directory", str(tmp_path)]
    assert bench.main([*words, "--json", str(tmp_path / "all.json")]) == 0
    (run,) = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert 0.9 * MIB <= run["cached_mib"] <= MIB
    assert run["pages"] * shrink.PAGE > 2 * MIB << 20
    assert 0 < run["back_s"] < 30
    assert run["batch_ms"] > 0
    assert 0 < run["before_ms"][0] <= run["before_ms"][1] <= run["before_ms"][2]
    assert f"cache of {run['cached_mib']:.0f} MiB on zsmalloc: 90 % given back" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["all.json"]


@pytest.mark.mount
def test_volume_that_is_not_its_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = shrink.read_file
    monkeypatch.setattr(shrink, "read_file", lambda path, _expected: honest(path, tmp_path / "other"))
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


@pytest.mark.parametrize("words", [["--mib", "2"], ["--allocators", "slab"]])
def test_senseless_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["shrink", *words])
