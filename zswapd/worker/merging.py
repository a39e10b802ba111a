# SPDX-License-Identifier: GPL-2.0-or-later
"""The task that switches request merging off while a page of a swap device cannot be read.

Then an unreadable page is an error for its own reader only.

The kernel reads ahead at swap-in: eight pages by default (vm.page-cluster), merged into one
request. A request that fails fails for all its pages. The kernel does not read these pages again:
they stay in its swap cache as unreadable until memory is short. The pages before an unreadable one
are saved by a short answer, after which the loop device asks for the rest (fuse/operations.py). The
pages behind it are saved only if each has a request of its own, as with `queue/nomerges` at 2.

Without merging, swap-out takes about three times as long, and swap-in twice. So merging is switched
off when the first unreadable page is found. It is switched on again when the last such page has
other data or none.

The task reads and writes sysfs in another thread, because a change waits for requests that the
event loop's thread answers.

Limit: when a merged read finds the first damage, the pages behind it in this request fail too.
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
"""Time, s, between two looks at unreadable pages and at the loop devices."""
PROMPT_S = 0.1
"""Time, s, between two looks at a slow disk.

A change of merging freezes the queue. All swap would then wait for the slow disk.
"""
REMEMBERED = 64
"""Number of unreadable pages of a device that are saved for a successor."""


class Merging:
    """The switching of request merging by one worker.

    Args:
        devices: the block devices of the pages.
        files: the paths of their files, in the same order.
        identities: returns the identities of the files by path.
        swapoff_thread: the thread for calls that wait for this process.
        is_prompt: says whether all requests under way will be answered at once.
        left: the result of the predecessor's `remembered`.
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
        self._devices = list(devices)
        self._files = list(files)
        self._identities = identities
        self._swapoff_thread = swapoff_thread
        self._is_prompt = is_prompt
        self.when_changed: Callable[[], None] = lambda: None
        self._unmerged: set[str] = set(left.get("loops", ()))
        self._wanted = trio.Event()
        for device in devices:
            device.recall_unreadable(left.get("pages", {}).get(device.name, ()))
            device.has_lost_by_damage = device.has_lost_by_damage or device.name in left.get(
                "lost", ()
            )
            device.when_unreadable = self._wake

    def add(self, device: Device, file: Path) -> None:
        """Watch a further device."""
        self._devices.append(device)
        self._files.append(file)
        device.when_unreadable = self._wake

    def remove(self, device: Device) -> None:
        """Watch a device no more."""
        place = self._devices.index(device)
        del self._devices[place], self._files[place]

    def _wake(self) -> None:
        """Wake the task. The page path calls it when a page has become unreadable."""
        self._wanted.set()

    @property
    def loops(self) -> list[str]:
        """The loop devices on which this daemon has switched merging off."""
        return sorted(self._unmerged)

    def remembered(self) -> dict[str, Any]:
        """Return the state for a successor; {} if no page is unreadable and merging is on."""
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
        """Switch merging off and on; never return."""
        while True:
            is_off = await self.look()
            with trio.move_on_after(LOOK_S if is_off else float("inf")):
                await self._wanted.wait()
            self._wanted = trio.Event()

    async def look(self) -> bool:
        """Switch merging once, if needed; return whether any page is unreadable."""
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
            self.when_changed()  # before the change, because a successor has to undo it
        while not self._is_prompt():
            await trio.sleep(PROMPT_S)
        for device in sorted(before - loops):
            await run(partial(restore_merging, device))
            log.info("requests to %s are merged again: it has no unreadable page left", device)
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
        what = f"pages of {', '.join(names)} are unreadable"
        if is_set:
            log.warning(
                "%s: requests to %s are not merged, so that the pages beside them stay readable;"
                " swap is slower",
                what,
                device,
            )
        else:
            log.warning(
                "%s, and /sys/block/%s/queue/nomerges cannot be set: reads of pages beside them may"
                " fail too",
                what,
                device.removeprefix("/dev/"),
                extra={"rate_limit": 60},
            )
