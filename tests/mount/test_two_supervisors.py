# SPDX-License-Identifier: GPL-2.0-or-later
"""Two programs want to take over from one worker that has lost its supervisor.

One does, whatever holds the other up.

Nothing is swapped on here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import is_mounted
from tests.support.swap import wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import program

pytestmark = pytest.mark.mount

PAGE = os.urandom(4096)

HELD_UP = """
import os, time
from pathlib import Path
from zswapd.supervisor import orphan
gate, inherit = Path({gate!r}), orphan.inherit

def slow(*args, **options):
    got = inherit(*args, **options)
    gate.with_suffix(".reached").touch()
    while not gate.exists():
        time.sleep(0.01)
    return got

if os.environ.get("HELD_UP"):
    orphan.inherit = slow
"""
"""A sitecustomize.py: a supervisor that has got the files goes on only when it may.

As where memory is short.
"""


class Programs:
    """Several `zswapd run` with the same settings."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint = directory / "mnt"
        self.gate = directory / "gate"
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        (directory / "sitecustomize.py").write_text(HELD_UP.format(gate=str(self.gate)))
        settings = {
            "control.socket": str(directory / "s.sock"),
            "metrics.listen": "",
            "memory.reserve": "4M",
            "service.spare": "false",
        }
        self._command = [
            *program("zswapd"),
            "run",
            "--size",
            "16M",
            "--mountpoint",
            str(self.mountpoint),
        ]
        for name, value in settings.items():
            self._command += ["--set", f"{name}={value}"]

    def start(self, *, held_up: bool = False) -> subprocess.Popen[bytes]:
        """Start one more."""
        environ = {
            **os.environ,
            "PYTHONPATH": str(self._directory),
            "HELD_UP": "1" if held_up else "",
        }
        with self.log(len(self._processes)).open("wb") as log:
            process = subprocess.Popen(
                self._command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    def log(self, number: int) -> Path:
        """Return where the log of one is."""
        return self._directory / f"log{number}"

    def wait_for_text(self, number: int, text: str) -> None:
        """Wait until one has logged something."""
        wait_for(lambda: text in self.log(number).read_text(), f"{number} does not say {text!r}")

    def workers(self) -> set[int]:
        """Return all workers of this mount, whosever they are."""
        found = set()
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (directory / "comm").read_text() == "zswapd-worker\n" and str(
                    self.mountpoint
                ) in (directory / "cmdline").read_text():
                    found.add(int(directory.name))
        return found

    def close(self) -> None:
        """Leave nothing."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.workers(), "workers live")
        if is_mounted(self.mountpoint):
            subprocess.run(["umount", "--lazy", self.mountpoint], check=True)
        for number in range(len(self._processes)):
            print(self.log(number).read_text())


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with contextlib.closing(Programs(tmp_path)) as made:
        yield made


@pytest.fixture
def held_up(programs: Programs) -> subprocess.Popen[bytes]:
    """Return one that has got the files of a worker without supervisor.

    And does nothing about it yet.
    """
    first = programs.start()
    programs.wait_for_text(0, "ready")
    with (programs.mountpoint / "swap").open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 8192)
    first.kill()
    first.wait()
    process = programs.start(held_up=True)
    wait_for(programs.gate.with_suffix(".reached").exists, "it does not get the files")
    return process


def the_page_is_there(programs: Programs) -> None:
    with (programs.mountpoint / "swap").open("rb", buffering=0) as swap:
        assert os.pread(swap.fileno(), 4096, 8192) == PAGE


def test_whoever_comes_second_ends(programs: Programs, held_up: subprocess.Popen[bytes]) -> None:
    other = programs.start()
    programs.wait_for_text(2, "serves")
    (worker,) = programs.workers()
    programs.gate.touch()
    assert held_up.wait(20) == 14
    time.sleep(0.3)
    assert programs.workers() == {worker}
    assert system.parent(worker) == other.pid
    the_page_is_there(programs)


def test_worker_of_one_that_was_faster_and_has_died_is_taken_over_from(
    programs: Programs, held_up: subprocess.Popen[bytes]
) -> None:
    other = programs.start()
    programs.wait_for_text(2, "serves")
    (worker,) = programs.workers()
    other.kill()
    other.wait()
    programs.gate.touch()
    programs.wait_for_text(1, "serves")
    wait_for(lambda: worker not in programs.workers(), "there are two workers")
    (now,) = programs.workers()
    assert system.parent(now) == held_up.pid
    the_page_is_there(programs)
