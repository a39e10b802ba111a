# SPDX-License-Identifier: GPL-2.0-or-later
"""How a worker calls its supervisor, which may die at any time."""

from __future__ import annotations

import os
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from zswapd.worker.parent import Parent


def test_supervisor_that_dies_as_it_is_called_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    state: Any = SimpleNamespace(words=[])
    monkeypatch.setattr(os, "getppid", lambda: dead.pid)
    Parent(state, dead.pid).call()


def test_supervisor_is_called_only_while_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    state: Any = SimpleNamespace(words=[])
    for parent in (1, 4711):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        Parent(state, 4711).call()
    assert sent == [(4711, signal.SIGUSR1)]
