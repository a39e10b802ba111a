# SPDX-License-Identifier: GPL-2.0-or-later
"""The contender zswapd, as a user runs it."""

from __future__ import annotations

from typing import ClassVar

from tools.bench.contenders.base import Contender, MemoryUse
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon, program


class Zswapd(Contender):
    """A daemon with default settings except size and priority; zswapctl runs swapon."""

    name: ClassVar[str] = "zswapd"
    files: ClassVar[int] = 1

    def __init__(self) -> None:
        self._daemon: Daemon | None = None

    def missing(self) -> str:
        """Return why zswapctl does not start, or an empty string."""
        try:
            system.run(*program("zswapctl"), "--help")
        except system.HarnessError as exc:
            return str(exc)
        return ""

    def start(self, size: int) -> None:
        """Start the daemon and run swapon for all files, at one priority.

        The kernel then spreads the pages over the files in turn.
        """
        each = f"{size // system.MIB // self.files}M"
        more = [f"file{number}" for number in range(1, self.files)]
        settings = {
            "swap.priority": str(system.HIGHEST_PRIORITY),
            **{f"swap.files.{name}": each for name in more},
        }
        self._daemon = Daemon(size=each, settings=settings)
        self._daemon.start()
        self._daemon.swapon()
        for name in more:
            self._daemon.swapon(name)

    def devices(self) -> list[str]:
        """Return the loop devices on its files."""
        return self._daemon.loops() if self._daemon is not None else []

    def memory_used(self) -> MemoryUse:
        """Return the PSS of all its processes, and its own figures of the pool."""
        if self._daemon is None:
            return MemoryUse(0)
        sample = self._daemon.pool_sample()
        return MemoryUse(
            self.memory_now(), sample.pool_bytes, sample.stored_bytes, self._daemon.ask("stats")
        )

    def processes(self) -> list[int]:
        """Return the process ids of supervisor, worker and spare."""
        return (
            system.children(self._daemon.pid)
            if self._daemon is not None and self._daemon.alive()
            else []
        )

    def stop(self) -> None:
        """Run swapoff and stop the daemon."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None


class ZswapdTwo(Zswapd):
    """One daemon with two swap files, each half the size."""

    name: ClassVar[str] = "zswapd-2"
    files: ClassVar[int] = 2


class ZswapdFour(Zswapd):
    """One daemon with four swap files."""

    name: ClassVar[str] = "zswapd-4"
    files: ClassVar[int] = 4
