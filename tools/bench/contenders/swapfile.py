# SPDX-License-Identifier: GPL-2.0-or-later
"""Plain swap: a file on the disk, a file behind a loop device, a file on a slow disk, no swap.

The slow disk is nbdkit's delay filter. Like a disk with an arm, it takes one request at a time and
5 ms for each, whatever its size. That is about 200 requests a second, each of up to 128 KiB. Its
data is in memory, so only the delay is slow.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import ClassVar

from tools.bench.contenders.base import Contender, MemoryUse
from tools.bench.contenders.nbdkit import NbdkitZstd
from tools.bench.harness import system

PLACE = Path("/var/tmp")
DELAY_MS = 5


class SwapFile(Contender):
    """A swap file below /var/tmp, without a loop device."""

    name: ClassVar[str] = "file"

    def __init__(self) -> None:
        self._file: Path | None = None

    def missing(self) -> str:
        """Return why there can be no swap file here, or an empty string."""
        kind = system.run("stat", "-f", "-c", "%T", PLACE).strip()
        return (
            f"{PLACE} is on {kind}, which takes no swap file"
            if kind in {"tmpfs", "overlayfs", "fuseblk", "nfs"}
            else ""
        )

    def start(self, size: int) -> None:
        """Allocate the file and run swapon."""
        self._allocate(size)
        system.swap_on(self.devices()[0])

    def _allocate(self, size: int) -> None:
        with tempfile.NamedTemporaryFile(prefix="zbench-", dir=PLACE, delete=False) as file:
            self._file = Path(file.name)
        system.run("fallocate", "--length", str(size), self._file)

    def devices(self) -> list[str]:
        """Return the path of the file, while there is one."""
        return [str(self._file)] if self._file is not None else []

    def memory_used(self) -> MemoryUse:
        """Return nothing: the pages are on the disk."""
        return MemoryUse(0)

    def stop(self) -> None:
        """Run swapoff and remove the file."""
        if self._file is not None:
            system.swap_off(self._file)
        self._remove()

    def _remove(self) -> None:
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
            self._file = None


class LoopFile(SwapFile):
    """A swap file behind a loop device; it shows the cost of the loop device alone."""

    name: ClassVar[str] = "file-loop"

    def __init__(self) -> None:
        super().__init__()
        self._device: str | None = None

    def start(self, size: int) -> None:
        """Allocate the file, attach a loop device, and run swapon."""
        self._allocate(size)
        assert self._file is not None
        self._device = system.attach_loop(self._file)
        system.swap_on(self._device)

    def devices(self) -> list[str]:
        """Return the path of its device, while there is one."""
        return [self._device] if self._device is not None else []

    def stop(self) -> None:
        """Run swapoff, detach the device, and remove the file."""
        if self._device is not None:
            system.swap_off(self._device)
            system.detach_loop(self._device)
            self._device = None
        self._remove()


class SlowFile(NbdkitZstd):
    """A swap file on a disk that takes `DELAY_MS` for each request."""

    name: ClassVar[str] = "file-slow"
    plugin: ClassVar[tuple[str, ...]] = ("--filter=noparallel", "--filter=delay", "memory")
    options: ClassVar[tuple[str, ...]] = (
        "serialize=requests",
        f"rdelay={DELAY_MS}ms",
        f"wdelay={DELAY_MS}ms",
    )

    def missing(self) -> str:
        """Return which of the programs is not installed, or an empty string."""
        return self.missing_programs()

    def memory_used(self) -> MemoryUse:
        """Return nothing: the process that holds the data stands for a disk."""
        return MemoryUse(0)

    def processes(self) -> list[int]:
        """Return nothing: the process stands for a disk."""
        return []


class NoSwap(Contender):
    """No swap: the baseline where there is no memory pressure."""

    name: ClassVar[str] = "none"

    def missing(self) -> str:
        """Return an empty string: no swap is always possible."""
        return ""

    def start(self, size: int) -> None:
        """Do nothing."""

    def devices(self) -> list[str]:
        """Return nothing."""
        return []

    def memory_used(self) -> MemoryUse:
        """Return nothing."""
        return MemoryUse(0)

    def stop(self) -> None:
        """Do nothing."""
