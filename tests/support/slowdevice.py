# SPDX-License-Identifier: GPL-2.0-or-later
"""Slow and failing files: nbdkit's delay and error filters behind a file of nbdfuse."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.mounting import TIMEOUT, is_mounted


def missing() -> str:
    """Return which program is not installed, or an empty string."""
    return ", ".join(name for name in ("nbdkit", "nbdfuse") if shutil.which(name) is None)


class SlowFile:
    """A file of nbdfuse with slow reads.

    Attributes:
        path: the file.
        error_file: while it exists, reads fail with EIO.
    """

    def __init__(self, directory: Path, contents: Path, *, delay_ms: int) -> None:
        self.directory = directory
        self.mountpoint = directory / "nbd"
        self.mountpoint.mkdir(parents=True)
        self.path = self.mountpoint / "disk"
        self.error_file = directory / "fail"
        ready = directory / "ready"
        command = ["nbdfuse", "-P", str(ready), str(self.path), "--command"]
        command += [
            "nbdkit",
            "-s",
            "--filter=error",
            "--filter=delay",
            "file",
            str(contents),
            f"rdelay={delay_ms}ms",
        ]
        command += [
            "error-pread=EIO",
            "error-pread-rate=100%",
            f"error-pread-file={self.error_file}",
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + TIMEOUT
        while not ready.exists():
            assert self.process.poll() is None, "nbdfuse has ended"
            assert time.monotonic() < end, "nbdfuse does not come up"
            time.sleep(0.02)

    def stop(self) -> None:
        """Unmount; both programs end with the mount."""
        if is_mounted(self.mountpoint):
            subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=False, timeout=TIMEOUT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        self.process.wait(TIMEOUT)


@contextlib.contextmanager
def slow_file(directory: Path, contents: Path, *, delay_ms: int = 5) -> Iterator[SlowFile]:
    """Show `contents` as a file that answers each read after `delay_ms`, while the body runs."""
    file = SlowFile(directory, contents, delay_ms=delay_ms)
    try:
        yield file
    finally:
        file.stop()
