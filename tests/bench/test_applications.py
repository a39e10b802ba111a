# SPDX-License-Identifier: GPL-2.0-or-later
"""The applications, short.

Each runs, verifies what it gets, is ended in time. On real swap, over all contenders: by tier.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import time
from pathlib import Path

import pytest

from tools.bench import bench
from tools.bench.applications import APPLICATIONS, Application, Level, TooSlowError
from tools.bench.applications.base import in_cgroup, running
from tools.bench.applications.compile import Compile
from tools.bench.applications.database import Database
from tools.bench.applications.tabs import _Browser
from tools.bench.contenders import REGISTRY
from tools.bench.contenders.swapfile import SlowFile
from tools.bench.harness.system import HarnessError, is_swap
from tools.bench.workloads.rounds import Plan, run_once


@functools.cache
def ready(name: str) -> Application:
    """Return an application that is ready; a test that changes it puts it back."""
    application = APPLICATIONS[name]()
    if reason := application.missing():
        pytest.skip(f"{name}: {reason}")
    try:
        application.prepare(quick=True)
    except HarnessError as exc:
        if name != "compile":
            raise
        pytest.skip(f"the source cannot be fetched: {exc}")
    return application


@pytest.mark.parametrize("name", APPLICATIONS)
def test_runs_and_yields_its_columns(name: str) -> None:
    application = ready(name)
    figures = application.run(application.short[0], None, 60)
    assert set(figures) == set(application.columns)
    assert all(value > 0 for value in figures.values())


@pytest.mark.parametrize("name", ["compile", "database", "tabs"])
def test_is_ended_when_its_time_is_over(name: str) -> None:
    application = ready(name)
    started = time.monotonic()
    with pytest.raises(TooSlowError):
        application.run(Level("long", 64, None), None, 0.2)
    assert time.monotonic() - started < 10


def test_compilation_with_another_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    application = ready("compile")
    assert isinstance(application, Compile)
    monkeypatch.setattr(application, "options", (*application.options, "CFLAGS=-O1"))
    with pytest.raises(HarnessError, match="DATA WAS LOST"):
        application.run(Level("-j2", 2, None), None, 60)


def test_database_that_answers_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    application = ready("database")
    assert isinstance(application, Database)
    calls = iter(range(10**9))
    honest = application._value
    # After all 2048 were set, and some read: from then on the client expects another last byte.
    monkeypatch.setattr(
        application,
        "_value",
        lambda key, gen: (
            honest(key, gen)[:-1] + b"\xee" if next(calls) > 2100 else honest(key, gen)
        ),
    )
    with pytest.raises(HarnessError, match="DATA WAS LOST: the value of key"):
        application.run(Level("2", 2, None), None, 30)


def test_tab_that_holds_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    application = ready("tabs")
    honest, calls = _Browser.look, iter(range(100))
    monkeypatch.setattr(
        _Browser, "look", lambda browser, session: honest(browser, session) + (next(calls) == 3)
    )
    with pytest.raises(HarnessError, match="DATA WAS LOST: tab 1"):
        application.run(Level("2 tabs", 2, None), None, 60)


def test_all_of_a_session_is_killed(tmp_path: Path) -> None:
    command = in_cgroup(None, ["sh", "-c", f"sleep 77 & echo $! >{tmp_path}/pid; sleep 77"])
    with running(command, stdout=subprocess.DEVNULL):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


PLAN = Plan(data_mib=40, memory_mib=24, device_mib=96, rounds=1, faults=64, time_limit=60)
SLOW_PLAN = dataclasses.replace(PLAN, data_mib=28, memory_mib=20)


@pytest.mark.kernel
@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "none"])
def test_contender_swaps_verifies_and_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(SlowFile, "options", ("serialize=requests", "rdelay=1ms", "wdelay=1ms"))
    contender = REGISTRY[name]()
    if reason := contender.missing():
        pytest.skip(f"{name}: {reason}")
    used: list[str] = []
    start, stop = contender.start, contender.stop
    monkeypatch.setattr(
        contender, "start", lambda size: (start(size), used.extend(contender.devices()))
    )
    monkeypatch.setattr(contender, "stop", lambda: (stop(), used.append("off")))

    run = run_once(contender, 0, SLOW_PLAN if name == "file-slow" else PLAN)

    assert used[-1] == "off", "stop raises if it leaves something"
    assert contender.devices() == []
    # A loop device may belong to another test by now; a file or a zram of this run does not.
    assert not [device for device in used if "/loop" not in device and is_swap(device)]
    if name.startswith("zram") and "the workload was killed" in run.error:
        pytest.skip("the kernel OOM-kills what swaps to zram now and then (docs/benchmarks.md)")
    assert (run.error, run.verified) == ("", True)
    figures = run.figures()
    assert {"out", "seq", "random", "mixed", "mixed_p999", "off"} <= set(figures)
    if not request.config.getoption(
        "--shared-machine"
    ):  # others' areas of the same priority get their share of the pages
        assert run.swapoff[0] > PLAN.memory_mib / 2
    if name == "file-slow":
        assert figures["random"] > 1000


@pytest.mark.kernel
def test_database_on_swap_of_zswapd(capsys: pytest.CaptureFixture[str]) -> None:
    ready("database")
    assert bench.main(["database", "--quick", "--contenders", "zswapd", "--device-mib", "128"]) == 0
    assert "1/1" in capsys.readouterr().out


@pytest.mark.bench
@pytest.mark.kernel
@pytest.mark.timeout(560)
@pytest.mark.parametrize("name", APPLICATIONS)
def test_quick_form_over_all_contenders(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ready(name)
    assert bench.main([name, "--quick", "--limit", "60"]) == 0
    assert "zswapd" in capsys.readouterr().out
