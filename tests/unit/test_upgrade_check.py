# SPDX-License-Identifier: GPL-2.0-or-later
"""The check of the installed program, as a worker asks for it: whatever comes of it, the worker goes on."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zswapd.commands import Commands
from zswapd.errors import HandoverError
from zswapd.handover import Word


class FakeWorker:
    """As much of a worker as an upgrade asks for."""

    def __init__(self) -> None:
        words = [0] * len(Word)
        self.state = types.SimpleNamespace(layout=1, geometry={}, words=words)
        self.core = types.SimpleNamespace(arena=types.SimpleNamespace(label=b"{}"))
        self.checked: object = None
        self.calls = 0

    def has_supervisor(self) -> bool:
        return True

    def remember(self) -> None:
        pass

    def call_supervisor(self) -> None:
        self.calls += 1


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


def commands(worker: Any) -> Commands:
    return Commands(worker, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["missing", "a directory", "no program"])
async def test_program_that_cannot_be_started_is_no_upgrade(
    worker: FakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[..., None], what: str
) -> None:
    program = tmp_path / what
    if what == "a directory":
        program.mkdir()
    elif what == "no program":
        program.write_bytes(b"\0\1\2")
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(HandoverError, match="cannot be started") as caught:
        await commands(worker)._upgrade()
    assert caught.value.hint == "the running one goes on"
    expect_log("not reloaded: the installed program cannot be started", level=logging.ERROR)
    await commands(worker).reload()  # as SIGHUP asks for it
    assert not worker.state.words[Word.UPGRADE]
    assert not worker.calls
