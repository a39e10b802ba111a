# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes of a `zswapd run` by their roles, and reads of its file with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.support.mounting import is_mounted
from tests.support.swap import wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import program

PAGE = bytes(range(256)) * 16
READ_S = 10.0
"""Seconds that a read may wait for a successor, on a busy machine."""
SPARE, WORKER = "zswapd-spare", "zswapd-worker"


class Roles:
    """The supervisor, worker and spare of a daemon.

    Args:
        directory: the directory for the mount, the socket and the log.
        settings: more settings, values by section.key.
    """

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        self.mountpoint = directory / "mnt"
        self.socket = directory / "s.sock"
        merged = {
            "control.socket": str(self.socket),
            "metrics.listen": "",
            "memory.reserve": "4M",
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        self.command = [
            *program("zswapd"),
            "run",
            "--size",
            "16M",
            "--mountpoint",
            str(self.mountpoint),
        ]
        for name, value in merged.items():
            self.command += ["--set", f"{name}={value}"]

    def all(self) -> dict[int, str]:
        """Return the name of each of its processes, by id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if os.fsencode(self.mountpoint) in words and state not in "ZX":
                    found[int(entry.name)] = (entry / "comm").read_text().strip()
        return found

    @property
    def supervisor(self) -> int:
        """The process that was started.

        A process that it has just forked has its name for a moment.
        """
        found = self.all()
        names = {pid for pid, name in found.items() if name not in (SPARE, WORKER)}
        (pid,) = [pid for pid in names if system.parent(pid) not in names]
        return pid

    @property
    def worker(self) -> int:
        """The worker; waits for one if there is none."""
        return self._wait_for(WORKER)

    @property
    def spare(self) -> int:
        """The spare; waits for one if there is none."""
        return self._wait_for(SPARE)

    def _wait_for(self, name: str) -> int:
        found: list[int] = []

        def look() -> bool:
            found[:] = [pid for pid, its in self.all().items() if its == name]
            return len(found) == 1

        wait_for(look, f"there is not one {name}", limit=30)
        return found[0]

    def next_worker(self, old: int) -> int:
        """Wait until another worker serves; return its process id."""
        wait_for(lambda: self.worker != old, "no other worker comes", limit=30)
        self.verify()
        return self.worker

    def wait_until_it_serves(self) -> None:
        """Wait for the mount, and write a page to the file."""
        wait_for(
            lambda: is_mounted(self.mountpoint) and self.socket.exists(),
            "it is not mounted",
            limit=30,
        )
        self._run("dd", f"of={self.mountpoint / 'swap'}", "conv=notrunc", "oflag=direct", data=PAGE)
        self.verify()

    def verify(self) -> None:
        """Read the page; if the reader waits too long, the test fails and leaves the reader."""
        assert self._run("dd", f"if={self.mountpoint / 'swap'}", "count=1", "iflag=direct") == PAGE

    def _run(self, *command: str, data: bytes = b"") -> bytes:
        process = subprocess.Popen(
            [*command, "bs=4096", "status=none"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            out, _ = process.communicate(data, timeout=READ_S)
        except subprocess.TimeoutExpired:
            process.kill()
            self.kill()  # without a daemon, the kernel fails the read
            process.communicate(timeout=READ_S)
            raise
        assert process.returncode == 0
        return out

    def leftovers(self) -> list[str]:
        """Return the remains of the daemon in words, without the log and the test's own files."""
        names = [
            path.name
            for path in self.directory.glob("*")
            if path.name in ("mnt", "s.sock", "s.sock.lock")
        ]
        return [*names, *(["mount"] if is_mounted(self.mountpoint) else []), *self.all().values()]

    def wait_until_nothing_is_left(self) -> None:
        """Wait until the daemon has ended and cleaned up."""
        wait_for(lambda: not self.leftovers(), "something is left", limit=30)

    def kill(self) -> None:
        """Kill all its processes, stopped ones too, and unmount."""
        end = time.monotonic() + 10
        while (pids := self.all()) and time.monotonic() < end:
            for pid in pids:
                for number in (signal.SIGKILL, signal.SIGCONT):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(0.05)
        if is_mounted(self.mountpoint):
            subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=True, timeout=10)
