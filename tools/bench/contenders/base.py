# SPDX-License-Identifier: GPL-2.0-or-later
"""What a contender is: it puts one swap device on, tells its memory.

And takes it off without a trace.
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
    """Memory that a contender takes, in bytes.

    Attributes:
        total: all it costs: for a daemon its PSS, for a kernel device what the kernel charges to
            it. This is what is compared.
        pool: the part that holds pages; 0 where it cannot be told apart.
        stored: bytes of the stored objects in that pool; 0 where it is not told.
        details: raw counters, for the JSON only.
    """

    total: int
    pool: int = 0
    stored: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


class Contender(abc.ABC):
    """One swap device under test. Used once: start, measurements, stop."""

    name: ClassVar[str]

    @abc.abstractmethod
    def missing(self) -> str:
        """Return why this machine cannot run it, or an empty string."""

    @abc.abstractmethod
    def start(self, size: int) -> None:
        """Put a swap device of `size` bytes on, with the highest priority.

        And discard if it learns of free slots that way.

        Raises:
            HarnessError: it does not come up. `stop` is called all the same.
        """

    @abc.abstractmethod
    def devices(self) -> list[str]:
        """Return the paths of what it has swapped on."""

    @abc.abstractmethod
    def memory_used(self) -> MemoryUse:
        """Return what it takes now, with all there is to know; called between phases only."""

    def memory_now(self) -> int:
        """Return the total of `memory_used`, bytes, at little cost.

        Called while something is measured.
        """
        each = self.processes()
        return sum(process_memory(pid).pss for pid in each) if each else self.memory_used().total

    def processes(self) -> list[int]:
        """Return the ids of the processes that serve it, none if that is the kernel alone."""
        return []

    @abc.abstractmethod
    def stop(self) -> None:
        """Swap off and remove every trace; also after a failed or half-done start.

        Raises:
            HarnessError: something is left; the message says what.
        """
