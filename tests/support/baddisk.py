# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk that fails on command, and a disk that is larger than its room.

    loop device ── nbdfuse ── nbdkit: error, pause, retry ── nbdkit: the disk's data

A test can kill the last nbdkit and start it again. To the other programs this is a device that goes
and comes back (`--filter=retry` opens it again). The delay filter makes every request slow from the
start. The pause filter stalls requests on command. The loop device makes the file a block device
with direct I/O, which a file of nbdfuse does not have.

The disk that is larger than its room is a loop device over a sparse file, on a file system that is
too small.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.mounting import TIMEOUT, is_mounted


def missing() -> str:
    """Return which program is not installed, or an empty string."""
    return ", ".join(name for name in ("nbdkit", "nbdfuse") if shutil.which(name) is None)


class BadDisk:
    """A disk of `mib` MiB.

    Attributes:
        device: the block device.
        read_errors, write_errors: while the file exists, requests of this kind fail with EIO.
    """

    def __init__(self, directory: Path, mib: int, *, delay_ms: int = 0) -> None:
        directory.mkdir()
        self._contents = directory / "contents"
        with self._contents.open("wb") as file:
            file.truncate(mib << 20)
        self._server = directory / "server"
        self._control = directory / "pause"
        self._mountpoint = directory / "nbd"
        self._mountpoint.mkdir()
        self.read_errors, self.write_errors = directory / "read-errors", directory / "write-errors"
        self._far: subprocess.Popen[bytes] | None = None
        self.device = Path()
        self.come_back()
        filters = ["--filter=error", "--filter=delay", "--filter=pause", "--filter=retry"]
        command = [
            "nbdfuse",
            "-P",
            str(directory / "ready"),
            str(self._mountpoint / "disk"),
            "--command",
        ]
        command += [
            "nbdkit",
            "-s",
            *filters,
            "nbd",
            f"socket={self._server}",
            f"pause-control={self._control}",
        ]
        command += [
            "retries=1",
            "retry-delay=1",
            "retry-exponential=no",
            f"rdelay={delay_ms}ms",
            f"wdelay={delay_ms}ms",
        ]
        for kind, trigger in (("pread", self.read_errors), ("pwrite", self.write_errors)):
            command += [
                f"error-{kind}=EIO",
                f"error-{kind}-rate=100%",
                f"error-{kind}-file={trigger}",
            ]
        self._near = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._wait(directory / "ready", self._near)
        command = [
            "losetup",
            "--find",
            "--show",
            "--direct-io=on",
            "--sector-size=4096",
            str(self._mountpoint / "disk"),
        ]
        self.device = Path(
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=TIMEOUT
            ).stdout.strip()
        )

    def _wait(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + TIMEOUT
        while not path.exists():
            assert process.poll() is None, "nbdkit has ended"
            assert time.monotonic() < end, "nbdkit does not come up"
            time.sleep(0.02)

    def vanish(self) -> None:
        """Remove the disk."""
        assert self._far
        self._far.kill()
        self._far.wait(TIMEOUT)
        self._server.unlink()

    def come_back(self) -> None:
        """Bring the disk back, with its data."""
        command = [
            "nbdkit",
            "--foreground",
            "--unix",
            str(self._server),
            "file",
            str(self._contents),
        ]
        self._far = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._wait(self._server, self._far)

    def _tell(self, what: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(TIMEOUT)
            control.connect(str(self._control))
            control.sendall(what)
            control.recv(1)

    def pause(self) -> None:
        """Stall all further requests."""
        self._tell(b"p")

    def resume(self) -> None:
        """Let stalled requests go on."""
        self._tell(b"r")

    def heal(self) -> None:
        """Make stalled and further requests fail."""
        for trigger in (self.read_errors, self.write_errors):
            trigger.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.resume()

    def stop(self) -> None:
        """Stop all programs and detach the device, whatever their state."""
        self.heal()
        if self.device != Path():
            subprocess.run(["losetup", "--detach", str(self.device)], check=False, timeout=TIMEOUT)
        if is_mounted(self._mountpoint):
            subprocess.run(
                ["umount", "--lazy", str(self._mountpoint)], check=False, timeout=TIMEOUT
            )
        for process in (self._near, self._far):
            if process:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2 if process is self._near else 0)
                process.kill()
                process.wait(TIMEOUT)


@contextlib.contextmanager
def bad_disk(directory: Path, mib: int, *, delay_ms: int = 0) -> Iterator[BadDisk]:
    """Provide a disk that fails on command, while the body runs."""
    disk = BadDisk(directory, mib, delay_ms=delay_ms)
    try:
        yield disk
    finally:
        disk.stop()


class SparseDisk:
    """A disk that is larger than its room.

    Attributes:
        device: the block device.
    """

    def __init__(self, directory: Path, device: Path) -> None:
        self.device = device
        self._directory = directory

    def grow(self, mib: int) -> None:
        """Set the room to a number of MiB."""
        subprocess.run(
            ["mount", "-o", f"remount,size={mib}M", str(self._directory)],
            check=True,
            timeout=TIMEOUT,
        )


@contextlib.contextmanager
def sparse_disk(directory: Path, mib: int, room_mib: int) -> Iterator[SparseDisk]:
    """Provide a disk of `mib` MiB with room for `room_mib` MiB, while the body runs."""
    directory.mkdir()
    # The tmpfs must not be swapped out, because it may be behind the swap.
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room_mib}M,noswap", "tmpfs", str(directory)]
    subprocess.run(mount, check=True, timeout=TIMEOUT)
    try:
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(mib << 20)
        command = ["losetup", "--find", "--show", "--sector-size=4096", str(image)]
        device = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT
        ).stdout.strip()
        try:
            yield SparseDisk(directory, Path(device))
        finally:
            subprocess.run(["losetup", "--detach", device], check=True, timeout=TIMEOUT)
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=TIMEOUT)
