# SPDX-License-Identifier: GPL-2.0-or-later
"""A snapshot without a worker: a real core with pages, and made-up numbers for the rest."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from zswapd.config import load
from zswapd.control.server import ControlStatistics
from zswapd.core import compress
from zswapd.core.core import Core
from zswapd.core.reclaim.pressure import PressureStatistics
from zswapd.core.reclaim.shrinker import ShrinkerStatistics
from zswapd.fuse.held import HeldStatistics
from zswapd.fuse.session import LatencyStatistics, SessionStatistics
from zswapd.metrics.snapshot import (
    ClientFilesStatistics,
    CostStatistics,
    Snapshot,
    WorkerStatistics,
)
from zswapd.volumes.statistics import VolumeStatistics

PAGE = 4096


def make(**settings: str) -> Core:
    """Return an empty core of 16 MiB; a name of a setting has two underscores for the dot."""
    named = {
        "swap.size": "16M",
        "memory.reserve": "8M",
        **{name.replace("__", "."): text for name, text in settings.items()},
    }
    return Core(
        load(
            codecs=compress.names(),
            assignments=[(name, value, "test") for name, value in named.items()],
        )
    )


def make_core(pages: int = 64) -> Core:
    """Return a core of 16 MiB with `pages` pages in its swap file, and as many in its cache.

    A third of the pages is of each kind.
    """
    core = make(cache__limit="4M")
    assert core.cache
    volume = core.cache.cleancache.init_fs()
    device = core.devices["swap"]
    for number in range(pages):
        data = (
            os.urandom(PAGE),
            os.urandom(900) + bytes(PAGE - 900),
            bytes([number % 256]) * PAGE,
        )[number % 3]
        device.write(number * PAGE, memoryview(data))
        core.cache.cleancache.put_page(volume, 2, number, memoryview(data))
    return core


def numbered(kind: Any, **given: object) -> Any:
    """Return a snapshot with a different number in every int and float field.

    The given fields have the given values.
    """
    plain = {"int": int, "float": float, "bool": bool}
    fields = enumerate(dataclasses.fields(kind), 1)
    values = {
        field.name: plain[str(field.type)](place)
        for place, field in fields
        if str(field.type) in plain
    }
    return kind(**values | given)


def make_snapshot(core: Core) -> Snapshot:
    """Return a snapshot whose core part is real."""
    latency = LatencyStatistics((5, 10) + (0,) * 18 + (2,), 0.25)
    return Snapshot(
        core=core.statistics(),
        fuse=numbered(
            SessionStatistics,
            read_latency=latency,
            write_latency=latency,
            held=numbered(HeldStatistics, counts=(3, 2) + (0,) * 9 + (1,)),
        ),
        control=numbered(ControlStatistics),
        pressure=numbered(PressureStatistics, psi="trigger"),
        volumes=(numbered(VolumeStatistics, name="disk"),),
        shrinker=numbered(
            ShrinkerStatistics, shrinks={"low_memory": 4, "stalled": 0, "limit": 2, "command": 1}
        ),
        worker=WorkerStatistics(
            "1.2.3", 3, 1, 0, 0.125, True, 0, 77.5, {"heap": True, "lock_memory": False}
        ),
        cost=numbered(CostStatistics),
        files=numbered(ClientFilesStatistics),
    )
