# SPDX-License-Identifier: GPL-2.0-or-later
"""`fileserver.py` as a subprocess behind a real mount, and loop devices over it.

The end of a test, failed or not, removes both.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support import TOP

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16  # fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)

TIMEOUT = 30  # seconds for anything that takes a fraction of one

ALLOCATORS = ["zsmalloc,zbud", "zsmalloc,zsmalloc", "zbud,zbud", "zbud,zsmalloc"]
"""All choices for swap and the cache, in the form of fileserver.py's --allocators."""


class FileServer:
    """A running (or failed) file server.

    Attributes:
        mountpoint: the mountpoint.
        path: the path of the file.
        first: its first message: ready, or the error that stopped it.
        last: its last message, after `stop`: statistics and discards.
        log: its stderr, after `stop`.
    """

    def __init__(self, mountpoint: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        self.mountpoint = mountpoint
        self.path = mountpoint / "swap"
        self.last: dict[str, Any] = {}
        self.log = ""
        command = [
            *prefix,
            sys.executable,
            "-m",
            "tests.support.fileserver",
            str(mountpoint),
            *options,
        ]
        self.process = subprocess.Popen(
            command,
            cwd=TOP,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log = self.process.communicate(timeout=TIMEOUT)[1]
            raise AssertionError(f"the file server said nothing and ended: {self.log}")
        self.first: dict[str, Any] = json.loads(line)

    def stop(self) -> dict[str, Any]:
        """End the server with SIGTERM and return its last message; further calls return it too."""
        if not self.log and not self.last:
            if self.process.poll() is None and "error" not in self.first:
                self.process.terminate()
            out, self.log = self.process.communicate(timeout=TIMEOUT)
            self.last = json.loads(out) if out else {}
        return self.last

    def ask(self, *words: str) -> dict[str, Any]:
        """Send a command about volumes; return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the server runs."""
        return self.process.poll()


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Call fallocate(2), which Python does not have; return 0 or the errno."""
    result = _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))
    return 0 if result == 0 else ctypes.get_errno()


def is_mounted(path: Path) -> bool:
    """Return whether `path` is a mountpoint, without a call to its file system."""
    return any(
        line.split()[4] == str(path)
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )


@contextlib.contextmanager
def serving(mountpoint: Path, *options: str, prefix: Sequence[str] = ()) -> Iterator[FileServer]:
    """Run a file server while the body runs; remove its process and its mount."""
    server: FileServer | None = None
    try:
        server = FileServer(mountpoint, *options, prefix=prefix)
        yield server
        server.stop()
    finally:
        if server is not None:
            server.process.kill()
            server.process.wait(TIMEOUT)
            for pipe in (server.process.stdin, server.process.stdout, server.process.stderr):
                if pipe is not None:
                    pipe.close()
        if is_mounted(mountpoint):
            subprocess.run(["umount", "--lazy", str(mountpoint)], check=False, timeout=TIMEOUT)


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """Attach a loop device as zswapctl does."""
    command = ["losetup", "--find", "--show", "--direct-io=on", "--sector-size=4096", str(path)]
    name = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=TIMEOUT
    ).stdout.strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "--detach", name], check=True, timeout=TIMEOUT)
