# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/benchmarks.md shows what was measured.

Its tables and plots are those of docs/figures, and cannot be others.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_harness import PLAN, run, subject
from tests.bench.test_jobs import harmless
from tests.bench.test_scale import made
from tools.bench import bench, benchmarks
from tools.bench.applications import APPLICATIONS, jobs
from tools.bench.applications.jobs import JobRun
from tools.bench.contenders import MemoryUse
from tools.bench.everything import PARTS, taken
from tools.bench.harness.system import MIB
from tools.bench.workloads import cache, density, profile, raw, report, scale, shrink, swapoff

TEXT = "text\n" + "".join(
    f"\n<!-- bench: {name} -->\nold\n<!-- bench: end -->\nmore\n" for name in (*PARTS, "check")
)


def test_page_and_plots_are_what_was_measured() -> None:
    assert list(benchmarks.stale(benchmarks.load())) == [], "scripts/bench docs writes them"


def test_page_has_a_place_for_everything_that_is_measured() -> None:
    blocks = re.findall(r"<!-- bench: (\w+) -->", benchmarks.PAGE.read_text())
    assert sorted(set(blocks) - {"end"}) == sorted([*PARTS, "check"])


def application(name: str, runs: list[JobRun]) -> dict[str, Any]:
    return {**jobs.as_json(APPLICATIONS[name](), runs, {}), "figures": []}


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    """One of each, made up."""
    rounds = [
        run("nbdkit-zstd", 0, 1.0, error="killed\nhint"),
        run("zram-lz4", 0, 2.0),
        subject(0, 3.0),
    ]
    level = "-j8 in 192 MiB"
    jobs_runs = [
        JobRun("file-slow", 0, level, {"seconds": 50.0, "cpu": 9.0}, cut=True),
        JobRun("zswapd", 0, level, {"seconds": 10.0, "cpu": 11.0}, memory_mib=321.0),
    ]
    database = [
        JobRun(
            "zswapd", 0, "256 in 96 MiB", dict.fromkeys(APPLICATIONS["database"]().columns, 12.0)
        )
    ]
    tabs = [JobRun("zswapd", 0, "16 tabs", dict.fromkeys(APPLICATIONS["tabs"]().columns, 13.0))]
    off = [
        swapoff.Measurement("zswapd", 256, 1.0, 2.0, 128.0),
        swapoff.Measurement("zram-lz4", 256, error="killed"),
    ]
    read = [
        cache.Measurement("compressible", order, place, 6.0, (seconds,) * 2, 0.4)
        for order in cache.ORDERS
        for place, seconds in (("device", 5.0), ("volume", 0.1))
    ]
    shrunk = [
        shrink.Measurement(
            "zbud", "pressure", 1000.0, 5, 1.25, 2.0, (0.1, 0.2, 0.3), (0.1, 0.2, 4.5)
        )
    ]
    shares = {**dict.fromkeys(profile.ORDER, 0.0), "LZ4": 50.0}
    profiles = [
        profile.Profile(
            "after", "swap-out", 400.0, 8.0, shares, (("LZ4_compress", "lz4", 50.0),), 1000
        )
    ]
    found = {
        "raw": json.loads(json.dumps(report.as_json(rounds, PLAN, {}))),
        "scale": scale.as_json([made(16), made(24)]),
        "nopressure": application("nopressure", harmless(1.01)),
        "compile": application("compile", jobs_runs),
        "shrink": shrink.as_json(shrunk),
        "swapoff": swapoff.as_json(off, {}),
        "cache": cache.as_json(read),
        "density": density.as_json(
            [
                density.measure(a, d, 200, 1)
                for d in density.DISTRIBUTIONS
                for a in density.ALLOCATORS
            ]
        ),
        "profile": profile.as_json(profiles),
        "database": application("database", database),
        "tabs": application("tabs", tabs),
    }
    assert list(found) == list(PARTS)
    return {
        name: json.loads(json.dumps(taken(one, quick=False, seconds=90)))
        for name, one in found.items()
    }


WANTED = {
    "raw": (
        r"\| zswapd ÷ zram-lz4 \| 1\.50 \|(.|\n)*Without figures: nbdkit-zstd in round 1:"
        r" killed\.\n"
    ),
    "scale": r"\| 2\^24 \| 1\.00 \|",
    "nopressure": r"\| none \| 2\.\d+ \| 2\.\d+ \| 1\.0\d\d \(1\.00\d to 1\.01\d\) \|",
    "compile": (
        r"\| file-slow \| >50\.0 \| >9\.00 \| 0\.20 \| - \| 0/1 \|\n\| zswapd \| 10\.0 \| 11\.0 \|"
        r" - \| 321 \| 1/1 \|"
    ),
    "shrink": (
        r"\| zbud \| by pressure \| 1000 \| 5 \| 1\.25 \| 2\.00 \| 0\.10 / 0\.20 / 0\.30 \| 0\.10 /"
        r" 0\.20 / 4\.50 \|"
    ),
    "swapoff": (
        r"\| 256 \| zswapd \| 100\.0 % \| 2\.00 \| 128 \| yes \|\n\| 256 \| zram-lz4 \| - \| - \| -"
        r" \| no \|"
    ),
    "cache": (
        r"\| compressible \| random \| 5\.000 \| 0\.100 \| 50\.0 times \| 50\.0 times \| 40 % \|"
    ),
    "density": r"\| /usr/lib \| zbud \|",
    "profile": r"\| swap-out \| after \| 400 \| 8\.00 \| 4\.00 \|(.|\n)*`LZ4_compress` 50\.0 %",
    "database": r"\| zswapd \| 12\.0 \|",
    "tabs": r"\| zswapd \| 13\.0 \|",
}


@pytest.mark.parametrize("name", PARTS)
def test_every_table_shows_its_document(name: str, documents: dict[str, dict[str, Any]]) -> None:
    text = benchmarks.render(TEXT, {name: documents[name]})
    (shown,) = re.findall(rf"<!-- bench: {name} -->\n(.*?)<!-- bench: end -->", text, re.DOTALL)
    assert re.search(WANTED[name], shown)
    assert f"Taken on {documents[name]['date']} at `" in shown
    assert (f"![{name}]({name}.svg)" in shown) is (name in benchmarks.PLOTS)
    assert text.count("*Not measured yet: `scripts/bench all --parts ") == len(PARTS) - 1
    assert text.startswith("text\n")
    assert text.count("more\n") == len(PARTS) + 1
    assert benchmarks.render(text, {name: documents[name]}) == text, "it is the same the next time"


def test_claims_say_what_is_lacking(documents: dict[str, dict[str, Any]]) -> None:
    text = benchmarks.render(TEXT, documents)
    assert "| swap-out throughput, zswapd ÷ zram | at least 1.3 | 1.5 | holds |  |" in text
    assert "| memory at its peak, zswapd ÷ zram | at most 1.05 | 5 | **no** | 376 % |" in text
    assert (
        "| swap-out throughput, zswapd ÷ nbdkit | at least 3 | not measured | **no** |  |" in text
    )


def test_page_or_plot_that_is_not_as_measured_is_noticed(
    documents: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = tmp_path / "figures"
    figures.mkdir()
    for name, document in documents.items():
        (figures / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / "benchmarks.md").write_text(TEXT)

    benchmarks.write(tmp_path)

    assert list(benchmarks.stale(documents, tmp_path)) == []
    assert sorted(path.stem for path in tmp_path.glob("*.svg")) == sorted(benchmarks.PLOTS)
    for name in documents:
        other = copy.deepcopy(documents)
        other[name]["date"] = "1999-12-31"
        plots = [f"{name}.svg"] if name in benchmarks.PLOTS else []
        assert list(benchmarks.stale(other, tmp_path)) == ["benchmarks.md", *plots]

    monkeypatch.setattr(benchmarks, "stale", lambda _documents: iter(["raw.svg"]))
    assert bench.main(["docs", "--test"]) == 1
    assert "raw.svg differs from docs/figures" in capsys.readouterr().err


def test_block_of_nothing_is_an_error() -> None:
    with pytest.raises(KeyError, match="no table is called speed"):
        benchmarks.render("<!-- bench: speed -->\n<!-- bench: end -->\n", {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (1234.5, "1234"),
        (99.94, "99.9"),
        (99.96, "100"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (0.0, "0.00"),
    ],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert benchmarks.number(value) == shown


def test_raw_of_all_leaves_counters_out_and_runs_some_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def measure(args: Any) -> tuple[list[Any], dict[str, Any]]:
        given.append(args)
        return [], json.loads(
            json.dumps(
                report.as_json([run("zswapd", 0, 1.0, MemoryUse(MIB, details={"a": 1}))], PLAN, {})
            )
        )

    monkeypatch.setattr(raw, "measure", measure)
    document = PARTS["raw"].measure(False)
    assert document["runs"][0]["memory"]["details"] == {}
    assert set(given[0].contenders) - set(given[0].once) == {"zram-lz4", "nbdkit-zstd", "zswapd"}
    assert {"zram-lzo-rle", "file", "zswapd-2", "zswapd-4"} <= set(given[0].once)
