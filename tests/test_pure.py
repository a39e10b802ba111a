# SPDX-License-Identifier: GPL-2.0-or-later
"""The page path as plain Python.

Where it is compiled, the tests that drive all of its modules run once more without.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.compiled import PACKAGE, WANTS_PURE, compiled_modules, is_compiled

TOP = Path(__file__).resolve().parents[1]

AGAIN = (
    "tests/contract",
    "tests/model/test_device_model.py",
    "tests/unit/core/allocators",
    "tests/unit/core/block",
    "tests/unit/core/frontends",
    "tests/unit/core/pam",
    "tests/unit/core/test_memory.py",
    "tests/unit/core/test_objects.py",
    "tests/unit/core/tmem",
    "tests/test_pure.py",
)
"""What runs on plain Python, too.

Allocators, back ends, index, front ends and block files, contracts, models and units.
"""


def listed() -> set[Path]:
    """Return the sources that setup.py compiles."""
    (names,) = re.findall(
        r"^PAGE_PATH = \[(.*?)^\]", (TOP / "setup.py").read_text(), re.MULTILINE | re.DOTALL
    )
    return {TOP / name for name in re.findall(r'"(.+?)"', names)}


def test_run_has_what_it_asked_for() -> None:
    """Without ZSWAPD_PURE all of the page path is compiled.

    An environment in which nothing was is an error, and no choice.
    """
    assert is_compiled() is not WANTS_PURE
    if not WANTS_PURE:
        assert set(compiled_modules()) == listed()


def test_what_runs_again_reaches_every_compiled_module() -> None:
    """Each module of the page path is named by a test that runs on plain Python.

    Or imported by one that is.
    """
    needed = {
        path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        for path in listed()
    }
    files = [
        path
        for name in AGAIN
        for path in ([TOP / name] if name.endswith(".py") else (TOP / name).rglob("*.py"))
    ]
    program = (
        "import sys; sys.path.insert(0, '.'); from tests.support import compiled;"
        " compiled.use_pure()\n"
    )
    program += "\n".join(
        f"import {'.'.join(path.relative_to(TOP).with_suffix('').parts)}" for path in files
    )
    program += (
        "\nfor name, module in sys.modules.items():\n    print(name, module.__file__) if name[:7]"
        " == 'zswapd.' else None"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert needed <= set(loaded)
    assert [name for name in sorted(needed) if not loaded[name].endswith(".py")] == []


@pytest.mark.skipif(not is_compiled(), reason="this run is on plain Python already")
@pytest.mark.timeout(640)
def test_all_of_it_holds_without_compilation() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--shared-machine",
        "-p",
        "no:randomly",
        "--hypothesis-profile=short",
        "-k",
        "not 16K and not 64K",  # the size of a page makes no difference between the two
        *AGAIN,
    ]
    environment = os.environ | {"ZSWAPD_PURE": "1"}
    result = subprocess.run(
        command, cwd=TOP, env=environment, capture_output=True, text=True, check=False, timeout=620
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
