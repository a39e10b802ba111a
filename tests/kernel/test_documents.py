# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of README.md and docs/ work as they stand there, in their order, with real swap.

They run in a mount namespace with a /run/zswapd of its own and in a network namespace, so that they
need no other paths and ports than those that the documents name. The test adds nothing but waiting:
a reader types more slowly than a script.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import TOP, documents
from zswapd.errors import SwapDeviceError

pytestmark = pytest.mark.kernel

LIMIT_S = 90
SYSTEMD = "needs systemd as process 1: tests/packages and tests/vm/test_systemd.py"
NOT_HERE = {
    "sudo scripts/demo": "tests/kernel/test_demo.py runs it",
    "sudo scripts/test": "runs this test",
    "sudo scripts/deb": "takes minutes: tests/packages/test_deb.py runs it",
    "sudo apt-get install ./dist/zswapd_*.deb": (
        "changes the machine: tests/packages/test_container.py runs it"
    ),
    "sudo systemctl enable --now zswapd": SYSTEMD,
    "sudo zswapctl status": "the package's program; the checkout's runs below",
    "echo 'metrics.listen = \"0.0.0.0:9847\"' > /etc/zswapd/zswapd.toml.d/metrics.toml": (
        "changes the machine's settings"
    ),
    "systemctl daemon-reload && systemctl reload zswapd": SYSTEMD,
    "journalctl -u zswapd -p warning": SYSTEMD,
    "journalctl -u zswapd LOGGER=zswapd.supervisor.supervisor": SYSTEMD,
    "journalctl -u zswapd -o verbose": SYSTEMD,
}
"""Commands that a test machine is not for, and why."""
DEVICES = {"/dev/sdb": "disk", "/srv/image.raw": "image"}
"""Files of a reader's machine, and what the test has in their place."""
_DEVICE = re.compile("|".join(DEVICES))
PROLOGUE = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs {run}
export PATH={programs}:$PATH
cd {top}
ready() {{
    for _ in $(seq 300); do
        [ -S /run/zswapd/zswapd.sock ] && zswapctl status >/dev/null 2>&1 && return
        sleep 0.1
    done
}}
"""
EPILOGUE = """
echo "--- the test's own end"
umount /mnt 2>/dev/null
zswapctl swapoff --all >/dev/null 2>&1
kill "$daemon" 2>/dev/null
for _ in $(seq 300); do [ -d "/proc/$daemon" ] || break; sleep 0.1; done
[ -d "/proc/$daemon" ] && exit 99
grep -q ' /run/zswapd/mnt ' /proc/self/mountinfo && exit 98
exit 0
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with what stands for a reader's devices;
    /run/zswapd exists for as long as the test does.
    """
    run = Path("/run/zswapd")
    made = not run.exists()
    run.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="zswapd-run-"))
    for name in DEVICES.values():
        with (directory / name).open("wb") as file:
            file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", directory / "image"], check=True)
    sudo = directory / "bin/sudo"
    sudo.parent.mkdir()
    sudo.write_text('#!/bin/sh\nexec "$@"\n')
    sudo.chmod(0o755)
    yield directory
    shutil.rmtree(directory)
    if made:
        run.rmdir()


def run(place: Path, commands: list[str]) -> list[tuple[str, int, str]]:
    """Run commands one after the other; return each with its exit code and what it printed."""
    programs = f"{place}/bin:{TOP}/.venv/bin"
    lines = [PROLOGUE.format(run="/run/zswapd", programs=programs, top=shlex.quote(str(TOP)))]
    if not any("zswapd run" in command for command in commands):
        lines.append("zswapd run --size 64M &\ndaemon=$!\nready")
    for command in commands:
        lines += [
            f"echo {shlex.quote(f'--- {command}')}",
            _DEVICE.sub(lambda path: str(place / DEVICES[path[0]]), command),
        ]
        lines += ["daemon=$!\nready\necho '=== 0'"] if command.endswith("&") else ['echo "=== $?"']
    script = place / "script"
    script.write_text("\n".join(lines) + EPILOGUE)
    done = subprocess.run(
        ["unshare", "--mount", "--net", "bash", script],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout
    results = []
    for part in done.stdout.split("\n--- ")[:-1]:
        name, _, rest = part.partition("\n")
        said, _, code = rest.rpartition("=== ")
        if code.strip().isdecimal():
            results.append((name.removeprefix("--- "), int(code), said))
    return results


@pytest.mark.parametrize(
    "page",
    [page for page in documents.PAGES if documents.commands(page)],
    ids=lambda page: page.name,
)
def test_commands_of_a_page_work_in_their_order(place: Path, page: Path) -> None:
    commands = [command for command in documents.commands(page) if command not in NOT_HERE]
    results = run(place, commands)
    assert len(results) == len(commands), results
    assert [result for result in results if result[1] != 0] == []


def test_what_is_not_run_is_in_a_page() -> None:
    there = {command for page in documents.PAGES for command in documents.commands(page)}
    assert set(NOT_HERE) <= there


def test_a_command_that_fails_is_seen(place: Path) -> None:
    results = run(place, ["zswapctl status", "zswapctl swapoff nosuch", "sudo kill %1"])
    assert [code for _, code, _ in results[:2]] == [0, SwapDeviceError.exit_code]
    assert "there are: swap" in results[1][2]
    assert results[2][1] != 0, "a job's number means something to the shell alone"
