# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory limits of the control groups above this process, versions 1 and 2, and their room.

A process is charged to its own memory cgroup and to every cgroup above it, so each of them may have
a limit that counts. The kernel says where they are: /proc/self/cgroup names the cgroup,
/proc/self/mountinfo says where its hierarchy is mounted, and which cgroup is the root of the mount.
In a container both may be relative to the container's own root. Then the mountpoint is the highest
cgroup that can be seen, and its limit is that of the container.

    version 1   memory.limit_in_bytes and memory.memsw.limit_in_bytes of each cgroup; of those above
                the mountpoint, hierarchical_memory_limit in memory.stat
    version 2   memory.max and memory.high of each cgroup; of those above the mountpoint, nothing

At the limit of a cgroup, the process that is charged next reclaims, in its own context. If the
daemon is that process, it must not write pages to its own swap device. `may_swap` says whether
reclaim at a limit can do that.

`Limits` keeps the files open, so reading them again takes no memory from the kernel. `find` opens
the files each time.

Limits: after a move to another cgroup, the process still reads the files of the old one. With
version 2, limits above the container's root (a pod's, in Kubernetes) are not visible.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADROOM_LEAST, HEADROOM_MOST = 16 << 20, 64 << 20
"""Bounds of the headroom in bytes; it is 1/8 of a limit, kept free for page tables, a new spare
worker, and zswapctl in the same cgroup.
"""
_STAT_ROOM = 16 << 10
"""Longest memory.stat that is read, in bytes."""
_FILES = re.compile(rb"^(?:total_)?(inactive_file|active_file) (\d+)$", re.MULTILINE)
_HIERARCHICAL = re.compile(rb"^hierarchical_memory_limit (\d+)$", re.MULTILINE)
_KINDS = {
    1: (
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
    ),
    2: (("memory.max", "memory.current"), ("memory.high", "memory.current")),
}
"""Files with a limit and with the bytes charged to it, by the version of the hierarchy."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit above this process.

    Attributes:
        bytes: the bytes that may be charged.
        file: the file in which it can be read and set.
        version: the version of the hierarchy, 1 or 2.
        top: the directory of the highest cgroup that can be seen.
        is_own: whether it is the limit of this process' own cgroup, not of one above it.
    """

    bytes: int
    file: Path
    version: int
    top: Path
    is_own: bool


class Room(NamedTuple):
    """The limit that leaves the least room."""

    limit: int
    left: int
    """Bytes that may still be charged; negative if the limit was lowered below the charge."""
    file: str

    @property
    def spare(self) -> int:
        """Bytes that may be taken for pages: the room less the headroom."""
        return self.left - headroom(self.limit)


def headroom(limit: int) -> int:
    """Return the bytes that stay free below a limit."""
    return min(max(limit // 8, HEADROOM_LEAST), HEADROOM_MOST)


def find(root: Path = Path("/")) -> tuple[Limit, ...]:
    """Return all limits above this process that are below the machine's memory, lowest first.

    Args:
        root: where /proc and /sys are, for tests.
    """
    total = _memory_total(root)
    found: list[Limit] = []
    hidden: list[Limit] = []
    for directory, version, top, is_own in _cgroups(root):
        for name, _usage in _KINDS[version]:
            limit = _number(directory / name)
            if limit is not None and limit < total:
                found.append(Limit(limit, directory / name, version, top, is_own))
        if version == 1 and is_own:
            hidden.append(
                Limit(
                    _hidden_limit(directory), directory / "memory.stat", version, top, is_own=False
                )
            )
    found += [
        limit for limit in hidden if limit.bytes < min([total, *(item.bytes for item in found)])
    ]
    return tuple(sorted(found, key=lambda item: item.bytes))


def may_swap(limit: Limit) -> bool:
    """Return whether reclaim at a limit can swap out pages of any process below the limit."""
    directory = limit.file.parent
    if limit.version == 2:
        below_top = [directory, *directory.parents][
            : len(directory.relative_to(limit.top).parts) + 1
        ]
        return not any(_number(above / "memory.swap.max") == 0 for above in below_top)
    if limit.file.name.startswith("memory.memsw"):
        return False
    together = _number(directory / "memory.memsw.limit_in_bytes")
    if limit.file.name != "memory.stat" and together is not None and together <= limit.bytes:
        return False  # memory plus swap reaches its limit first, and swap-out does not lower that
    swappiness = [_number(below / "memory.swappiness") for below in _with_children(directory)]
    return limit.file.name == "memory.stat" or any(item != 0 for item in swappiness)


class Limits:
    """All limits above this process, with open files; a missing file is no limit and no error.

    Args:
        root: where /proc and /sys are, for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._total = _memory_total(root)
        self._buffer = memoryview(bytearray(_STAT_ROOM))
        self._files: list[tuple[str, int, int, int]] = []
        for directory, version, _top, _is_own in _cgroups(root):
            stat = _open(directory / "memory.stat")
            for name, usage in _KINDS[version]:
                limit = _open(directory / name)
                if limit >= 0:
                    self._files.append(
                        (str(directory / name), limit, _open(directory / usage), stat)
                    )

    def room(self) -> Room | None:
        """Return the limit that leaves least room now.

        None where there is no limit below the machine's memory.
        """
        least: Room | None = None
        for file, limit_fd, usage_fd, stat_fd in self._files:
            limit = self._read_number(limit_fd)
            if limit is None or limit >= self._total:
                continue
            room = Room(limit, limit - (self._read_number(usage_fd) or 0), file)
            # Near the limit, the page cache counts as room, because reclaim drops it first.
            if room.left < 2 * HEADROOM_MOST:
                room = room._replace(left=room.left + self._droppable(stat_fd))
            if least is None or room.spare < least.spare:
                least = room
        return least

    def _droppable(self, descriptor: int) -> int:
        """Return the bytes of files that reclaim can drop.

        These are all inactive files, and half of the active ones.
        """
        # the last value of a name is the total
        found = {name: int(count) for name, count in _FILES.findall(self._read(descriptor))}
        return found.get(b"inactive_file", 0) + found.get(b"active_file", 0) // 2

    def _read_number(self, descriptor: int) -> int | None:
        text = self._read(descriptor).strip()
        return int(text) if text.isdigit() else None

    def _read(self, descriptor: int) -> bytes:
        if descriptor < 0:
            return b""
        try:
            return bytes(self._buffer[: os.preadv(descriptor, [self._buffer], 0)])
        except OSError:
            return b""

    def close(self) -> None:
        """Close the files."""
        for descriptor in {fd for _file, *fds in self._files for fd in fds if fd >= 0}:
            os.close(descriptor)
        self._files.clear()


def _cgroups(root: Path) -> Iterator[tuple[Path, int, Path, bool]]:
    """Yield the memory cgroups above this process, its own first.

    Each is a tuple: directory, version, highest directory, whether it is the process' own.
    """
    paths = _own_paths(root)
    mounts = _mounts(root)
    for version in (1, 2):
        # Of several mounts of one hierarchy, the one that shows most of it counts.
        places = [place for found, place in mounts if found == version]
        own = paths.get(version)
        if own is None or not places:
            continue
        base, point = min(
            places, key=lambda place: (not own.is_relative_to(place[0]), len(place[0].parts))
        )
        top = root / str(point).lstrip("/")
        # A cgroup outside of the mount, as in a container, counts as the mount's root.
        is_seen = own.is_relative_to(base) and ".." not in own.parts
        directory = top / own.relative_to(base) if is_seen else top
        if not directory.is_dir():
            directory = top
        is_own = True
        while True:
            yield directory, version, top, is_own
            if directory == top or (
                version == 1 and _number(directory.parent / "memory.use_hierarchy") == 0
            ):
                break
            directory, is_own = directory.parent, False


def _own_paths(root: Path) -> dict[int, Path]:
    """Return the paths of this process' memory cgroups by the version of the hierarchy."""
    paths: dict[int, Path] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            paths[1] = Path(path)
        elif number == "0" and not controllers:
            paths[2] = Path(path)
    return paths


def _mounts(root: Path) -> list[tuple[int, tuple[Path, Path]]]:
    """Return every mount of a hierarchy with memory cgroups.

    Each is (version, (cgroup at its root, mountpoint)).
    """
    mounts = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        fields = line.split(" ")
        if "-" not in fields[5:]:
            continue
        kind, _source, options = (*fields[fields.index("-", 5) + 1 :], "", "")[:3]
        version = (
            2
            if kind == "cgroup2"
            else 1
            if kind == "cgroup" and "memory" in options.split(",")
            else 0
        )
        if version:
            mounts.append((version, (Path(_unescaped(fields[3])), Path(_unescaped(fields[4])))))
    return mounts


def _unescaped(name: str) -> str:
    """Return a name without mountinfo's octal codes of blanks, tabs, line ends and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name)


def _hidden_limit(directory: Path) -> int:
    """Return the limit that version 1 computes for a cgroup from all limits above it."""
    found = _HIERARCHICAL.search(_text(directory / "memory.stat").encode())
    return int(found[1]) if found else 1 << 62


def _with_children(directory: Path) -> Iterator[Path]:
    yield directory
    yield from (
        path.parent for path in directory.rglob("memory.swappiness") if path.parent != directory
    )


def _memory_total(root: Path) -> int:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) << 10 if found else 1 << 62


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
