# SPDX-License-Identifier: GPL-2.0-or-later
"""Every command of zswapctl with --json, against a real daemon that has every part.

Stdout is JSON, and nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.commandline import all_commands
from tests.support.swap import Stage, stage
from tools.bench.harness.daemon import Daemon
from zswapd.cli import zswapctl

__all__ = ["stage"]

IN_ORDER = {
    "get": ["pool.limit"],
    "set": ["pool.limit=32M"],
    "reset": ["--all"],
    "writeback": ["--mark-idle"],
    "swapoff": ["--all"],
    "shrink": ["1"],
    "files add": ["more", "--size", "1M"],
    "files resize": ["more", "--size", "2M"],
    "files remove": ["more"],
    "cache add": ["second", "--backing", "{file}"],
    "cache remove": ["second"],
    "cache invalidate": ["disk"],
    "cache resize": ["disk"],
}
"""What commands are given. In the parser's order each finds what it needs."""
LINES = {"pages"}
"""Commands that print an object a line, since there may be millions."""
NEED_SWAP = {"swapon"}
"""tests/kernel has these: `Daemon.swapon` reads their JSON."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "slow"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def daemon(stage: Stage, file: Path, tmp_path: Path) -> Daemon:
    settings = {"memory__reserve": "8M", "cache__limit": "8M", "cache__volumes__disk": str(file)}
    started = stage.daemon("16M", **settings, backing__path=str(tmp_path / "store"))
    with started.file.open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), os.urandom(1000) + bytes(3096), 4096)
    return started


def test_every_command_prints_json_and_nothing_else(
    daemon: Daemon, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [" ".join(words) for words in all_commands(zswapctl.make_parser())]
    assert not (set(IN_ORDER) | LINES | NEED_SWAP) - set(commands)
    for command in (command for command in commands if command not in NEED_SWAP):
        arguments = [word.format(file=file) for word in IN_ORDER.get(command, [])]
        code = zswapctl.main(
            ["--socket", str(daemon.socket), *command.split(), *arguments, "--json"]
        )
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, ""), command
        documents = captured.out.splitlines() if command in LINES else [captured.out]
        assert all(isinstance(json.loads(document), dict) for document in documents), command
