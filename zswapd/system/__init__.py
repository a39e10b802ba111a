# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon and its system: when it is ready (`notify`), and what keeps it from hanging (`protections`)."""

from zswapd.system.advice import advise, raise_min_free_kbytes
from zswapd.system.code import populate as populate_code
from zswapd.system.code import read as read_code
from zswapd.system.heap import collect_garbage, freeze_garbage_collector, has_garbage
from zswapd.system.notify import Notifier
from zswapd.system.protections import Protection, grow_heaps, protect, refreshed, take_time
from zswapd.system.scheduling import be_known_as, first_in_line, ordinary_children, scarce_bytes, stand_back, step_back
from zswapd.system.signals import become_servant, block_signals, ignore_signals, lift_limits

__all__ = [
    "Notifier",
    "Protection",
    "advise",
    "be_known_as",
    "become_servant",
    "block_signals",
    "collect_garbage",
    "first_in_line",
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
    "stand_back",
    "step_back",
    "take_time",
]
