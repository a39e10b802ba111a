# SPDX-License-Identifier: GPL-2.0-or-later
"""What the harness computes and decides, on made-up input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.bench.applications import sampling
from tools.bench.contenders import REGISTRY, Contender, MemoryUse
from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup, memory_hierarchy
from tools.bench.harness.display import Display, PoolSample, Traffic
from tools.bench.harness.figures import interval
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import KILLED, Phase
from tools.bench.workloads import raw, report, rounds
from tools.bench.workloads.raw import parse
from tools.bench.workloads.rounds import Plan, Run, run_all, run_once

PLAN = Plan(data_mib=64, memory_mib=32, device_mib=256, rounds=2, faults=0)


def phase(
    name: str,
    seconds: float = 1.0,
    *,
    out: int = 0,
    back: int = 0,
    mismatches: int = 0,
    **more: float,
) -> Phase:
    return Phase(name, 1024, seconds, back, out, 0, mismatches, more)


def run(
    contender: str,
    number: int,
    speed: float,
    memory: MemoryUse | None = None,
    *,
    error: str = "",
    wrong: int = 0,
) -> Run:
    phases = (
        phase("fill", out=round(25600 * speed)),
        phase("seq", back=round(25600 * speed)),
        phase(
            "random",
            us_mean=100 / speed,
            us_p50=90 / speed,
            us_p99=300 / speed,
            us_p999=500 / speed,
        ),
        phase(
            "mixed", out=10240, back=20480, us_mean=70, us_p50=60 / speed, us_p99=200, us_p999=400
        ),
        phase("verify", mismatches=wrong),
    )
    use = memory or MemoryUse(100 * MIB)
    return Run(contender, number, phases, use, use.total, error)


def subject(number: int, speed: float, pool: float = 1.05, **more: object) -> Run:
    memory = MemoryUse(500 * MIB, pool=round(400 * MIB * pool), stored=400 * MIB)
    return run("zswapd", number, speed, memory, **more)  # type: ignore[arg-type]


def test_ratios_are_taken_within_a_round_and_not_between_medians() -> None:
    # round 0 was twice as slow for both, as on a machine with a noisy neighbour
    runs = [
        run("nbdkit-zstd", 0, 0.5),
        subject(0, 1.5),
        run("nbdkit-zstd", 1, 1.0),
        subject(1, 3.0),
    ]

    ratios = report.ratios(runs, "nbdkit-zstd")

    assert ratios["out"] == pytest.approx([3, 3])
    assert ratios["random"] == pytest.approx([1 / 3, 1 / 3])


def pair(speed: float, pool: float = 1.05, peak: float = 1.0, zram: float = 1.0) -> list[Run]:
    """One round: nbdkit at speed 1, zram at `zram`.

    Zswapd at `speed` with `peak` times zram's memory.
    """
    rival = run("zram-lz4", 0, zram, MemoryUse(round(500 * MIB / peak)))
    return [run("nbdkit-zstd", 0, 1.0), rival, subject(0, speed, pool=pool)]


def failing(runs: list[Run]) -> list[int]:
    return [
        number for number, figure in enumerate(report.figures_to_hold(runs)) if not figure.holds
    ]


@pytest.mark.parametrize(
    ("runs", "wanted"),
    [
        (pair(3.001), []),
        (pair(2.99), [4, 5, 6]),
        (pair(3.001, zram=2.3), []),
        (pair(3.001, zram=2.31), [0]),
        (pair(3.001, zram=3.01), [0, 1]),
        (pair(3.001, zram=6.01), [0, 1, 2]),
        (pair(3.001, peak=1.06), [3]),
        (pair(3.001, pool=1.11), [7]),
    ],
)
def test_figures_hold_exactly_from_their_bounds_on(runs: list[Run], wanted: list[int]) -> None:
    assert failing(runs) == wanted


@pytest.mark.parametrize("bad", [{"wrong": 1}, {"error": "the workload was killed"}])
def test_one_bad_run_fails_verification(bad: dict[str, object]) -> None:
    runs = [
        run("nbdkit-zstd", 0, 1.0),
        subject(0, 2.0),
        run("nbdkit-zstd", 1, 1.0),
        subject(1, 2.0, **bad),
    ]

    verified = report.figures_to_hold(runs)[8]

    assert verified.value == 0.5
    assert not verified.holds


def test_wrong_page_of_a_rival_fails_and_its_being_killed_does_not() -> None:
    lost = [run("nbdkit-zstd", 0, 1.0), run("zram-lz4", 0, 1.0, wrong=3), subject(0, 2.0)]
    assert (report.figures_to_hold(lost)[-1].value, report.figures_to_hold(lost)[-1].holds) == (
        3,
        False,
    )

    killed = [
        run("nbdkit-zstd", 0, 1.0),
        run("zram-lz4", 0, 1.0, error="killed"),
        subject(0, 3.001),
    ]
    assert failing(killed) == [0, 1, 2, 3], "what was not measured against zram, and nothing else"


def test_figures_that_were_not_measured_do_not_hold() -> None:
    figures = report.figures_to_hold([run("zram-lz4", 0, 1.0)])

    assert [figure.holds for figure in figures] == [False] * 9 + [True]
    assert "not measured" in figures[0].line()


def test_table_and_json_have_all_contenders() -> None:
    runs = [run("zram-lz4", 0, 2.0), run("nbdkit-zstd", 0, 1.0), subject(0, 2.0)]

    table = report.table(runs)
    document = json.loads(json.dumps(report.as_json(runs, PLAN, {})))

    assert re.search(r"^zram-lz4 +200\.0 +200\.0 +50\.0", table, re.MULTILINE)
    assert re.search(r"^zswapd ÷ nbdkit-zstd +2\.00 +2\.00 +0\.50", table, re.MULTILINE)
    assert document["machine"]["page_cluster"] == system.page_cluster()
    assert set(document["medians"]) == {"zram-lz4", "nbdkit-zstd", "zswapd"}
    assert len(document["runs"]) == 3
    assert [one["holds"] for one in document["figures"]] == [
        figure.holds for figure in report.figures_to_hold(runs)
    ]


def test_plot_has_all_contenders(tmp_path: Path) -> None:
    runs = [run("zram-lz4", 0, 2.0), run("nbdkit-zstd", 0, 1.0, error="killed"), subject(0, 2.0)]
    raw.plot(report.medians(runs), tmp_path / "plot.svg", "there")
    picture = (tmp_path / "plot.svg").read_text()
    assert "zram-lz4" in picture
    assert "nbdkit" not in picture
    assert "there" in picture


class Fake(Contender):
    """A contender that notes what is done with it."""

    name = "fake"
    done: list[str]

    def __init__(self, done: list[str], *, starts: bool = True) -> None:
        self.done = done
        self._starts = starts

    def missing(self) -> str:
        return ""

    def start(self, size: int) -> None:
        self.done.append(f"start {size // MIB}")
        if not self._starts:
            raise HarnessError("it does not come up")

    def devices(self) -> list[str]:
        return []

    def memory_used(self) -> MemoryUse:
        return MemoryUse(1)

    def stop(self) -> None:
        self.done.append("stop")


def test_contender_that_does_not_start_is_stopped_and_reported() -> None:
    done: list[str] = []

    result = run_once(Fake(done, starts=False), 0, PLAN)

    assert done == ["start 256", "stop"]
    assert result.error == "it does not come up"
    assert not result.verified


@pytest.mark.parametrize(
    ("name", "deaths", "runs_made", "ends_well"),
    [("zram-lz4", 2, 3, True), ("zram-lz4", 9, 4, False), ("zswapd", 1, 1, False)],
)
def test_rival_whose_workload_was_killed_has_another_try_and_we_have_not(
    monkeypatch: pytest.MonkeyPatch, name: str, deaths: int, runs_made: int, ends_well: bool
) -> None:
    made: list[Run] = []

    def once(contender: Contender, number: int, _plan: Plan) -> Run:
        made.append(run(contender.name, number, 1.0, error=KILLED if len(made) < deaths else ""))
        return made[-1]

    monkeypatch.setattr(rounds, "run_once", once)
    (result,) = run_all([name], dataclasses.replace(PLAN, rounds=1), lambda _line: None)
    assert len(made) == runs_made
    assert (not result.error) is ends_well
    assert result.kills == runs_made - 1


def test_some_run_in_the_first_round_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rounds, "run_once", lambda contender, number, _plan: run(contender.name, number, 1.0)
    )

    runs = run_all(["file", "zswapd", "zram-lz4"], PLAN, lambda _line: None, ["file"])

    assert [(one.round, one.contender) for one in runs] == [
        (0, "file"), (0, "zswapd"), (0, "zram-lz4"), (1, "zram-lz4"), (1, "zswapd"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, (1, 1)), (5, (1, 5)), (8, (1, 8)), (9, (2, 8)), (12, (3, 10)), (20, (6, 15))],
)
def test_interval_of_a_median_goes_by_ranks(count: int, wanted: tuple[int, int]) -> None:
    values = [float(value) for value in range(count, 0, -1)]
    assert interval(values) == wanted
    # Of samples of that size, 95 of a hundred have the true median between those ranks.
    if count > 5:
        rng = random.Random(count)
        draws = [interval([rng.random() for _ in range(count)]) for _ in range(2000)]
        assert sum(low <= 0.5 <= high for low, high in draws) / 2000 > 0.94


def test_order_turns_from_round_to_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int, str]] = []

    def note(contender: Contender, number: int, _plan: Plan) -> Run:
        order.append((number, contender.name))
        return run(contender.name, number, 1.0)

    monkeypatch.setattr(rounds, "run_once", note)
    run_all(list(REGISTRY), PLAN, lambda _line: None)

    names = list(REGISTRY)
    assert order == [(0, name) for name in names] + [(1, name) for name in names[1:] + names[:1]]


class Growing(Fake):
    """A contender whose memory is large in the middle of everything only.

    And whose process works all the time.
    """

    def __init__(self) -> None:
        super().__init__([])
        self.readings = iter([1, 700, *[2] * 1000])

    def memory_now(self) -> int:
        return next(self.readings) * MIB

    def processes(self) -> list[int]:
        return [os.getpid()]


def test_peak_in_the_middle_is_seen_and_processor_time_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_S", 0.01)
    with sampling.Sampling(Growing()) as seen:
        end = time.process_time() + 0.1
        while seen.readings < 3 or time.process_time() < end:
            pass
    assert seen.peak == 700 * MIB
    assert 0.05 <= seen.cpu_s < 20


def test_run_tells_the_peak_of_all_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_S", 0.01)
    monkeypatch.setattr(
        rounds, "MemoryCgroup", lambda *_args: contextlib.nullcontext(SimpleNamespace(path=None))
    )
    monkeypatch.setattr(rounds, "PHASES", ("fill", "settle", "verify"))

    result = run_once(Growing(), 0, dataclasses.replace(PLAN, data_mib=200))

    assert (result.error, result.verified) == ("", True)
    assert result.memory.total == 1
    assert result.memory_peak == 700 * MIB


def test_contender_whose_memory_cannot_be_read_any_more_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "SAMPLE_S", 0.01)

    class Gone(Fake):
        def memory_now(self) -> int:
            raise FileNotFoundError("mm_stat")

    with sampling.Sampling(Gone([])) as seen:
        time.sleep(0.05)
    assert (seen.peak, seen.readings) == (0, 0)


@pytest.mark.parametrize(
    "given",
    [
        ["--contenders", "zram"],
        ["--once", "zram"],
        ["--rounds", "0"],
        ["--data-mib", "1024", "--device-mib", "1024"],
        ["--data-mib", "-4"],
        ["--page-cluster", "-1"],
        ["--json", "/nowhere/file.json"],
        ["--json", "/"],
        ["--plot", "plot.doc"],
    ],
)
def test_bad_arguments_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(given)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def tree(root: Path, mounts: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/mounts").write_text(mounts)
    return root


def test_cgroup_v1_is_found_before_a_v2_without_memory(tmp_path: Path) -> None:
    unified = tmp_path / "sys/fs/cgroup/unified"
    unified.mkdir(parents=True)
    (unified / "cgroup.controllers").write_text("cpu io\n")
    lines = (
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup"
        " rw,memory 0 0\n"
    )

    assert memory_hierarchy(tree(tmp_path, lines)) == (tmp_path / "sys/fs/cgroup/memory", 1)


def test_cgroup_v2_gets_its_controller_switched_on(tmp_path: Path) -> None:
    top = tmp_path / "sys/fs/cgroup"
    top.mkdir(parents=True)
    (top / "cgroup.controllers").write_text("cpu memory io\n")
    (top / "cgroup.subtree_control").write_text("cpu\n")
    tree(tmp_path, "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    cgroup = MemoryCgroup("x", 64 * MIB, root=tmp_path)

    cgroup.__enter__()  # and never out: these are real files, which rmdir would not remove

    assert (top / "cgroup.subtree_control").read_text() == "+memory"
    assert (cgroup.path / "memory.max").read_text() == str(64 * MIB)


def test_no_memory_cgroup_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cgroup_disable=memory"):
        memory_hierarchy(tree(tmp_path, "proc /proc proc rw 0 0\n"))


def test_traffic_is_a_rate_between_two_looks() -> None:
    traffic = Traffic(4096)
    traffic.update(10.0, "pswpin 100\npswpout 1000\n")
    traffic.update(12.0, "pswpin 612\npswpout 3048\n")

    assert (traffic.back, traffic.out) == (1.0, 4.0)


def test_display_without_a_terminal_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sample = PoolSample(pages=1000, page_bytes=4096000, stored_bytes=1500000, pool_bytes=1638400)
    display = Display(lambda: sample, 4096, {"fill": "writing"})

    display.update("fill", 50, 200)
    display.update("fill", 51, 200)  # too early for another one
    display.finished("done")

    out = capsys.readouterr().out
    assert out.count("\n") == 2
    assert "25% writing; stored 1,000 pages" in out
    assert "ratio 2.50" in out
    assert "\x1b" not in out


def test_display_on_a_terminal_draws_one_block_in_place_and_a_line_that_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    sample = PoolSample(pages=1000, page_bytes=4096000, stored_bytes=1500000, pool_bytes=1638400)
    display = Display(lambda: sample, 4096, {"fill": "writing " + "the data, " * 9})
    display.update("fill", 50, 200)
    first = capsys.readouterr().out
    display._next = 0.0
    display.update("fill", 150, 200)
    second = capsys.readouterr().out
    display.finished("done")
    display.update("verify", 0, 0)

    lines = first.split("\n")
    assert len(lines) == 5
    assert all(
        line.startswith("\r\x1b[2K") and len(line.removeprefix("\r\x1b[2K")) <= 59
        for line in lines[:4]
    )
    assert "[###" in lines[0]
    assert " 25% writing" in lines[0]
    assert second.startswith("\x1b[4A\r\x1b[2K")
    assert " 75% writing" in second
    rest = capsys.readouterr().out
    assert rest.startswith(
        "\x1b[4A\x1b[Jdone\n\r\x1b[2K"
    )  # nothing of the block is left, and the next one begins below
    assert "100% verify" in rest
