# SPDX-License-Identifier: GPL-2.0-or-later
"""A start after supervisor and worker are dead, with the files that the service manager kept.

No swap is on here. A swap device that no process serves would stop the whole machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounting import is_mounted
from tests.support.swap import wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import program

pytestmark = pytest.mark.mount

PAGE = os.urandom(4096)


class Manager:
    """A service manager as far as its file descriptor store goes."""

    def __init__(self, directory: Path) -> None:
        self.mountpoint = directory / "mnt"
        self.log = directory / "log"
        self.store: dict[str, int] = {}
        self._address = str(directory / "notify")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(self._address)
        self._notify.settimeout(30)
        settings = {
            "control.socket": directory / "s.sock",
            "metrics.listen": "",
            "memory.reserve": "4M",
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
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it with the store's files as descriptors from 3 on; wait until it is ready."""
        environ = {**os.environ, "NOTIFY_SOCKET": self._address}
        script = 'exec "$@"'
        if self.store:
            for place, descriptor in enumerate(self.store.values(), 3):
                script = f"exec {place}<&{descriptor}; {script}" if place != descriptor else script
            script = (
                f"export LISTEN_PID=$$ LISTEN_FDS={len(self.store)}"
                f" LISTEN_FDNAMES={':'.join(self.store)}; {script}"
            )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script, "bash", *self._command],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=list(self.store.values()),
                start_new_session=True,
            )
        while not self._hear():
            pass

    def _hear(self) -> bool:
        """Take a message; return whether it says that the service is ready."""
        message, descriptors, _flags, _address = socket.recv_fds(self._notify, 4096, 1)
        lines = dict(line.split("=", 1) for line in message.decode().splitlines())
        if "FDSTORE" in lines and lines["FDNAME"] not in self.store:
            # Far from 3 and those behind it, which the next start needs.
            self.store[lines["FDNAME"]] = system_dup(descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        return "READY" in lines

    def kill_all(self) -> None:
        """Kill supervisor, worker and spare at once, and wait until they are gone."""
        assert self.process is not None
        pids = [self.process.pid, *system.children(self.process.pid)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "they live")

    def close(self) -> None:
        """Leave nothing."""
        if self.process is not None and self.process.poll() is None:
            self.kill_all()
        for descriptor in self.store.values():
            os.close(descriptor)
        self._notify.close()
        if is_mounted(self.mountpoint):
            subprocess.run(["umount", "--lazy", self.mountpoint], check=True)
        print(self.log.read_text())


def system_dup(descriptor: int) -> int:
    """Return a copy of a descriptor, from 100 on."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100)


NOT_THERE = """
import os
from zswapd import system as service
from zswapd.system import code
runs, read, has_read = code._runs, code.read, []
service.read_code = lambda: has_read.append(read())
code._runs = lambda libc, item: (
    runs(libc, item) if has_read or not os.path.exists({!r}) else [(item.start, item.end, False)]
)
"""
"""A sitecustomize.py whose process finds none of its code in memory until it has read the code.

Or until a file is gone.
"""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as made:
        yield made


def missing_code(pid: int) -> list[str]:
    """Return the programs and libraries of a process that are not in its memory as a whole."""
    parts = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE
    )
    code = [part for part in parts if re.match(r"\S+ r-xp .* /", part)]
    assert code
    return [
        part.splitlines()[0]
        for part in code
        if re.search(r"^Size: *(.*)$", part, re.M)[1] != re.search(r"^Rss: *(.*)$", part, re.M)[1]
    ]


def test_start_after_both_have_died_serves_their_pages_and_then_fetches_its_code(
    manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.start()
    with (manager.mountpoint / "swap").open("r+b", buffering=0) as swap:
        os.pwrite(swap.fileno(), PAGE, 8192)
    assert set(manager.store) == {"zswapd-fuse", "zswapd-arena", "zswapd-state"}
    assert manager.process is not None
    assert missing_code(manager.process.pid) == []
    manager.kill_all()
    cold = tmp_path / "cold"
    cold.touch()
    (tmp_path / "sitecustomize.py").write_text(NOT_THERE.format(str(cold)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    manager.start()
    assert missing_code(manager.process.pid) != []
    with (manager.mountpoint / "swap").open("rb", buffering=0) as swap:
        assert os.pread(swap.fileno(), 4096, 8192) == PAGE
    cold.unlink()
    for pid in (manager.process.pid, *system.children(manager.process.pid)):
        wait_for(
            lambda pid=pid: not missing_code(pid),
            f"the code of {system.name(pid)} is not in memory",
        )
    manager.process.terminate()
    assert manager.process.wait(20) == 0
