# SPDX-License-Identifier: GPL-2.0-or-later
"""The check of the installed program, as a worker asks for it.

Whatever comes of it, the worker goes on.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from zswapd.config import load
from zswapd.config.loader import memory_total
from zswapd.core import compress
from zswapd.errors import HandoverError
from zswapd.handover.state import UPGRADE_WANTED, Word
from zswapd.supervisor import memory_of
from zswapd.system.offload import Offload
from zswapd.worker import upgrade as upgrade_module
from zswapd.worker.upgrade import Upgrade


class FakeWorker:
    """The parts of a worker, and its saver, as far as an upgrade needs them."""

    def __init__(self) -> None:
        words = [0] * len(Word)
        self.state = types.SimpleNamespace(layout=1, geometry={}, words=words)
        self.session = types.SimpleNamespace()
        configured = types.SimpleNamespace(context=types.SimpleNamespace(memory_total=1 << 30))
        self.settings = types.SimpleNamespace(configured=configured)
        self.core = types.SimpleNamespace(arena=types.SimpleNamespace(label=b"{}"))
        self.swapoff_thread = Offload("swapoff")
        self.parent = types.SimpleNamespace(is_alive=lambda: True, call=self.call)
        self.checked: object = None
        self.calls = 0

    def call(self) -> None:
        self.calls += 1

    def save_state(self) -> None:
        pass


async def nobody(_news: object) -> None:
    """Hear how far it is."""


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


def upgrade_of(worker: Any) -> Upgrade:
    return Upgrade(worker, worker)


@pytest.mark.parametrize("what", ["missing", "a directory", "no program"])
async def test_program_that_cannot_be_started_is_no_upgrade(
    worker: FakeWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: Callable[..., None],
    what: str,
) -> None:
    program = tmp_path / what
    if what == "a directory":
        program.mkdir()
    elif what == "no program":
        program.write_bytes(b"\0\1\2")
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(HandoverError, match="cannot be started") as caught:
        await upgrade_of(worker).upgrade(nobody)
    assert caught.value.hint == "the running one goes on"
    expect_log("not reloaded: the installed program cannot be started", level=logging.ERROR)
    await upgrade_of(worker).reload()  # as SIGHUP asks for it
    assert not worker.state.words[Word.UPGRADE]
    assert not worker.calls


@pytest.fixture
def _no_thread_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone(2), or a child that has not called exec, may wait for memory.

    With the interpreter's lock.
    """

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("not while pages are served")

    for place, name in (
        (trio, "run_process"),
        (trio.to_thread, "run_sync"),
        (subprocess, "Popen"),
        (os, "fork"),
    ):
        monkeypatch.setattr(place, name, fail)


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("_no_thread_is_made")
async def test_check_that_says_yes_asks_the_supervisor(
    worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "echo '{\"pool\": 1}'; echo noise >&2; read nothing; exit 0"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "new", text))
    report = await upgrade_of(worker).upgrade(nobody)
    assert report["worker"] == os.getpid()
    assert worker.checked == {"pool": 1}
    assert worker.state.words[Word.UPGRADE] == UPGRADE_WANTED
    assert worker.calls == 1


@pytest.mark.usefixtures("_no_thread_is_made")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "echo 'no: another layout' >&2; echo more >&2; exit 13",
            "cannot take over: no: another layout",
        ),
        ("exit 3", "cannot take over: exit code 3"),
        ("kill -9 $$", "cannot take over: exit code -9"),
        ("exec sleep 60", "did not answer within 0.3 s"),
    ],
)
async def test_check_that_says_no_changes_nothing(
    worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(upgrade_module, "CHECK_S", 0.3)
    monkeypatch.setattr(sys, "executable", program(tmp_path / "new", text))
    with trio.fail_after(20), pytest.raises(HandoverError, match=reason):
        await upgrade_of(worker).upgrade(nobody)
    assert not worker.state.words[Word.UPGRADE]
    assert worker.checked is None


def test_percent_is_of_the_memory_that_the_running_daemon_started_with() -> None:
    assert memory_of(json.dumps({"memory_total": 123 << 20})) == 123 << 20
    # counts by MemTotal, whatever limits there are
    for older in ({}, {"memory_total": None}, {"memory_total": "much"}):
        assert memory_of(json.dumps(older)) == memory_total()
    assert memory_of("nonsense") == memory_total()
    config = load(
        codecs=compress.names(), assignments=[("swap.size", "50%", "--size")], memory=128 << 20
    )
    assert config.swap.size == 64 << 20
