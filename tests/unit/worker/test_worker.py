# SPDX-License-Identifier: GPL-2.0-or-later
"""What a worker does about its supervisor, without the rest of either."""

from __future__ import annotations

import os
import signal
import subprocess
import types
from typing import Any

import pytest

from zswapd.worker.worker import Worker


def test_supervisor_that_dies_as_it_is_called_is_no_error() -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    worker: Any = types.SimpleNamespace(_supervisor=dead.pid, has_supervisor=lambda: True)
    Worker.call_supervisor(worker)


def test_supervisor_is_called_only_while_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    for is_there in (False, True):
        worker: Any = types.SimpleNamespace(_supervisor=4711, has_supervisor=lambda is_there=is_there: is_there)
        Worker.call_supervisor(worker)
    assert sent == [(4711, signal.SIGUSR1)]
