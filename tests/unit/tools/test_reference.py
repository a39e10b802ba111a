# SPDX-License-Identifier: GPL-2.0-or-later
"""Manual pages, settings' reference and completions.

They are what the programs' tables give now, and they work.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import TOP
from tools.reference.__main__ import files
from zswapd import errors
from zswapd.cli import zswapctl
from zswapd.config import SETTINGS, reloadable_names
from zswapd.control.protocol import COMMANDS

PAGES = sorted(name for name in files() if name.startswith("man/"))


@pytest.mark.parametrize("name", sorted(files()))
def test_file_is_what_scripts_reference_writes(name: str) -> None:
    assert (TOP / name).read_text() == files()[name], "run scripts/reference"


def test_the_directories_hold_nothing_else() -> None:
    found = {
        str(path.relative_to(TOP))
        for directory in ("man", "completions")
        for path in (TOP / directory).iterdir()
    }
    assert found == {name for name in files() if not name.startswith("docs/")}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.skipif(not shutil.which("man"), reason="man-db is not installed")
def test_manual_page_is_clean(name: str) -> None:
    command = ["man", "--warnings=all", "-E", "UTF-8", "--local-file", "-Tutf8", str(TOP / name)]
    environ = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "MANWIDTH": "100"}
    shown = subprocess.run(
        command, env=environ, check=True, capture_output=True, text=True, timeout=60
    )
    assert shown.stderr == ""
    plain = re.sub(r".\x08", "", shown.stdout)
    assert "\nNAME\n" in plain
    assert "\nSEE ALSO\n" in plain
    assert not re.search(r"\\f|`", plain)


def test_pages_tell_everything() -> None:
    pages = {name: text.replace("\\-", "-") for name, text in files().items()}
    for dest, row in SETTINGS.items():
        assert f".BR {row.key} " in pages["man/zswapd.toml.5"], dest
        assert f"`{row.key}`" in pages["docs/configuration.md"], dest
    for command in set(COMMANDS) - {"inherit"}:  # between daemons only
        spoken = re.sub("^(cache|files)-", r"\1 ", command)
        assert f".SS {spoken}" in pages["man/zswapctl.8"]
    for cls in (errors.ConfigError, errors.HandoverError):
        assert f".B {cls.exit_code}\n" in pages["man/zswapctl.8"]
    assert "upgrade-check" not in pages["man/zswapd.8"]
    assert not re.search(
        r"^\W*$",
        re.sub(r"^\.\\\".*", "x", pages["man/zswapctl.8"].strip(), flags=re.MULTILINE),
        re.MULTILINE,
    )
    for heading in (
        "set SECTION.KEY=VALUE...",
        "pages [NAME]",
        "cache add NAME --backing PATH [--mode ro|writethrough]",
    ):
        assert f".SS {heading}\n" in pages["man/zswapctl.8"]


def complete(*words: str) -> set[str]:
    """What bash offers for the last word."""
    script = f"""
        source {TOP}/completions/{words[0]}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        COMP_CWORD={len(words) - 1}
        function=$(complete -p {words[0]} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        $function {words[0]} '{words[-1]}' '{words[-2]}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], check=True, capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_settings(tmp_path: Path) -> None:
    assert complete("zswapctl", "swap") == {"swapon", "swapoff"}
    assert complete("zswapctl", "cache", "in") == {"invalidate"}
    assert "--mark-idle" in complete("zswapctl", "writeback", "--")
    assert complete("zswapctl", "get", "metrics.") == {"metrics.listen", "metrics.users"}
    assert complete("zswapctl", "set", "pool.comp") == {"pool.compressor="}
    assert complete("zswapctl", "set", "") == {f"{name}=" for name in reloadable_names()}
    assert complete("zswapctl", "reset", "pool.comp") == {"pool.compressor"}
    assert complete("zswapctl", "reset", "swap.") == {"swap.priority"}
    assert complete("zswapctl", "cache", "add", "x", "--mode", "w") == {"writethrough"}
    assert complete("zswapd", "c") == {"config"}
    assert complete("zswapd", "run", "--set", "swap.s") == {"swap.size="}
    assert complete("zswapd", "config", "d") == {"defaults"}
    (tmp_path / "my.toml").touch()
    assert complete("zswapd", "run", "--config", f"{tmp_path}/m") == {f"{tmp_path}/my.toml"}


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize("name", ["_zswapd", "_zswapctl"])
@pytest.mark.slow
def test_zsh_loads_the_completion(name: str) -> None:
    script = (
        f"fpath=({TOP}/completions $fpath); autoload -Uz compinit; compinit -D -u; autoload +X"
        f" {name}; whence -w {name}"
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", script], check=True, capture_output=True, text=True, timeout=30
    )
    assert done.stderr == ""
    assert done.stdout == f"{name}: function\n"
    assert (TOP / "completions" / name).read_text().startswith(f"#compdef {name[1:]}\n")


def test_every_command_is_described() -> None:
    text = zswapctl.make_parser().format_help()
    assert all(
        re.search(rf"^    {command.split('-')[0]} +\w", text, re.MULTILINE)
        for command in set(COMMANDS) - {"inherit"}
    )
