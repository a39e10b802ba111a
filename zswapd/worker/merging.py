# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps requests to the swap device apart while any page cannot be read.

So a page that cannot be read is an error for its own reader alone.

The kernel reads ahead when it swaps in: eight pages by default (vm.page-cluster), merged into one
request. The loop device takes a short answer to a read, and asks again for the rest; but a request
that fails fails from its first page to its last, and the kernel reads none of these pages again:
they stay in its swap cache as unreadable until memory is short. So the pages in front of an
unreadable one can be saved by a short answer (fuse/operations.py), and those behind it only by a
request of their own. With `queue/nomerges` at 2, each page has that.

The price is why this is not always so: unmerged, swap-out takes about three times as long, and
swap-in twice. Merging is switched off when the first page is found that cannot be read, and on
again when the last of them has other data, or none.

Limits: damage that shows in a read that was merged before costs the pages behind it in this one
request, too.

It takes several looks at sysfs, in another thread: the change waits for requests that the event
loop's thread answers.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from zswapd.swapdevice.kernel import Kernel
from zswapd.swapdevice.merging import UNMERGED, loops_over, restore_merging, set_merging

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from zswapd.core.block.device import Device
    from zswapd.swapdevice.state import Identity
    from zswapd.system.offload import Offload

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Time between two looks, while pages cannot be read: at them, and at what is attached."""
PROMPT_S = 0.1
"""Time between two looks at a disk that takes long:
a queue that is frozen meanwhile would keep all swap waiting for it.
"""
REMEMBERED = 64
"""Unreadable pages of a device that a successor is told of."""


class Merging:
    """One worker's part in it.

    Args:
        devices: the block devices of the pages.
        files: the paths of their files, in the same order.
        identities: returns what the files are.
        swapoff_thread: does what waits for this process.
        is_prompt: says whether the requests that are under way will be answered at once.
        left: what a predecessor has left.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        files: Sequence[Path],
        *,
        identities: Callable[[], Mapping[Path, Identity]],
        swapoff_thread: Offload,
        is_prompt: Callable[[], bool],
        left: Mapping[str, Any],
    ) -> None:
        self._devices = devices
        self._files = files
        self._identities = identities
        self._swapoff_thread = swapoff_thread
        self._is_prompt = is_prompt
        self.when_changed: Callable[[], None] = _ignore
        self._unmerged: set[str] = set(left.get("loops", ()))
        self._wanted = trio.Event()
        for device in devices:
            device.recall_unreadable(left.get("pages", {}).get(device.name, ()))
            device.has_lost_by_damage = device.has_lost_by_damage or device.name in left.get(
                "lost", ()
            )
            device.when_unreadable = self._wake

    def _wake(self) -> None:
        """Called from the page path, when a page has become unreadable."""
        self._wanted.set()

    @property
    def loops(self) -> list[str]:
        """The loop devices whose requests are not merged, as far as this daemon has seen to it."""
        return sorted(self._unmerged)

    def remembered(self) -> dict[str, Any]:
        """Return what a successor has to know; {} if all is well."""
        pages = {
            device.name: list(device.unreadable)[:REMEMBERED]
            for device in self._devices
            if device.unreadable
        }
        lost = [device.name for device in self._devices if device.has_lost_by_damage]
        return (
            {"loops": self.loops, "pages": pages, "lost": lost}
            if pages or lost or self._unmerged
            else {}
        )

    async def run(self) -> None:
        """Switch merging off and on; never returns."""
        while True:
            is_off = await self.look()
            with trio.move_on_after(LOOK_S if is_off else float("inf")):
                await self._wanted.wait()
            self._wanted = trio.Event()

    async def look(self) -> bool:
        """Do what is to be done now; return whether requests are to stay apart."""
        unreadable = [device.name for device in self._devices if device.has_unreadable()]
        if not unreadable and not self._unmerged:
            return False
        run = partial(self._swapoff_thread.run, abandon=True)
        loops = (
            await run(partial(loops_over, self._files, self._identities(), kernel=Kernel()))
            if unreadable
            else set()
        )
        before, self._unmerged = self._unmerged, loops
        if before != loops:
            self._unmerged = before | loops
            self.when_changed()  # before it is done: a successor has to undo it
        while not self._is_prompt():
            await trio.sleep(PROMPT_S)
        for device in sorted(before - loops):
            await run(partial(restore_merging, device))
            log.info(
                "requests to %s are merged again: no page that cannot be read is left on it", device
            )
        for device in sorted(loops):
            is_set = await run(partial(set_merging, device, UNMERGED))
            if device not in before or not is_set:
                self._say(device, unreadable, is_set=is_set)
        if before != loops:
            self._unmerged = loops
            self.when_changed()
        return bool(unreadable)

    @staticmethod
    def _say(device: str, names: list[str], *, is_set: bool) -> None:
        what = f"there are pages of {', '.join(names)} that cannot be read"
        if is_set:
            log.warning(
                "%s: requests to %s are not merged, so that the pages beside them can be; swap is"
                " slower",
                what,
                device,
            )
        else:
            log.warning(
                "%s, and /sys/block/%s/queue/nomerges cannot be set: pages beside them may fail"
                " with them",
                what,
                device.removeprefix("/dev/"),
                extra={"rate_limit": 60},
            )


def _ignore() -> None:
    """Do nothing."""
