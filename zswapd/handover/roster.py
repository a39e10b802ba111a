# SPDX-License-Identifier: GPL-2.0-or-later
"""The roster: the swap files of a running daemon, which may come, go and change their size.

A daemon starts with the files of its settings: file number n has the swap type n, the inode n + 2,
and its bits in the shared state as it was made. When the first file comes or goes, the geometry
gets a roster with all of this by name. A file that comes later has its bits in memory that is added
to the shared state. Its inode is one that no file had before, so that a name that the kernel has
cached never leads to another file.

The geometry is written as a whole, in two copies, so a death leaves the old roster or the new one.
A file comes into being when it is in the roster. It ends when it is not there any more, and has no
pages then. Memory beyond the ranges of the roster is free, whatever a dead worker meant to do.

Limit: only a shared state on tmpfs can grow. Memory of a memfd could be swapped out while no worker
has it mapped and locked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from zswapd.core.block.device import lost_bytes
from zswapd.core.frontends.frontswap import MAX_SWAPFILES
from zswapd.errors import ClientError, ZswapdError
from zswapd.host.installation import restart_daemon

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.handover.state import SharedState

FIRST_INODE: Final = 2
INODES: Final = 1 << 16
"""Numbers of block files that the hook knows (INODE_LIMIT in fuse/_lowlevel.c)."""


@dataclass(frozen=True, slots=True)
class Member:
    """One swap file of the roster.

    Attributes:
        name, size: the file, and its bytes.
        swap_type: its number in the headers of its pages.
        inode: its number in the mount.
        lost: offset in the shared state of its bitmap of lost pages, 0 for that of the start.
        copy: offset of the second bitmap, likewise.
    """

    name: str
    size: int
    swap_type: int
    inode: int
    lost: int = 0
    copy: int = 0


def made_files(geometry: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of each swap file at the start of the daemon, in the order of their types."""
    roster = geometry.get("roster")
    return dict(roster["made"]) if roster else dict(geometry["files"])


def original_names(geometry: Mapping[str, Any]) -> set[str]:
    """Return the names of the files that are there since the start, with their first memory."""
    roster = geometry.get("roster")
    return (
        {row["name"] for row in roster["members"] if not row["lost"]}
        if roster
        else set(geometry["files"])
    )


def added_names(geometry: Mapping[str, Any]) -> set[str]:
    """Return the names of the files that have come since the start of the daemon."""
    return set(geometry["files"]) - original_names(geometry)


class Roster:
    """The swap files that the shared state names.

    Args:
        state: the shared state.
        page_size: bytes in a page.
        is_growable: whether memory can be added to the shared state.

    Attributes:
        members: the files by name, in the order of their swap types.
        removed: names of files of the settings that were removed.
    """

    def __init__(self, state: SharedState, *, page_size: int, is_growable: bool) -> None:
        self._state = state
        self._page_size = page_size
        self._is_growable = is_growable
        geometry = state.geometry
        left = geometry.get("roster")
        self._made = made_files(geometry)
        # Marks of recompression may stand in front of the ranges (`SharedState.extend`).
        self._skipped = int(left["skipped"]) if left else -1
        self._next = int(left["next"]) if left else FIRST_INODE + len(self._made)
        self.removed: set[str] = set(left["removed"]) if left else set()
        members = (
            [Member(**row) for row in left["members"]]
            if left
            else [
                Member(name, size, number, FIRST_INODE + number)
                for number, (name, size) in enumerate(geometry["files"].items())
            ]
        )
        self.members = {member.name: member for member in members}

    @property
    def made(self) -> dict[str, int]:
        """The size of each file at the start of the daemon."""
        return self._made

    @property
    def is_changed(self) -> bool:
        """Whether files have come, gone or changed their size since the start of the daemon."""
        return "roster" in self._state.geometry

    def bitmaps(self) -> tuple[dict[str, memoryview], dict[str, memoryview]]:
        """Return both bitmaps of lost pages of each file whose bitmaps were added.

        Raises:
            HandoverError: they cannot be mapped.
        """
        first: dict[str, memoryview] = {}
        second: dict[str, memoryview] = {}
        for member in self.members.values():
            if member.lost:
                first[member.name], second[member.name] = self.bitmaps_of(member)
        return first, second

    def bitmaps_of(self, member: Member) -> tuple[memoryview, memoryview]:
        """Return both bitmaps of one file whose bitmaps were added."""
        length = lost_bytes(member.size, self._page_size)
        one, other = (
            self._state.map_range(offset, length) for offset in (member.lost, member.copy)
        )
        return one, other

    def add(self, name: str, size: int) -> Member:
        """Enter a file; its pages may be stored from here on.

        Raises:
            ClientError: no number is free, or the shared state cannot grow.
            ArenaError: the kernel gives no memory.
            HandoverError: the roster would be too long.
        """
        self.check_growable()
        types = {member.swap_type for member in self.members.values()}
        free = next((number for number in range(MAX_SWAPFILES) if number not in types), -1)
        if free < 0:
            raise ClientError(
                f"there are {MAX_SWAPFILES} swap files, more are not possible",
                hint="`zswapctl files remove NAME` makes room",
            )
        if self._next >= INODES:
            raise ClientError(
                f"{INODES} swap files have come and gone, no number is left",
                hint=f"swap off, then {restart_daemon()}",
            )
        member = self._with_bitmaps(Member(name, size, free, self._next))
        self._next += 1
        removed, self.removed = self.removed, self.removed - {name}
        try:
            self._write([*self.members.values(), member])
        except ZswapdError:
            self.removed = removed
            self._free(member)
            raise
        return member

    def resize(self, name: str, size: int) -> Member:
        """Return a member with another size and new bitmaps; `enter` makes it count.

        Raises:
            ArenaError, HandoverError, ClientError: as `add`; nothing is changed.
        """
        self.check_growable()
        return self._with_bitmaps(replace(self.members[name], size=size))

    def enter(self, member: Member) -> None:
        """Write the roster with a changed member, the result of `resize`.

        Raises:
            HandoverError: it is too long; the new bitmaps are given back.
        """
        before = self.members[member.name]
        try:
            self._write(
                [member if one.name == member.name else one for one in self.members.values()]
            )
        except ZswapdError:
            self._free(member)
            raise
        self._free(before)

    def remove(self, name: str, *, is_configured: bool) -> None:
        """Take a file without pages out of the roster, and give its bitmaps back.

        Args:
            name: the file.
            is_configured: the settings name it, and a successor shall not add it again.
        """
        member = self.members[name]
        if is_configured:
            self.removed.add(name)
        self._write([one for one in self.members.values() if one.name != name])
        self._free(member)

    def keep_removed(self, names: set[str]) -> None:
        """Forget removals of files that the settings do not name any more."""
        self.removed &= names

    def check_growable(self) -> None:
        """Do nothing if files may come.

        Raises:
            ClientError: the shared state is no file on tmpfs.
        """
        if not self._is_growable:
            raise ClientError(
                "swap files cannot come while the daemon runs: the pool's memory is a memfd, which"
                " the kernel may swap out between two workers",
                hint=f"put it into the config file, then {restart_daemon()}; or use a kernel from"
                " 6.4 on",
            )

    def _with_bitmaps(self, member: Member) -> Member:
        length = lost_bytes(member.size, self._page_size)
        used = self._ranges()
        lost = self._state.add_range(length, used)
        try:
            copy = self._state.add_range(length, [*used, (lost, length)])
        except ZswapdError:
            self._state.free_range(lost, length)
            raise
        return replace(member, lost=lost, copy=copy)

    def _ranges(self) -> list[tuple[int, int]]:
        if self._skipped < 0:
            self._skipped = self._state.added_bytes()
        skipped = [(self._state.extension_at, self._skipped)] if self._skipped else []
        return skipped + [
            (offset, lost_bytes(member.size, self._page_size))
            for member in self.members.values()
            for offset in (member.lost, member.copy)
            if offset
        ]

    def _free(self, member: Member) -> None:
        length = lost_bytes(member.size, self._page_size)
        for offset in (member.copy, member.lost):
            if offset:
                self._state.free_range(offset, length)

    def _write(self, members: list[Member]) -> None:
        members.sort(key=lambda member: member.swap_type)
        roster = {
            "made": list(self._made.items()),
            "next": self._next,
            "skipped": max(self._skipped, 0),
            "removed": sorted(self.removed),
            "members": [asdict(member) for member in members],
        }
        files = {member.name: member.size for member in members}
        self._state.write_geometry({**self._state.geometry, "files": files, "roster": roster})
        self.members = {member.name: member for member in members}
