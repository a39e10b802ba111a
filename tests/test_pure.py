# SPDX-License-Identifier: GPL-2.0-or-later
"""The page path as plain Python: where it is compiled, its contract tests run once more without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.compiled import WANTS_PURE, compiled_modules, is_compiled

TOP = Path(__file__).resolve().parents[1]


def test_run_has_what_it_asked_for() -> None:
    assert is_compiled() == (bool(compiled_modules()) and not WANTS_PURE)


@pytest.mark.skipif(not is_compiled(), reason="this run is on plain Python already")
@pytest.mark.timeout(300)
def test_contracts_hold_without_compilation() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--shared-machine",
        "-p",
        "no:randomly",
        "tests/contract",
        "tests/test_pure.py",
    ]
    result = subprocess.run(
        command, cwd=TOP, env=os.environ | {"ZSWAPD_PURE": "1"}, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
