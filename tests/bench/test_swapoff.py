# SPDX-License-Identifier: GPL-2.0-or-later
"""The swapoff of a full device, a small one.

It is full, it comes back, and the program says what it has to.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import bench
from tools.bench.contenders import REGISTRY
from tools.bench.harness.system import HarnessError
from tools.bench.workloads import swapoff


@pytest.mark.kernel
@pytest.mark.timeout(120)
def test_device_is_full_and_all_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    alone = not request.config.getoption(
        "--shared-machine"
    )  # others' areas of the same priority get their share of the pages
    words = [
        "swapoff",
        "--contenders",
        "zswapd",
        "--sizes",
        "64",
        "--json",
        str(tmp_path / "all.json"),
    ]
    assert bench.main([*words, "--plot", str(tmp_path / "plot.svg")]) == 0
    (one,) = json.loads((tmp_path / "all.json").read_text())["measurements"]
    assert (one["error"], one["wrong_pages"]) == ("", 0)
    assert (0.99 if alone else 0.0) <= one["used"] <= 1
    assert one["rate"] == pytest.approx(64 * one["used"] / one["seconds"], rel=0.01)
    assert "swapoff: share of the device in use: " in capsys.readouterr().out
    assert "all of it in use" in (tmp_path / "plot.svg").read_text()


def made(
    size: int, rate: float, *, used: float = 1.0, wrong: int = 0, error: str = ""
) -> swapoff.Measurement:
    return swapoff.Measurement("zswapd", size, used, size / rate, rate, wrong, error)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([made(256, 200), made(2048, 170)], [True, True, True]),
        ([made(256, 200), made(2048, 160)], [True, True, False]),
        ([made(256, 200, used=0.98), made(2048, 200)], [False, True, True]),
        ([made(256, 200, wrong=1), made(2048, 200)], [True, False, True]),
        ([made(256, 200), made(2048, 200, used=0.0, error="killed")], [False, True, False]),
        ([], [False, True, False]),
    ],
)
def test_each_figure_can_fail(found: list[swapoff.Measurement], wanted: list[bool]) -> None:
    assert [figure.holds for figure in swapoff.figures_to_hold(found)] == wanted


def test_box_with_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapoff, "memory_available", lambda: 1 << 30)
    with pytest.raises(HarnessError, match="512 MiB need 2048 MiB"):
        swapoff.measure(REGISTRY["zswapd"](), 512)


@pytest.mark.parametrize("given", [["--sizes", "63"], ["--sizes", "x"], ["--contenders", "zram"]])
def test_senseless_arguments_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["swapoff", *given])
    assert caught.value.code == 2
