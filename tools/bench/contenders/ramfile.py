# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel's part of the way costs.

A loop device on a file in memory, no compression, no FUSE, no process.

Not a rival but the ceiling: nothing behind a loop device can be faster than a copy of the page in
the loop driver's own worker. It keeps the data in full, so its memory says nothing.
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
    """A sparse file in /dev/shm, attached as the others are."""

    name: ClassVar[str] = "loop-ram"

    def __init__(self) -> None:
        self._file: Path | None = None
        self._device: str | None = None

    def missing(self) -> str:
        """Return why there is no file system in memory here, or an empty string."""
        return "" if TMPFS.is_mount() else f"{TMPFS} is not mounted"

    def start(self, size: int) -> None:
        """Make the file, attach it, swap on."""
        with tempfile.NamedTemporaryFile(prefix="zbench-", dir=TMPFS, delete=False) as file:
            file.truncate(size)
        self._file = Path(file.name)
        self._device = system.attach_loop(self._file)
        system.swap_on(self._device)

    def devices(self) -> list[str]:
        """Return the path of its device, while there is one."""
        return [self._device] if self._device is not None else []

    def memory_used(self) -> MemoryUse:
        """Return what the file takes."""
        return MemoryUse(0 if self._file is None else self._file.stat().st_blocks * 512)

    def stop(self) -> None:
        """Swap off, detach, remove the file."""
        if self._device is not None:
            system.swap_off(self._device)
            system.detach_loop(self._device)
            self._device = None
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
            self._file = None
