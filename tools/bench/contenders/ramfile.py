# SPDX-License-Identifier: GPL-2.0-or-later
"""The cost of the kernel's part: a loop device on a file in memory.

It has no compression, no FUSE and no process. It is not a rival but the upper limit: nothing behind
a loop device is faster than the loop driver's own copy of the page. It keeps the data uncompressed,
so its memory figure means nothing.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import ClassVar

from tools.bench.contenders.base import Contender, MemoryUse
from tools.bench.harness import system

TMPFS = Path("/dev/shm")


class LoopRam(Contender):
    """A sparse file in /dev/shm behind a loop device."""

    name: ClassVar[str] = "loop-ram"

    def __init__(self) -> None:
        self._file: Path | None = None
        self._device: str | None = None

    def missing(self) -> str:
        """Return why there is no file system in memory, or an empty string."""
        return "" if TMPFS.is_mount() else f"{TMPFS} is not mounted"

    def start(self, size: int) -> None:
        """Make the file, attach a loop device, and run swapon."""
        with tempfile.NamedTemporaryFile(prefix="zbench-", dir=TMPFS, delete=False) as file:
            file.truncate(size)
        self._file = Path(file.name)
        self._device = system.attach_loop(self._file)
        system.swap_on(self._device)

    def devices(self) -> list[str]:
        """Return the path of its device, while there is one."""
        return [self._device] if self._device is not None else []

    def memory_used(self) -> MemoryUse:
        """Return the memory of the file."""
        return MemoryUse(0 if self._file is None else self._file.stat().st_blocks * 512)

    def stop(self) -> None:
        """Run swapoff, detach the device, and remove the file."""
        if self._device is not None:
            system.swap_off(self._device)
            system.detach_loop(self._device)
            self._device = None
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
            self._file = None
