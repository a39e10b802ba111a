# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface of a contender.

A contender sets up one swap device, reports its memory, and removes it without a trace.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tools.bench.harness.system import process_memory

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The memory that a contender takes, in bytes.

    Attributes:
        total: all its memory: the PSS of a daemon, or the kernel's charge for a device. The
            comparison uses this.
        pool: the part that holds pages; 0 where it is unknown.
        stored: bytes of the stored objects in the pool; 0 where it is unknown.
        details: raw counters, for the JSON only.
    """

    total: int
    pool: int = 0
    stored: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


class Contender(abc.ABC):
    """One swap device under test, used once: start, measurements, stop."""

    name: ClassVar[str]

    @abc.abstractmethod
    def missing(self) -> str:
        """Return why this machine cannot run the contender, or an empty string."""

    @abc.abstractmethod
    def start(self, size: int) -> None:
        """Set up a swap device of `size` bytes with the highest priority.

        The device has discard if it learns of free slots that way.

        Raises:
            HarnessError: the device does not come up; the caller still has to call `stop`.
        """

    @abc.abstractmethod
    def devices(self) -> list[str]:
        """Return the paths of its active swap areas."""

    @abc.abstractmethod
    def memory_used(self) -> MemoryUse:
        """Return its memory now, with all details; the caller calls it between phases only."""

    def memory_now(self) -> int:
        """Return the total of `memory_used` in bytes, at little cost, during a measurement."""
        each = self.processes()
        return sum(process_memory(pid).pss for pid in each) if each else self.memory_used().total

    def processes(self) -> list[int]:
        """Return the ids of the processes that serve the device; none for a kernel device."""
        return []

    @abc.abstractmethod
    def stop(self) -> None:
        """Run swapoff and remove every trace, also after a failed or half-done start.

        Raises:
            HarnessError: something is left; the message names it.
        """
