# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's calls to the system: scheduling, memory, signals, and the service manager."""

from zswapd.system.advice import advise, raise_min_free_kbytes
from zswapd.system.code import populate as populate_code
from zswapd.system.code import read as read_code
from zswapd.system.heap import collect_garbage, freeze_garbage_collector, has_garbage, shared_bytes
from zswapd.system.notify import Notifier
from zswapd.system.protections import (
    Protection,
    grow_heaps,
    protect,
    refreshed,
    set_idle_priority,
    take_own_memory,
)
from zswapd.system.scheduling import (
    ordinary_children,
    scarce_bytes,
    set_nice,
    set_normal,
    set_process_name,
    set_realtime,
)
from zswapd.system.signals import become_servant, block_signals, ignore_signals, lift_limits

__all__ = [
    "Notifier",
    "Protection",
    "advise",
    "become_servant",
    "block_signals",
    "collect_garbage",
    "freeze_garbage_collector",
    "grow_heaps",
    "has_garbage",
    "ignore_signals",
    "lift_limits",
    "ordinary_children",
    "populate_code",
    "protect",
    "raise_min_free_kbytes",
    "read_code",
    "refreshed",
    "scarce_bytes",
    "set_idle_priority",
    "set_nice",
    "set_normal",
    "set_process_name",
    "set_realtime",
    "shared_bytes",
    "take_own_memory",
]
