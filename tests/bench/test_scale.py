# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic driver of many pages, on few; the real numbers are `scripts/bench scale`'s."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tools.bench import bench
from tools.bench.workloads import scale
from zswapd.core.block.device import Device


def made(power: int, cost: float = 1.0, index: float = 9.0) -> scale.Measurement:
    values = dict.fromkeys((field.name for field in dataclasses.fields(scale.Measurement)), 1.0)
    return scale.Measurement(
        **values  # type: ignore[arg-type]
        | {
            "pages": 1 << power,
            "contents": "small",
            "store_us": cost,
            "load_us": cost,
            "index_bytes": index,
        }
        | {"overwrite_us": cost, "load_random_us": cost, "heap_bytes": index}
    )


@pytest.mark.parametrize("contents", ["small", "real"])
def test_every_step_is_measured_and_verified(contents: str) -> None:
    found = scale.measure(4096, contents)

    # How much the heap grew says something in a process of its own only.
    assert all(
        value > 0
        for name, value in dataclasses.asdict(found).items()
        if name not in {"contents", "heap_bytes"}
    )


@pytest.mark.parametrize("wrong", [b"\0" * 4096, b"\1" + bytes(4095)])
def test_page_that_comes_back_as_another_is_noticed(
    wrong: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Device.read_into

    def lying(device: Device, offset: int, out: memoryview) -> None:
        honest(device, offset, out)
        if offset <= 777 * 4096 < offset + len(out):
            out[777 * 4096 - offset :][:4096] = wrong

    core_of = scale.Core

    class Lying:
        """A core whose device changes one page."""

        def __init__(self, *args: object, **named: object) -> None:
            self._core = core_of(*args, **named)  # type: ignore[arg-type]

        def __getattr__(self, name: str) -> object:
            if name != "devices":
                return getattr(self._core, name)
            device = self._core.devices["swap"]
            return {
                "swap": type(
                    "Odd",
                    (),
                    {
                        "read_into": staticmethod(lambda *a: lying(device, *a)),
                        "write": device.write,
                    },
                )
            }

    monkeypatch.setattr(scale, "Core", Lying)
    with pytest.raises(ValueError, match="page 777 came back as another"):
        scale.measure(1024, "small")


def test_figures_hold_from_their_bounds_on() -> None:
    def holding(*found: scale.Measurement) -> list[bool]:
        return [figure.holds for figure in scale.figures_to_hold(found)]

    assert holding(made(16), made(24, 1.2, 16.0)) == [True] * 4
    assert holding(made(16), made(24, 1.21, 16.1)) == [False] * 4
    assert holding(made(16), made(20)) == [False, False, True, True], "2^20 is not 2^24"
    assert holding(made(16), made(18)) == [False, False, True, False], (
        "a fixed part is most of what 2^18 pages take"
    )


def test_program_prints_writes_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "REPEATS", 1)
    given = [
        "scale",
        "--powers",
        "10,12",
        "--json",
        str(tmp_path / "all.json"),
        "--plot",
        str(tmp_path / "plot.svg"),
    ]
    assert bench.main(given) == 0

    assert "2^12" in capsys.readouterr().out
    assert [
        one["pages"] for one in json.loads((tmp_path / "all.json").read_text())["measurements"]
    ] == [1024, 4096]
    assert "stored pages" in (tmp_path / "plot.svg").read_text()
    assert bench.main(["scale", "--powers", "10", "--check"]) == 1, "2^24 was not measured"


@pytest.mark.parametrize("given", ["foo", ",", "", "9", "25", "16,x", "1.5"])
def test_powers_that_are_none_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(["scale", "--powers", given])
    assert caught.value.code == 2
    assert "error: argument --powers" in capsys.readouterr().err
