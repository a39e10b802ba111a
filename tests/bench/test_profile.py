# SPDX-License-Identifier: GPL-2.0-or-later
"""The profile on a short run, and what becomes of perf's report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import bench
from tools.bench.harness.system import HarnessError, missing_programs
from tools.bench.workloads import profile

requires_perf = pytest.mark.skipif(
    bool(missing_programs(["perf"])), reason="perf is not installed; install linux-perf"
)

REPORT = """
# Samples: 1K of event 'cpu-clock'
40.00|_block.cpython-311-x86_64-linux-gnu.so|[.] LZ4_compress_fast_continue
10.00|liblz4.so.1.9.4|[.] LZ4_decompress_safe
12.50|[kernel.kallsyms]|[k] clear_page
 7.50|[fuse]|[k] fuse_dev_read
9.00|python3.11|[.] _PyEval_EvalFrameDefault
6.00|zswapd__mypyc.cpython-311-x86_64-linux-gnu.so|[.] CPyDef_zv___Zv___create
5.00%|_lowlevel.cpython-311-x86_64-linux-gnu.so|[.] drain
4.00|_xxhash.cpython-311-x86_64-linux-gnu.so|[.] XXH3_64bits
3.00|libc.so.6|[.] __memmove_avx_unaligned_erms
2.00|[vdso]|[.] __vdso_clock_gettime
1.00|_pages.cpython-311-x86_64-linux-gnu.so|[.] pack
nonsense
"""


def test_samples_are_added_up_by_where_they_were() -> None:
    shares, busiest = profile.parse(REPORT)
    assert shares == {
        "LZ4": 50.0,
        "checksum": 4.0,
        "page path in C": 1.0,
        "compiled page path": 6.0,
        "interpreter": 9.0,
        "libc": 5.0,
        "hook": 5.0,
        "kernel": 20.0,
        "other": 0.0,
    }
    assert busiest[0] == (
        "LZ4_compress_fast_continue",
        "_block.cpython-311-x86_64-linux-gnu.so",
        40.0,
    )
    assert [percent for _, _, percent in busiest] == sorted(
        (percent for _, _, percent in busiest), reverse=True
    )


def made(label: str, phase: str, rate: float, lz4: float) -> profile.Profile:
    return profile.Profile(
        label,
        phase,
        rate,
        10.0,
        dict.fromkeys(profile.ORDER, 5.0) | {"LZ4": lz4},
        (("f", "lib", lz4),),
        100,
    )


def test_rounds_are_combined_by_their_medians() -> None:
    each = [
        made("after", "swap-out", rate, lz4)
        for rate, lz4 in ((400, 30.0), (100, 50.0), (420, 40.0))
    ]
    (one,) = profile.combined(each)
    assert (one.rate, one.shares["LZ4"], one.samples) == (400, 40.0, 300)
    assert "4.00" in profile.table([one])


def test_checkouts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def measure(label: str, _tree: Path | None, _data: int, _memory: int) -> list[profile.Profile]:
        order.append(label)
        return [made(label, "swap-out", 1.0, 1.0)]

    monkeypatch.setattr(profile, "measure", measure)
    assert [
        one.label for one in profile.run([("before", Path("/x")), ("after", None)], 2, 1, 1)
    ] == ["before", "after"]
    assert order == ["before", "after", "after", "before"]


def test_checkout_without_an_environment_is_refused(tmp_path: Path) -> None:
    for given in (f"before={tmp_path}", "before", f"={tmp_path}"):
        with pytest.raises(SystemExit) as caught:
            bench.main(["profile", "--quick", "--tree", given])
        assert caught.value.code == 2


def test_what_perf_cannot_record_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "perf").write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    (tmp_path / "perf").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with (
        pytest.raises(HarnessError, match="recorded nothing: no permission"),
        profile.recording(1, tmp_path / "data"),
    ):
        pass


@requires_perf
@pytest.mark.kernel
@pytest.mark.timeout(120)
def test_worker_is_seen_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["profile", "--quick", "--json", str(tmp_path / "all.json")]) == 0
    profiles = json.loads((tmp_path / "all.json").read_text())["profiles"]
    assert [(one["label"], one["phase"]) for one in profiles] == [
        ("after", phase) for phase in profile.PHASES.values()
    ]
    out = profiles[0]
    assert out["samples"] > 20
    assert 1 < out["cpu_us"] < 200
    assert out["shares"]["LZ4"] > 5, "a fill compresses"
    assert sum(out["shares"].values()) == pytest.approx(100, abs=2)
    assert out["shares"]["other"] < 20
    assert "LZ4_compress" in capsys.readouterr().out
