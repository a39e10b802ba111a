# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap devices over files: loop device, mkswap and swapon, and the way back.

`swapon` makes a swap device from a file. `swapoff` makes a file from a swap device. `headroom`
checks that swapoff is safe. `state` reads the present state. `kernel` has the system calls. They
are synchronous and do not import trio, because zswapctl uses them too. `drain` is the daemon's
asynchronous swapoff. A module is imported when one of its names is used: `zswapctl status` needs
only `state`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zswapd.swapdevice.headroom import Headroom, measure
    from zswapd.swapdevice.state import Attachment, SwapArea, find_attached, swap_areas
    from zswapd.swapdevice.swapoff import detach
    from zswapd.swapdevice.swapon import Attached, attach

__all__ = [
    "Attached",
    "Attachment",
    "Headroom",
    "SwapArea",
    "attach",
    "detach",
    "find_attached",
    "measure",
    "swap_areas",
]

_HOMES = {
    "Attached": "swapon",
    "attach": "swapon",
    "detach": "swapoff",
    "Headroom": "headroom",
    "measure": "headroom",
    "Attachment": "state",
    "SwapArea": "state",
    "find_attached": "state",
    "swap_areas": "state",
}


def __getattr__(name: str) -> object:
    """Return one of the names above from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"zswapd.swapdevice.{_HOMES[name]}"), name)
