# SPDX-License-Identifier: GPL-2.0-or-later
"""The nearest rival in user space: nbdkit's RAM disk with zstd.

nbdfuse shows the disk as a file, and a loop device is attached to the file. The chain below the
loop device is the same as zswapd's: kernel, FUSE, a process that compresses. It is all in C, and
its two processes talk the network block device protocol.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from pathlib import Path
from typing import ClassVar

from tools.bench.contenders.base import Contender, MemoryUse
from tools.bench.harness import system

START_LIMIT_S = 15.0


class NbdkitZstd(Contender):
    """`nbdfuse` with `nbdkit memory allocator=zstd` as its child, in a directory of its own."""

    name: ClassVar[str] = "nbdkit-zstd"
    plugin: ClassVar[tuple[str, ...]] = ("memory",)
    options: ClassVar[tuple[str, ...]] = ("allocator=zstd",)

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._device: str | None = None

    @staticmethod
    def missing_programs() -> str:
        """Return which program is not installed, or an empty string."""
        absent = system.missing_programs(["nbdkit", "nbdfuse", "fusermount3", "losetup"])
        return (
            f"{', '.join(absent)} not installed (apt-get install nbdkit libnbd-bin fuse3)"
            if absent
            else ""
        )

    def missing(self) -> str:
        """Return why the rival cannot run here, or an empty string."""
        if absent := self.missing_programs():
            return absent
        try:
            plugin = system.run("nbdkit", "memory", "--dump-plugin")
        except system.HarnessError as exc:
            return str(exc)
        return "" if "zstd=yes" in plugin else "this nbdkit was built without zstd"

    def start(self, size: int) -> None:
        """Start both processes, attach a loop device to the file, and run swapon."""
        system.swap_on(self.attach(size))

    def attach(self, size: int) -> str:
        """Start both processes and attach a loop device to the file; return the device."""
        self._directory = Path(tempfile.mkdtemp(prefix="zbench-nbdkit-"))
        ready = self._directory / "ready"
        mountpoint = self._directory / "mnt"
        mountpoint.mkdir()
        command = ["nbdfuse", "-P", str(ready), str(mountpoint / "nbd"), "--command"]
        command += ["nbdkit", "-s", *self.plugin, str(size), *self.options]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + START_LIMIT_S
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                words = (self._directory / "log").read_text().strip()
                raise system.HarnessError(f"nbdfuse does not come up: {words or 'no message'}")
            time.sleep(0.05)
        self._device = system.attach_loop(mountpoint / "nbd")
        return self._device

    def devices(self) -> list[str]:
        """Return the path of its device, while there is one."""
        return [self._device] if self._device is not None else []

    def memory_used(self) -> MemoryUse:
        """Return the PSS of both processes; the size of the pool alone is unknown."""
        each = {pid: system.process_memory(pid) for pid in self.processes()}
        total = sum(memory.pss for memory in each.values())
        return MemoryUse(total, details={str(pid): memory.pss for pid, memory in each.items()})

    def processes(self) -> list[int]:
        """Return the process ids of nbdfuse and nbdkit."""
        return system.children(self._process.pid) if self._process is not None else []

    def stop(self) -> None:
        """Run swapoff, detach, unmount; both processes end with the mount."""
        if self._device is not None:
            system.swap_off(self._device)
            system.detach_loop(self._device)
            self._device = None
        if self._directory is None:
            return
        for mountpoint, _ in system.mounts_below(self._directory):
            system.unmount(mountpoint)
        if self._process is not None:
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(timeout=10)
        with contextlib.suppress(FileNotFoundError):
            for name in ("ready", "log"):
                (self._directory / name).unlink()
            (self._directory / "mnt").rmdir()
            self._directory.rmdir()
        self._directory = None
