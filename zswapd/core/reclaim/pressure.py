# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory pressure of the system, by the kernel's own measures: watermarks, PSI, cgroup limits.

*Watermarks* tell how soon an allocation has to wait. Below `low` kswapd runs, above `high` it
sleeps. Free pages that a zone protects from ordinary allocations (lowmem_reserve) do not count.
Otherwise the idle DMA zone would hide every shortage.

*PSI* tells that tasks did wait. A trigger (Documentation/accounting/psi.rst) reports it at once.
Without CAP_SYS_RESOURCE the kernel accepts only windows of whole 2 s. Before Linux 5.2 and with
psi=0 there are no triggers. `psi` tells this, and only the watermarks are left. PSI also contains
stalls of a memory cgroup at its own limit, and freeing memory does not end those.

*Limits* of the memory cgroups above this process (host/cgroups.py) act like a watermark. The
headroom below a limit is its high mark, and half of the headroom is its low mark.

`Pressure` opens its files once. The kernel keeps their buffers, so a further read needs no memory
of the kernel. The module functions open files, which allocates in the kernel. The thread that
serves pages must not call them.
"""

from __future__ import annotations

import mmap
import os
import re
import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd import counters
from zswapd.host.cgroups import Limits, headroom

if TYPE_CHECKING:
    from collections.abc import Callable

_ZONE = re.compile(
    r"^Node \d+, zone +(\S+)\n.*?pages free +(\d+)\n.*?high +(\d+)\n", re.MULTILINE | re.DOTALL
)
_MARKS = re.compile(
    rb"pages free +(\d+)\n.*?low +(\d+)\n +high +(\d+)\n.*?managed +(\d+)\n.*?protection: \(([\d,"
    rb" ]*)\)",
    re.DOTALL,
)
_STALLS = re.compile(rb"^(some|full) avg10=([\d.]+) .*?total=(\d+)", re.MULTILINE)

TRIGGERS = (b"some 150000 1000000", b"some 300000 2000000")
"""PSI triggers: stall and window in µs. Each means that tasks waited for memory 15 % of the time.

The second one is allowed for an unprivileged process.
"""
STALLED = 0.15
"""The same share of the time, for `has_stalled`."""
_ROOM = 64 << 10
"""Bytes by which /proc/zoneinfo may grow while it is watched. Text beyond that is not seen."""


def spare_pages(root: Path = Path("/")) -> int:
    """Return the free pages above the high watermarks, summed over all zones that have any.

    The result is 0 if the kernel does not tell.

    Args:
        root: where /proc is, for tests.
    """
    try:
        text = (root / "proc/zoneinfo").read_text()
    except OSError:
        return 0
    return sum(max(0, int(free) - int(high)) for _zone, free, high in _ZONE.findall(text))


@dataclass(frozen=True, slots=True)
class Marks:
    """Free pages against the watermarks, at one moment.

    Attributes:
        above_low: pages by which the best zone is above its low watermark; negative if every zone
            is below its mark.
        above_high: likewise for the high watermark.
        spare: pages above the high watermarks, all zones together.
    """

    above_low: int
    above_high: int
    spare: int


@dataclass(frozen=True, slots=True)
class PressureStatistics:
    """The system's present pressure, and how often it was reported.

    Attributes:
        psi: `trigger` if the kernel reports stalls, `polling` if it has averages only, `absent`
            without PSI (then only the watermarks are used).
        some_avg10: share of the last 10 s in which at least one task waited for memory, percent.
        full_avg10: share of the last 10 s in which all tasks waited, percent.
        some_seconds: time for which at least one task waited, since boot.
        full_seconds: time for which all tasks waited, since boot.
        triggers: times that the threshold was exceeded, by the kernel's report or by its totals.
        spare_pages: free pages above the high watermarks.
        limit_bytes: limit of the memory cgroup above this process that leaves the least; 0 for
            none.
        limit_left_bytes: bytes that may still be charged to that cgroup.
    """

    psi: str
    some_avg10: float
    full_avg10: float
    some_seconds: float
    full_seconds: float
    triggers: int
    spare_pages: int
    limit_bytes: int
    limit_left_bytes: int


counters.declare(PressureStatistics, cumulative="triggers")


class Pressure:
    """The open files of the kernel's measures. It never raises: no file means no pressure.

    Args:
        root: where /proc is, for tests.
        clock: returns monotonic seconds; for tests.

    Attributes:
        psi: see PressureStatistics.
        descriptor: readable (by select or epoll) after the trigger has fired; -1 without a trigger.
        limits: limits of the memory cgroups above this process.
    """

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = Limits(root)
        self._zones = _open(root / "proc/zoneinfo", os.O_RDONLY)
        self._buffer = bytearray(_length(self._zones) + _ROOM)
        self._path = root / "proc/pressure/memory"
        self._stalls = _open(self._path, os.O_RDONLY)
        self._trigger = -1
        self._triggers = 0
        self._clock = clock
        self._seen = (clock(), self._totals()[0][1])
        self._waiter: select.epoll | None = None
        self.descriptor = -1
        self.psi = "absent"
        if self._read(self._stalls):
            self.psi = "polling"

    def arm(self) -> None:
        """Set up the trigger, so that `descriptor` reports tasks that wait for memory.

        Call it in a separate thread. For the first trigger the kernel starts a thread, and kthreadd
        may wait for memory. Only the thread that serves pages can free that memory.
        """
        for threshold in TRIGGERS if self.psi == "polling" else ():
            descriptor = _open(self._path, os.O_RDWR)
            if descriptor < 0:
                return
            # The file is always readable; only POLLPRI means the trigger. trio waits for readable
            # files, and an epoll with a pending event is readable.
            waiter = select.epoll()
            try:
                # epoll refuses an ordinary file here, before it is written to.
                waiter.register(descriptor, 0)
                waiter.unregister(descriptor)
                os.write(descriptor, threshold + b"\0")
                waiter.register(descriptor, select.EPOLLPRI)
            except OSError:
                waiter.close()
                os.close(descriptor)
                continue
            self._trigger, self._waiter = descriptor, waiter
            self.psi = "trigger"
            self.descriptor = waiter.fileno()
            return

    def take_trigger(self) -> None:
        """Count a trigger that `descriptor` has reported."""
        self._triggers += 1
        if self._waiter is not None:
            self._waiter.poll(0)

    def has_stalled(self) -> bool:
        """Say whether tasks waited for STALLED of the time since the last call.

        It stands in for a trigger.
        """
        now, waited = self._clock(), self._totals()[0][1]
        (before, waited_before), self._seen = self._seen, (now, waited)
        fired = waited - waited_before >= STALLED * (now - before) > 0
        self._triggers += fired
        return fired

    def marks(self) -> Marks | None:
        """Return free memory against watermarks and limits; None if the kernel does not tell."""
        low, high, spare = [], [], 0
        for found in _MARKS.finditer(self._read(self._zones)):
            # A zone without memory (Device, for example) is never below its watermark of 0.
            if not int(found[4]):
                continue
            protected = max(map(int, found[5].split(b",")), default=0)
            free = int(found[1]) - protected
            low.append(free - int(found[2]))
            high.append(free - int(found[3]))
            spare += max(0, high[-1])
        if not low:
            return None
        marks, room = Marks(max(low), max(high), spare), self.limits.room()
        if room is None:
            return marks
        above_low = (room.left - headroom(room.limit) // 2) // mmap.PAGESIZE
        above_high = room.spare // mmap.PAGESIZE
        return Marks(
            min(marks.above_low, above_low),
            min(marks.above_high, above_high),
            min(spare, max(0, above_high)),
        )

    def statistics(self) -> PressureStatistics:
        """Return a frozen snapshot."""
        some, full = self._totals()
        marks, room = self.marks(), self.limits.room()
        return PressureStatistics(
            psi=self.psi,
            some_avg10=some[0],
            full_avg10=full[0],
            some_seconds=some[1],
            full_seconds=full[1],
            triggers=self._triggers,
            spare_pages=marks.spare if marks else 0,
            limit_bytes=room.limit if room else 0,
            limit_left_bytes=room.left if room else 0,
        )

    def _totals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (percent of the last 10 s, seconds since boot) for some and for full."""
        stalls = {
            found[1]: (float(found[2]), int(found[3]) / 1e6)
            for found in _STALLS.finditer(self._read(self._stalls))
        }
        return stalls.get(b"some", (0.0, 0.0)), stalls.get(b"full", (0.0, 0.0))

    def _read(self, descriptor: int) -> bytes:
        """Return the text of a file, or nothing."""
        if descriptor < 0:
            return b""
        view = memoryview(self._buffer)
        length = 0
        try:
            # A seq file returns one node at a time.
            while piece := os.preadv(descriptor, [view[length:]], length):
                length += piece
        except OSError:
            return b""
        return bytes(view[:length])

    def close(self) -> None:
        """Close the files; this ends the trigger too."""
        if self._waiter is not None:
            self._waiter.close()
        for descriptor in (self._zones, self._stalls, self._trigger):
            if descriptor >= 0:
                os.close(descriptor)
        self._zones = self._stalls = self._trigger = self.descriptor = -1
        self._waiter = None
        self.limits.close()


def _length(descriptor: int) -> int:
    """Return the length of a /proc file by reading it.

    The read also makes the kernel size its buffer.
    """
    length = 0
    while descriptor >= 0 and (piece := os.pread(descriptor, _ROOM, length)):
        length += len(piece)
    return length


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
