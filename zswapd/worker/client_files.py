# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap files that come, go and change their size while the worker serves.

Order: a file is in the roster (handover/roster.py) before its first page can be stored, and its
pages are gone before it leaves the roster. So a successor knows the file of every page that it
finds. A death in the middle of an addition leaves the file or not. A death in the middle of a
removal leaves the file, perhaps with fewer pages.

A file that is in use neither goes nor changes its size. It is in use if it is open for writing,
which the session knows (fuse/writers.py), or if /proc names a process that has it open.

Limits: a file that comes has no slots on the disk behind the pool, so its pages stay in the pool
until a restart. It shares the address space of the pool, which was made for the files of the start.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from zswapd.errors import ClientError, ZswapdError
from zswapd.fuse.inodes import ROOT_INODE
from zswapd.fuse.session import forget_inode, forget_name
from zswapd.handover import costs
from zswapd.host.hints import no_swap_file
from zswapd.host.installation import restart_daemon
from zswapd.host.users import processes_with
from zswapd.metrics.snapshot import ClientFilesStatistics
from zswapd.swapdevice.kernel import Kernel
from zswapd.swapdevice.state import find_all_attached
from zswapd.worker.emptying import identities

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zswapd.core.block.device import Device
    from zswapd.handover.roster import Roster
    from zswapd.worker.parts import Parts

log = logging.getLogger(__name__)

FIRST: Final = "swap"
STEP_BYTES: Final = 4 << 20
"""Bytes that are discarded between two turns of the event loop; 1024 pages take about 1 ms."""
STEP_PAGES: Final = 4096
NOTICE_S: Final = 1.0
"""Longest wait for the kernel to forget a name. It takes locks that a look-up may hold."""


class ClientFiles:
    """The swap files of one worker.

    Args:
        parts: the parts of the worker.
        roster: the files in the shared state.
        wanted: bytes of each file of the configured settings, by name.

    Attributes:
        added, removed, resized, refused: counts of the commands of this worker.
    """

    def __init__(self, parts: Parts, roster: Roster, wanted: Mapping[str, int]) -> None:
        self._parts = parts
        self._roster = roster
        self._wanted = wanted
        self._lock = trio.Lock()
        roster.keep_removed(set(wanted))
        self.added = self.removed = self.resized = self.refused = 0

    def handlers(self) -> dict[str, Any]:
        """Return the handlers by command."""
        return {
            "files-add": self._counted(self.add),
            "files-remove": self._counted(self.remove),
            "files-resize": self._counted(self.resize),
        }

    def statistics(self) -> ClientFilesStatistics:
        """Return a frozen snapshot."""
        return ClientFilesStatistics(self.added, self.removed, self.resized, self.refused)

    def _counted(self, handler: Any) -> Any:
        async def run(**arguments: Any) -> Any:
            try:
                return await handler(**arguments)
            except ZswapdError:
                self.refused += 1
                raise

        return run

    async def add_configured(self) -> None:
        """Add the files of the settings that the daemon before this program did not have."""
        for name, size in self._wanted.items():
            if name not in self._roster.members and name not in self._roster.removed:
                try:
                    await self.add(name, str(size))
                except ZswapdError as error:
                    log.error("swap file %s is missing: %s", name, error)  # noqa: TRY400 - a reason, not a bug
                else:
                    log.info("swap file %s has come with the settings", name)

    async def add(
        self, name: str, size: str, settings: Mapping[str, object] | None = None
    ) -> dict[str, Any]:
        """Add an empty swap file; it can be opened when this returns.

        Args:
            name: its name in the mount.
            size: its size, as a setting has it.
            settings: its further settings by key.

        Raises:
            ConfigError: the name, the size or a setting is refused.
            ClientError: a file has this name, or no file can be added.
            ArenaError, HandoverError: there is no memory.
        """
        parts = self._parts
        async with self._lock:
            if name in parts.core.devices or parts.directory.lookup(ROOT_INODE, name.encode()):
                raise ClientError(
                    f"there is a file {name} already",
                    hint=f"choose another name, or `zswapctl files resize {name} --size SIZE`",
                )
            self._roster.check_growable()
            own = {f"swap.files.{name}.{key}": value for key, value in (settings or {}).items()}
            sizes = {**self._sizes(), name: _size(size)}
            change = parts.settings.with_files(sizes, own)
            costs.check_files(change.configured)
            member = self._roster.add(name, change.configured.swap_files()[name])
            lost, copy = self._roster.bitmaps_of(member)
            device = parts.core.add_device(name, member.size, member.swap_type, lost, copy)
            parts.directory.add_block_file(device, member.inode)
            parts.session.add_block_file(member.inode)
            parts.emptying.add(member.inode, device, self._path(name))
            parts.merging.add(device, self._path(name))
            parts.settings.take(change)
            self.added += 1
        return self._report(device)

    async def remove(self, name: str) -> dict[str, Any]:
        """Remove a swap file that is not in use, with its pages.

        Raises:
            ClientError: the file is in use, or is the first one, or no file has this name.
        """
        parts = self._parts
        async with self._lock:
            device = self._find(name)
            inode = parts.directory.inode_of(name)
            await self._check_unused(name, inode)
            # From here to the first await, no other task opens the file.
            parts.directory.remove(inode)
            parts.session.remove_block_file(inode)
            parts.emptying.remove(inode)
            parts.merging.remove(device)
            pages = device.statistics().stored_pages
            for offset in range(0, device.size, STEP_BYTES):
                device.discard(offset, min(STEP_BYTES, device.size - offset))
                await trio.lowlevel.checkpoint()
            self._roster.remove(name, is_configured=name in self._wanted)
            parts.core.remove_device(name)
            parts.settings.take(parts.settings.with_files(self._sizes(), {}))
            self.removed += 1
        await self._tell(partial(forget_name, ROOT_INODE, name))
        return {"removed": name, "dropped_pages": pages}

    async def resize(self, name: str, size: str) -> dict[str, Any]:
        """Set the size of a swap file that is not in use; its pages stay.

        Raises:
            ConfigError: the size is refused.
            ClientError: the file is in use or has slots on the disk, or has pages beyond the size.
            ArenaError, HandoverError: there is no memory.
        """
        parts, roster = self._parts, self._roster
        async with self._lock:
            device = self._find(name)
            if device.has_slots:
                raise ClientError(
                    f"{name} has a slot on the disk for each of its pages, so its size is fixed",
                    hint=f"change its size in the config file, swap off, then {restart_daemon()}",
                )
            change = parts.settings.with_files({**self._sizes(), name: _size(size)}, {})
            costs.check_files(change.configured)
            new_size = change.configured.swap_files()[name]
            inode = parts.directory.inode_of(name)
            await self._check_beyond(device, new_size)
            await self._check_unused(name, inode)
            if device.has_data_beyond(new_size, device.pages):  # written while /proc was read
                raise _data_beyond(name)
            member = roster.resize(name, new_size)
            lost, copy = roster.bitmaps_of(member)
            device.copy_marks(lost, copy)
            roster.enter(member)
            parts.core.resize_device(name, new_size, lost, copy)
            parts.directory.resized(inode)
            parts.settings.take(change)
            self.resized += 1
        await self._tell(partial(forget_inode, inode))
        return self._report(device)

    def _find(self, name: str) -> Device:
        if name not in self._parts.core.devices:
            raise no_swap_file(name, list(self._parts.core.devices))
        if name == FIRST:
            raise ClientError(
                f"{FIRST} is the file of swap.size, which stays as it is while the daemon runs",
                hint=f"change swap.size in the config file, swap off, then {restart_daemon()}",
            )
        return self._parts.core.devices[name]

    async def _check_beyond(self, device: Device, size: int) -> None:
        """Refuse a size that would cut off data, some pages at a time."""
        for first in range(size, device.size, STEP_PAGES * (device.size // device.pages)):
            if device.has_data_beyond(first, STEP_PAGES):
                raise _data_beyond(device.name)
            await trio.lowlevel.checkpoint()

    async def _check_unused(self, name: str, inode: int) -> None:
        """Do nothing if no program has a file open.

        Raises:
            ClientError: a program has; the message names it.
        """
        parts = self._parts
        await parts.emptying.look(inode)
        users = await parts.swapoff_thread.run(partial(self._users, self._path(name)), abandon=True)
        if users or parts.session.operations.writers.handle_of(inode):
            who = ", ".join(users) or "a program that has it open for writing"
            raise ClientError(
                f"{name} is in use by {who}", hint=f"`zswapctl swapoff {name}`, or end what uses it"
            )

    def _users(self, path: Path) -> list[str]:
        identity = identities(self._parts.session, self._parts.directory).get(path)
        loops = find_all_attached(path, identity=identity, kernel=Kernel())
        return [
            f"{loop.device} (swapped on)" if loop.swap else loop.device for loop in loops
        ] + processes_with(path)

    async def _tell(self, notice: Any) -> None:
        """Have the kernel forget a name or a size that it has cached."""
        with trio.move_on_after(NOTICE_S):
            await self._parts.swapoff_thread.run(notice, abandon=True)

    def _path(self, name: str) -> Path:
        return self._parts.session.mountpoint / name

    def _sizes(self) -> dict[str, object]:
        return {member.name: member.size for member in self._roster.members.values()}

    def _report(self, device: Device) -> dict[str, Any]:
        return {"name": device.name, "size": device.size, "file": str(self._path(device.name))}


def _size(text: str) -> object:
    return int(text) if text.isdecimal() else text


def _data_beyond(name: str) -> ClientError:
    return ClientError(
        f"{name} has data beyond that size",
        hint="discard it first, for example with `blkdiscard` on its loop device",
    )
