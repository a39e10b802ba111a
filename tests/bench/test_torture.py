# SPDX-License-Identifier: GPL-2.0-or-later
"""What scripts/torture counts as good, and what it says and returns; without a daemon."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from tools import torture
from tools.bench.harness.system import HarnessError
from tools.torture import Killer, Outcome, TorturePlan, main

GOOD = Outcome(
    planned=2,
    kills=2,
    deaths=2,
    pages_verified=9,
    takeover_ms=[30, 50],
    takeover_pages=[1 << 14, 1 << 15],
)


def test_good_is_what_was_done_whole_and_lost_nothing() -> None:
    assert GOOD.good()
    assert GOOD.shortcomings() == []
    assert GOOD.cut_short == 0
    assert GOOD.seconds_per_gib() == pytest.approx(0.48)


@pytest.mark.parametrize(
    "change",
    [
        {"error": "broken"},
        {"wrong_pages": 1},
        {"failed_requests": 1},
        {"kernel_complaints": ["I/O error, dev loop0"]},
        {"kills": 1, "deaths": 1},
        {"planned": 0, "kills": 0, "deaths": 0},
        {"deaths": 3},
        {"deaths": 1},
        {"pages_verified": 0},
        {"takeover_pages": [0, 0]},
        {"takeover_pages": [], "takeover_ms": []},
    ],
)
def test_anything_less_is_not_good_and_is_said(change: dict[str, Any]) -> None:
    outcome = dataclasses.replace(GOOD, **change)
    assert not outcome.good()
    assert outcome.lines()[-len(outcome.shortcomings()) :] == outcome.shortcomings()


def test_killer_that_fails_in_any_way_says_so() -> None:
    class Nobody:
        def worker_pid(self) -> int:
            raise ValueError("no such thing")

    outcome = Outcome(planned=3)
    killer = Killer(Nobody(), TorturePlan(kills=3), outcome)  # type: ignore[arg-type]
    killer.run()
    assert killer.done.is_set()
    assert outcome.error == "after 0 kills: no such thing"


def test_what_the_kernel_says_of_other_devices_is_no_complaint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "[ 1.0] I/O error, dev loop1, sector 8 op 0x1:(WRITE)",
        "[ 2.0] I/O error, dev loop10, sector 8 op 0x1:(WRITE)",
        "[ 3.0] Read-error on swap-device (7:1:16)",
        "[ 4.0] INFO: task kworker/1:1 blocked for more than 120 seconds.",
        "[ 5.0] loop1: detected capacity change",
    ]
    done = subprocess.CompletedProcess([], 0, "\n".join(lines))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert torture._kernel_complaints({"loop1"}) == [lines[0], lines[2], lines[3]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--kills", "-3"),
        ("--kills", "0"),
        ("--kills", "x"),
        ("--data-mib", "0"),
        ("--memory-mib", "-1"),
        ("--pause", "-1"),
        ("--pause", "nan"),
        ("--signals", "FOO"),
        ("--set", "pool.limit"),
    ],
)
def test_nonsense_is_refused_before_anything_happens(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


class StandIn:
    """Takes a daemon's place."""

    made: dict[str, Any]

    def __init__(self, **arguments: Any) -> None:
        StandIn.made = arguments

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def swapon(self) -> None:
        pass

    def swapoff(self) -> None:
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs main with an outcome, or an exception, and arguments."""
    monkeypatch.setattr(torture, "Daemon", StandIn)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def run(outcome: Outcome | BaseException, *arguments: str) -> int:
        def tortured(plan: TorturePlan, _daemon: object, **_: object) -> Outcome:
            run.plan = plan  # type: ignore[attr-defined]
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(torture, "torture", tortured)
        return main(arguments)

    return run


def test_exit_code_says_whether_it_was_good(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(GOOD) == 0
    assert "2 kills in 0 s, 9 pages verified, 0 wrong" in capsys.readouterr().out
    assert run(dataclasses.replace(GOOD, kills=1)) == 1
    assert "1 workers were killed, 2 should have been" in capsys.readouterr().out
    assert run(HarnessError("no loop device")) == 2
    assert "no loop device" in capsys.readouterr().err
    assert run(KeyboardInterrupt()) == 130


def test_arguments_become_the_plan_and_the_outcome_a_file(
    run: Callable[..., int], tmp_path: Path
) -> None:
    file = tmp_path / "outcome.json"
    numbers = {
        "--kills": 7,
        "--data-mib": 96,
        "--memory-mib": 32,
        "--pause": 0,
        "--seed": 5,
        "--signals": "KILL,SEGV",
    }
    arguments = [str(word) for item in numbers.items() for word in item]
    assert (
        run(GOOD, *arguments, "--early", "--set", "pool.compressor=lzo", "--json", str(file)) == 0
    )
    plan = run.plan  # type: ignore[attr-defined]
    assert plan == TorturePlan(7, 96, 32, 0.0, plan.signals, early=True, seed=5)
    assert [number.name for number in plan.signals] == ["SIGKILL", "SIGSEGV"]
    assert StandIn.made["size"] == "192M"
    assert StandIn.made["settings"]["pool.compressor"] == "lzo"
    assert json.loads(file.read_text())["takeover_ms"] == [30, 50]


def test_who_is_not_root_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(()) == 2
    assert "needs root" in capsys.readouterr().err
