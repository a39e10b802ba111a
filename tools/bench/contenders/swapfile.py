# SPDX-License-Identifier: GPL-2.0-or-later
"""What people have without any of this: a file on the disk as swap; behind a loop device.

On a disk that is slow.

The slow disk is nbdkit's delay filter, one request at a time, as a disk with an arm has it: 5 ms
for each, whatever its size (some 200 requests a second; up to 128 KiB of neighbours in one). Its
data lies in memory, so that nothing but the delay is slow.
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
    """A file below /var/tmp, swapped on by itself, without a loop device."""

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
        """Allocate the file and swap on."""
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
        """Swap off, remove the file."""
        if self._file is not None:
            system.swap_off(self._file)
        self._remove()

    def _remove(self) -> None:
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
            self._file = None


class LoopFile(SwapFile):
    """The same behind a loop device.

    What that alone costs on a disk, whatever else stands behind it.
    """

    name: ClassVar[str] = "file-loop"

    def __init__(self) -> None:
        super().__init__()
        self._device: str | None = None

    def start(self, size: int) -> None:
        """Allocate the file, attach it, swap on."""
        self._allocate(size)
        assert self._file is not None
        self._device = system.attach_loop(self._file)
        system.swap_on(self._device)

    def devices(self) -> list[str]:
        """Return the path of its device, while there is one."""
        return [self._device] if self._device is not None else []

    def stop(self) -> None:
        """Swap off, detach, remove the file."""
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
        """Return nothing: what holds the data stands for a disk."""
        return MemoryUse(0)

    def processes(self) -> list[int]:
        """Return nothing, for the same reason."""
        return []


class NoSwap(Contender):
    """No swap at all: what everything is measured against where there is no pressure."""

    name: ClassVar[str] = "none"

    def missing(self) -> str:
        """Return an empty string: it is always there."""
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
