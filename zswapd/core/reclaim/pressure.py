# SPDX-License-Identifier: GPL-2.0-or-later
"""How short of memory the system is, by the kernel's own measures.

The zones' watermarks, and pressure stall information.

*Watermarks* say how near allocations are to having to wait: below `low` kswapd is at work, above
`high` it sleeps. A zone's free pages that are protected from ordinary allocations (lowmem_reserve)
do not count, or the idle DMA zone would hide every shortage.

*PSI* says that somebody did wait. A trigger (Documentation/accounting/psi.rst) ends a wait for it;
without CAP_SYS_RESOURCE the kernel takes windows of whole two seconds only. Where there are no
triggers (before Linux 5.2, or psi=0), `psi` says so and the watermarks are all there is. Stalls of
a memory cgroup at its own limit are in it too, and no memory given back ends those.

*Limits* of the memory cgroups above this process (host/cgroups.py) count like a watermark: the
headroom below a limit is its high mark, half of it the low one.

`Pressure` opens its files once: the kernel keeps their buffers, so that looking again asks it for
no memory. The functions open them, which allocates in the kernel: not for the thread that serves
pages.
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
"""Tasks waited for memory 15 % of the time; stall and window in µs.

The second is what an unprivileged process may have.
"""
STALLED = 0.15
"""The same for `has_stalled`."""
_ROOM = 64 << 10
"""By how much /proc/zoneinfo may grow while it is watched, bytes; what is beyond is not seen."""


def spare_pages(root: Path = Path("/")) -> int:
    """Return the free pages above the high watermarks, summed over all zones that have any.

    0 if the kernel does not say.

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
        above_low: pages by which the zone that is best off is above its low watermark; negative
            where every zone is below.
        above_high: the same for the high watermark.
        spare: pages above the high watermarks, all zones together.
    """

    above_low: int
    above_high: int
    spare: int


@dataclass(frozen=True, slots=True)
class PressureStatistics:
    """The system's pressure as it is now, and how often it was reported.

    Attributes:
        psi: `trigger`: the kernel wakes us; `polling`: averages only; `absent`: none, the
            watermarks are all there is.
        some_avg10: share of the last ten seconds in which at least one task waited for memory,
            percent.
        full_avg10: in which all did.
        some_seconds: time that at least one task waited, since boot.
        full_seconds: that all did.
        triggers: times that the threshold was passed, by the kernel's report or by its totals.
        spare_pages: free pages above the high watermarks.
        limit_bytes: lowest limit of a memory cgroup above this process, by what it leaves; 0 for
            none.
        limit_left_bytes: what may still be charged to it.
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
    """The files, open; never raises, a missing file reads as no pressure.

    Args:
        root: where /proc is, for tests.
        clock: monotonic, seconds; likewise.

    Attributes:
        psi: see PressureStatistics.
        descriptor: readable (to select, epoll) once the trigger fired; -1 without one.
        limits: of the memory cgroups above this process.
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
        """Have `descriptor` tell when tasks wait for memory, where the kernel can.

        For a thread of its own: for the first trigger of all the kernel starts a thread, and
        kthreadd may have to wait for
        memory meanwhile, which whoever serves pages would have to free.
        """
        for threshold in TRIGGERS if self.psi == "polling" else ():
            descriptor = _open(self._path, os.O_RDWR)
            if descriptor < 0:
                return
            # The file is always readable; only POLLPRI means the trigger. trio waits for readable
            # files, and an epoll that has something to tell is one.
            waiter = select.epoll()
            try:
                waiter.register(
                    descriptor, 0
                )  # refused for an ordinary file, before it is written to
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
        """Count a trigger that `descriptor` told of."""
        self._triggers += 1
        if self._waiter is not None:
            self._waiter.poll(0)

    def has_stalled(self) -> bool:
        """Say whether tasks waited for STALLED of the time since the last call.

        What a trigger would have told.
        """
        now, waited = self._clock(), self._totals()[0][1]
        (before, waited_before), self._seen = self._seen, (now, waited)
        fired = waited - waited_before >= STALLED * (now - before) > 0
        self._triggers += fired
        return fired

    def marks(self) -> Marks | None:
        """Return free memory against the watermarks and limits; None if the kernel does not say."""
        low, high, spare = [], [], 0
        for found in _MARKS.finditer(self._read(self._zones)):
            if not int(
                found[4]
            ):  # a zone without memory, Device for one, is never below its watermark of 0
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
        """Return (percent of the last ten seconds, seconds since boot) for some and full."""
        stalls = {
            found[1]: (float(found[2]), int(found[3]) / 1e6)
            for found in _STALLS.finditer(self._read(self._stalls))
        }
        return stalls.get(b"some", (0.0, 0.0)), stalls.get(b"full", (0.0, 0.0))

    def _read(self, descriptor: int) -> bytes:
        """Return a file's text, or nothing."""
        if descriptor < 0:
            return b""
        view = memoryview(self._buffer)
        length = 0
        try:
            while piece := os.preadv(
                descriptor, [view[length:]], length
            ):  # seq files give one node at a time
                length += piece
        except OSError:
            return b""
        return bytes(view[:length])

    def close(self) -> None:
        """Close the files; the trigger goes with them."""
        if self._waiter is not None:
            self._waiter.close()
        for descriptor in (self._zones, self._stalls, self._trigger):
            if descriptor >= 0:
                os.close(descriptor)
        self._zones = self._stalls = self._trigger = self.descriptor = -1
        self._waiter = None
        self.limits.close()


def _length(descriptor: int) -> int:
    """Return the length of a file that only reading tells.

    The kernel finds out how large its buffer must be.
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
