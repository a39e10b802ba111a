# SPDX-License-Identifier: GPL-2.0-or-later
"""The health of a device, as its requests show it: is it in trouble, and which slots to avoid.

A slot that failed is avoided for AVOID_S. The device is in trouble after TROUBLE failed reads or
writes in a row, or while one request takes longer than STALL_S. The trouble ends when a probe
succeeds. A probe repeats what failed. Failing reads are probed by a read of the label, failing
writes by a write of it. So the trouble lasts as long as its cause, plus at most PROBE_S and one
request.

One request without space puts the device in trouble until the slots of that request can be
written. The label is no test here: a block that is already allocated can always be written. A
probe of it would report success between any two pages that find no space.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TROUBLE = 3
"""Failed requests in a row after which the device counts as broken."""
PROBE_S = 1.0
"""Time between two probes, in seconds."""
STALL_S = 2.0
"""A request that takes longer than this many seconds is a stall."""
AVOID_S = 60.0
"""How long a slot that failed is avoided, in seconds."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Health:
    """The health of one device.

    Args:
        clock: returns seconds.

    Attributes:
        no_space_for: slots of the last request that found no space; empty once one is written.
        avoided: slots that failed, each with the time until which it is avoided.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = {"read": 0, "write": 0}
        self.no_space_for = range(0)
        self.avoided: dict[int, float] = {}
        self._last_error = 0
        self._next_probe = 0.0

    @property
    def is_failing(self) -> bool:
        """Whether the device fails, and not just single slots."""
        return bool(self.no_space_for) or max(self._failures.values()) >= TROUBLE

    @property
    def read_failures(self) -> int:
        """How many reads have failed in a row."""
        return self._failures["read"]

    def trouble(self, oldest: float | None) -> str:
        """Return a description of the trouble, or an empty string if the device works.

        Args:
            oldest: start time of the oldest request under way; None if there is none.
        """
        if self.is_failing:
            return f"requests fail: {os.strerror(self._last_error)}"
        if oldest is not None and (late := self._clock() - oldest) > STALL_S:
            return f"a request has taken {late:.0f} s"
        return ""

    def avoids(self, slot: int) -> bool:
        """Say whether a slot failed within the last AVOID_S."""
        return bool(self.avoided) and self.avoided.get(slot, 0.0) > self._clock()

    def avoided_slots(self) -> int:
        """Return how many slots are avoided, and forget those whose time is over."""
        now = self._clock()
        self.avoided = {slot: until for slot, until in self.avoided.items() if until > now}
        return len(self.avoided)

    def note_read(self, code: int) -> None:
        """Record the result of a read.

        A successful read does not clear failed writes: a readable device may refuse every write.
        """
        self._note("read", code)

    def note_write(self, slots: range, code: int) -> None:
        """Record the result of a write."""
        if code in _FULL:
            self.no_space_for = slots
        elif slots.start < self.no_space_for.stop and self.no_space_for.start < slots.stop:
            # A probe writes to these slots, and must not overwrite newer data.
            self.no_space_for = range(0)
        self._note("write", code)
        if not code and self.avoided:
            for slot in slots:
                self.avoided.pop(slot, None)
        if code and not self.is_failing:
            self.avoided.update(dict.fromkeys(slots, self._clock() + AVOID_S))

    def _note(self, kind: str, code: int) -> None:
        if not code:
            self._failures[kind] = 0
            return
        self._failures[kind] += 1
        self._last_error = code
        self._next_probe = self._clock() + PROBE_S

    def is_time_to_probe(self) -> bool:
        """Say whether a probe is due: once in PROBE_S while the device fails."""
        now = self._clock()
        if not self.is_failing or now < self._next_probe:
            return False
        self._next_probe = now + PROBE_S
        return True

    @property
    def reads_fail(self) -> bool:
        """Whether reads fail. Then a probe has to read."""
        return self._failures["read"] >= TROUBLE

    def note_probe(self, code: int, *, writes: bool) -> None:
        """Record the result of a probe.

        Args:
            code: 0 or an errno.
            writes: whether the probe was a write.
        """
        if code:
            self._last_error = code
            return
        self._failures["write" if writes else "read"] = 0
        if writes:
            self.no_space_for = range(0)
        if not self.is_failing:
            self.avoided.clear()
