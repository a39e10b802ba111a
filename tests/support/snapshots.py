# SPDX-License-Identifier: GPL-2.0-or-later
"""A snapshot of a worker that does not run: a real core with some pages in it, and made-up numbers for the rest."""

from __future__ import annotations

import os
from typing import Any, get_type_hints

from zswapd import compress
from zswapd.assembly import Core
from zswapd.config import load
from zswapd.control.server import ControlStatistics
from zswapd.fuse.session import LatencyStatistics, SessionStatistics
from zswapd.reclaim.pressure import PressureStatistics
from zswapd.snapshot import Snapshot, WorkerStatistics
from zswapd.volumes.statistics import VolumeStatistics

PAGE = 4096


def make_core(pages: int = 64) -> Core:
    """Return a core of 16 MiB with `pages` pages, a third of each kind, in its swap file."""
    core = Core(load(codecs=compress.names(), assignments=[("swap.size", "16M", "test"), ("memory.reserve", "4M", "test")]))
    device = core.devices["swap"]
    for number in range(pages):
        data = (os.urandom(PAGE), os.urandom(900) + bytes(PAGE - 900), bytes([number % 256]) * PAGE)[number % 3]
        device.write(number * PAGE, memoryview(data))
    return core


def numbered(kind: Any, **given: object) -> Any:
    """Return a snapshot class with a number of its own in every int and float field, but for what is given."""
    hints = get_type_hints(kind)
    values = {name: hint(place) for place, (name, hint) in enumerate(hints.items(), 1) if hint in {int, float, bool}}
    return kind(**values | given)


def make_snapshot(core: Core) -> Snapshot:
    """Return a snapshot; the core's part is real."""
    latency = LatencyStatistics((5, 10) + (0,) * 18 + (2,), 0.25)
    return Snapshot(
        core=core.statistics(),
        fuse=numbered(SessionStatistics, read_latency=latency, write_latency=latency),
        control=numbered(ControlStatistics),
        pressure=numbered(PressureStatistics, psi="trigger"),
        volumes=(numbered(VolumeStatistics, name="disk"),),
        worker=WorkerStatistics("1.2.3", 3, 1, 0.125, True, 0, 77.5, {"heap": True, "lock_memory": False}),
    )
