# SPDX-License-Identifier: GPL-2.0-or-later
"""From a file to a swap device and back: loop device, mkswap, swapon.

Head-room check, swapoff, detach.

`swapon` and `swapoff` are the two ways, `headroom` decides whether the way back is safe, `state`
says what is there now, `kernel` holds the system calls. All synchronous, and without trio, since
zswapctl uses it too; `drain` is the daemon's asynchronous way to call it. Modules are imported when
a name of theirs is asked for: `zswapctl status` needs `state` alone.
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
    """Return one of the names above, from the module that has it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"zswapd.swapdevice.{_HOMES[name]}"), name)
