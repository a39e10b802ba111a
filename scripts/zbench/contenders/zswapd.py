# SPDX-License-Identifier: GPL-2.0-or-later
"""zswapd itself, as its user runs it."""

from __future__ import annotations

from typing import ClassVar

from .. import system
from ..daemon import Daemon, program
from .base import Contender, MemoryUse


class Zswapd(Contender):
    """A daemon on default settings but for size and priority, swapped on by zswapctl."""

    name: ClassVar[str] = "zswapd"

    def __init__(self) -> None:
        self._daemon: Daemon | None = None
        self._peak = 0

    def missing(self) -> str:
        """Return why it does not even start, or an empty string."""
        try:
            system.run(*program("zswapctl"), "--help")
        except system.HarnessError as exc:
            return str(exc)
        return ""

    def start(self, size: int) -> None:
        """Start the daemon, swap on."""
        settings = {"swap.priority": str(system.HIGHEST_PRIORITY)}
        self._daemon = Daemon(size=f"{size // system.MIB}M", settings=settings)
        self._daemon.start()
        self._daemon.swapon()

    def memory_used(self) -> MemoryUse:
        """Return the PSS of all its processes, and what it says about its pool."""
        if self._daemon is None:
            return MemoryUse(0)
        total = sum(system.process_memory(pid).pss for pid in system.children(self._daemon.pid))
        self._peak = max(self._peak, total)
        sample = self._daemon.pool_sample()
        return MemoryUse(total, sample.pool_bytes, sample.stored_bytes, self._peak, self._daemon.ask("stats"))

    def stop(self) -> None:
        """Swap off, stop the daemon."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None
