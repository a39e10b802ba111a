# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of a device from how its requests end.

Whether it is in trouble, and which slots are better left alone.

A slot that failed is avoided for a while. After TROUBLE failed requests in a row of a kind, or
while one takes longer than STALL_S, the device is in trouble, until a probe finds that it works. A
probe does what failed: a device whose reads fail is in trouble until the label can be read, one
whose writes fail until the label can be written. So the trouble is shown as long as its cause
lasts, and at most PROBE_S and one request longer.

A device that is out of space is in trouble after one request, and until the slots of that one can
be written: what has a block already can be written all the time, the label too, and would say that
all is well between any two pages that find none.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TROUBLE = 3
"""Failed requests in a row after which the device is taken for broken."""
PROBE_S = 1.0
"""Time between two tries while it is."""
STALL_S = 2.0
"""A request that takes longer is a stall."""
AVOID_S = 60.0
"""How long a slot that failed is left alone."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Health:
    """A device's.

    Args:
        clock: seconds.

    Attributes:
        no_space_for: slots of a request that found no space, none of which was written since.
        avoided: until when slots that failed are left alone.
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
        """Whether requests fail, and it is not the slots."""
        return bool(self.no_space_for) or max(self._failures.values()) >= TROUBLE

    @property
    def read_failures(self) -> int:
        """How many reads have failed in a row."""
        return self._failures["read"]

    def trouble(self, oldest: float | None) -> str:
        """Say what is wrong, as words for a person; nothing if all is well.

        Args:
            oldest: when the oldest request that is under way was begun; None if there is none.
        """
        if self.is_failing:
            return f"requests fail: {os.strerror(self._last_error)}"
        if oldest is not None and (late := self._clock() - oldest) > STALL_S:
            return f"a request has taken {late:.0f} s"
        return ""

    def avoids(self, slot: int) -> bool:
        """Say whether a slot failed a short while ago."""
        return bool(self.avoided) and self.avoided.get(slot, 0.0) > self._clock()

    def avoided_slots(self) -> int:
        """Return how many slots are left alone, and forget those that are not any more."""
        now = self._clock()
        self.avoided = {slot: until for slot, until in self.avoided.items() if until > now}
        return len(self.avoided)

    def note_read(self, code: int) -> None:
        """Take note of how a read has ended.

        A device that can be read may still refuse every write.
        """
        self._note("read", code)

    def note_write(self, slots: range, code: int) -> None:
        """Take note of how a write has ended."""
        if code in _FULL:
            self.no_space_for = slots
        elif slots.start < self.no_space_for.stop and self.no_space_for.start < slots.stop:
            self.no_space_for = range(
                0
            )  # a probe writes there, which must not follow a newer write
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
        """Say so once in PROBE_S while it fails."""
        now = self._clock()
        if not self.is_failing or now < self._next_probe:
            return False
        self._next_probe = now + PROBE_S
        return True

    @property
    def reads_fail(self) -> bool:
        """Whether reads fail, so that a probe has to read."""
        return self._failures["read"] >= TROUBLE

    def note_probe(self, code: int, *, writes: bool) -> None:
        """Take note of how a probe has ended.

        Args:
            code: 0 or an errno.
            writes: the probe was a write.
        """
        if code:
            self._last_error = code
            return
        self._failures["write" if writes else "read"] = 0
        if writes:
            self.no_space_for = range(0)
        if not self.is_failing:
            self.avoided.clear()
