# SPDX-License-Identifier: GPL-2.0-or-later
"""What a newcomer and the hosted check run first: the Makefile, the git hooks, the workflow.

All three name targets of the Makefile or modules of the environment. These tests read the files as
text; the commands themselves run in the hosted check.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import TOP

MAKEFILE = (TOP / "Makefile").read_text()
HOOKS = (TOP / ".pre-commit-config.yaml").read_text()
WORKFLOW = (TOP / ".github/workflows/check.yml").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _make(*words: str, directory: Path = TOP) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    return subprocess.run(
        ["make", "--no-print-directory", "--file", str(TOP / "Makefile"), *words],
        cwd=directory,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_make
@pytest.mark.parametrize("words", [(), ("help",)])
def test_make_lists_every_target(words: tuple[str, ...]) -> None:
    listed = [line.split()[0] for line in _make(*words).stdout.splitlines()]
    assert sorted(listed) == sorted(TARGETS)


def test_no_file_can_stand_for_a_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == TARGETS


@needs_make
@pytest.mark.parametrize("target", ["check", "quick"])
def test_a_checkout_without_an_environment_is_told_the_next_command(
    target: str, tmp_path: Path
) -> None:
    shutil.copy(TOP / "Makefile", tmp_path)
    result = _make(target, directory=tmp_path)
    assert result.returncode != 0
    assert "run make dev" in result.stderr


@needs_make
@pytest.mark.parametrize("target", ["check", "quick"])
def test_a_change_to_a_compiled_file_needs_no_build(target: str, tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    commands = _make("--dry-run", target, directory=tmp_path).stdout
    assert " -m pytest " in commands
    assert "ZSWAPD_PURE=1 " in commands


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "README.md", "scripts/dev", ".pre-commit-config.yaml"]
)
def test_documents_name_targets_that_exist(name: str) -> None:
    # In a code block, in backticks, in a hook's entry, or in the last line of scripts/dev.
    commands = re.findall(
        r"(?:^|`|entry: |next: )(?:sudo )?make((?: [a-z]+)+)(?= *(?:#|`|\"|$))",
        (TOP / name).read_text(),
        re.MULTILINE,
    )
    named = {word for command in commands for word in command.split()}
    assert named <= TARGETS
    assert named or name == "README.md"


def test_hosted_check_makes_the_environment_and_runs_what_a_commit_passes() -> None:
    commands = re.findall(r"^ +- run: (.+)$", WORKFLOW, re.MULTILINE)
    assert commands == ["sudo make dev", "make check quick"]
    assert "A commit passes `make check quick`." in (TOP / "CONTRIBUTING.md").read_text()


def test_hooks_run_modules_and_targets_that_exist() -> None:
    entries = re.findall(r"^ +entry: (.+)$", HOOKS, re.MULTILINE)
    assert len(entries) >= 3
    for entry in entries:
        program, *words = entry.split()
        if program == "make":
            assert set(words) <= TARGETS
        else:
            assert (program, words[0]) == (".venv/bin/python", "-m")
            assert importlib.util.find_spec(words[1]), f"{words[1]} is not in the environment"


def test_hooks_need_no_network_and_are_all_installed() -> None:
    assert re.findall(r"^ +- repo: (.+)$", HOOKS, re.MULTILINE) == ["local"]
    languages = re.findall(r"^ +language: (.+)$", HOOKS, re.MULTILINE)
    assert set(languages) == {"system"}
    installed = re.search(r"^default_install_hook_types: \[(.+)\]$", HOOKS, re.MULTILINE)
    assert installed
    stages = re.findall(r"^ *(?:default_)?stages: \[(.+)\]$", HOOKS, re.MULTILINE)
    assert {stage for line in stages for stage in line.split(", ")} == set(installed[1].split(", "))


def test_build_as_root_leaves_no_cache_of_mypy_in_the_checkout() -> None:
    # The workflow runs `sudo make dev`, and then `make check` as the user.
    library = (TOP / "scripts/lib.sh").read_text()
    assert re.search(r"MYPY_CACHE_DIR=\$venv/\S+ \\\n +pip_install .* -e ", library)
