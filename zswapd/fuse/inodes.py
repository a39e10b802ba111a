# SPDX-License-Identifier: GPL-2.0-or-later
"""The directories that the mount shows: which names exist, and what their inodes are.

A mount holds a handful of files: swap files in the root, directories of small text files, and one
of cache volumes. So the tree is a table, not objects on some medium. Synchronous and free of
pyfuse3; `operations.py` turns `Node` into what the kernel is told.

A file stays open when one worker takes over from another, and the kernel goes on asking by number.
Hence numbers depend on nothing but the configuration and names: swap files have 2, 3, … in the
order in which they are configured, everything else a hash of its path, but for cached files, whose
giver remembers their numbers. The kernel may cache all of it for as long as it likes, except what
it knows of cached files, which come, go, and change their length.

Invariants: the root is inode 1 and its own parent; a name occurs once in its directory; numbers
below HASHED are block files.
"""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from xxhash import xxh3_64_intdigest

from zswapd.errors import ConfigError, InvariantError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT_INODE = 1
NAME_MAX = 255  # bytes, as the kernel has it
HASHED = 1 << 40
"""Numbers from here on, below twice this, are those of names."""


class Refusal(Protocol):
    """Why a write was turned away; `pam.base.RejectReason` is one."""

    @property
    def errno_(self) -> int:
        """The errno that the writer gets."""


class BlockFile(Protocol):
    """What a file with data needs behind it; `block.device.Device` is one.

    Ranges handed to it lie inside the file. Failures are `ZswapdError`.
    """

    @property
    def name(self) -> str:
        """The file's name in the mount."""

    @property
    def size(self) -> int:
        """Bytes; never changes."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on; those never written are zero."""

    def write(self, offset: int, data: memoryview) -> Refusal | None:
        """Store all of `data` and return None, or say why some of it was not stored."""

    def discard(self, offset: int, length: int) -> None:
        """Forget a range of bytes; it reads as zeros afterwards."""


class TextFile(Protocol):
    """A small file whose content is made each time it is opened, as sysfs has them.

    It has no size that `stat` could tell.

    Both functions run in the event loop's thread, are short, and raise `ZswapdError` with the errno
    that the caller gets.
    """

    @property
    def writable(self) -> bool:
        """Whether `write` does anything: mode 0600 instead of 0400."""

    def read(self) -> bytes:
        """Return the content of now."""

    def write(self, data: bytes) -> None:
        """Take in what was written at once, wherever in the file: whole, or not at all."""


class CachedFile(Protocol):
    """A file whose pages the kernel's page cache may keep; `volumes.volume.Volume` is one.

    Everything may take as long as a device does, and runs beside the page path. Failures are
    `ZswapdError`.
    """

    @property
    def size(self) -> int:
        """Bytes, as far as it is known."""

    @property
    def mtime_ns(self) -> int:
        """When its contents were last changed by somebody else, ns since the epoch."""

    @property
    def attribute_s(self) -> float:
        """How long the kernel may go by size and times, seconds."""

    @property
    def writable(self) -> bool:
        """Whether it can be opened for writing."""

    async def refresh(self) -> None:
        """Make sure that size and times are not older than they may be."""

    async def opened(self) -> None:
        """Make sure that neither they nor the kernel's page cache are older than this call."""

    def closed(self) -> None:
        """Take note that one of those who have opened it has it no more, mappings included."""

    async def read(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer at the end of the file. May be cancelled."""

    async def write(self, offset: int, data: bytes) -> int:
        """Write, and return how many bytes; at least one."""

    async def sync(self) -> None:
        """Have what was written reach the device."""


@dataclass(frozen=True, slots=True)
class Node:
    """One inode, as `stat` would tell it.

    Attributes:
        inode: its number, from 1 (the root) up.
        parent: inode of the directory that it is in.
        name: its name there; empty for the root.
        mode: file type and permission bits.
        size: bytes; 0 for directories, text files and cached files, which know better.
        born_ns: when the mount was made, ns since the epoch; stands for all three times of the
            file.
        file: what the data comes from; None for directories and text files.
        text: what a text file's content comes from, else None.
        cached: what a cached file's data comes from, else None.
    """

    inode: int
    parent: int
    name: bytes
    mode: int
    size: int
    born_ns: int
    file: BlockFile | None = None
    text: TextFile | None = None
    cached: CachedFile | None = None

    @property
    def is_directory(self) -> bool:
        """Whether it has entries instead of data."""
        return stat.S_ISDIR(self.mode)


class Directory:
    """All inodes of a mount; starts with an empty root.

    Everything belongs to root and is closed to everybody else: directories have mode 0700, files
    0600 or 0400.

    Args:
        born_ns: when the mount was made, ns since the epoch; now by default.

    Attributes:
        block_files: the files with data, by inode, for the page path: one look-up per request.
        born_ns: as above.
    """

    def __init__(self, *, born_ns: int | None = None) -> None:
        self.born_ns = time.time_ns() if born_ns is None else born_ns
        root = Node(ROOT_INODE, ROOT_INODE, b"", stat.S_IFDIR | 0o700, 0, self.born_ns)
        self._nodes: dict[int, Node] = {ROOT_INODE: root}
        self._names: dict[tuple[int, bytes], Node] = {}
        self.block_files: dict[int, BlockFile] = {}

    def add_block_file(self, file: BlockFile) -> int:
        """Put a file into the root and return its inode.

        Raises:
            ConfigError: the name cannot be a file's name, or is taken.
        """
        inode = max(self.block_files, default=ROOT_INODE) + 1
        name = self._free_name(ROOT_INODE, file.name, "swap")
        self._add(
            Node(inode, ROOT_INODE, name, stat.S_IFREG | 0o600, file.size, self.born_ns, file)
        )
        self.block_files[inode] = file
        return inode

    def add_directory(self, name: str, parent: int = ROOT_INODE) -> int:
        """Make a directory and return its inode.

        Raises:
            ConfigError: the name cannot be a directory's name, or is taken.
        """
        encoded = self._free_name(parent, name, "directory")
        inode = self._hashed(parent, encoded)
        self._add(Node(inode, parent, encoded, stat.S_IFDIR | 0o700, 0, self.born_ns))
        return inode

    def add_text_file(self, parent: int, name: str, text: TextFile) -> int:
        """Put a text file into a directory and return its inode.

        Raises:
            ConfigError: the name cannot be a file's name, or is taken.
        """
        encoded = self._free_name(parent, name, "text")
        inode = self._hashed(parent, encoded)
        mode = stat.S_IFREG | (0o600 if text.writable else 0o400)
        self._add(Node(inode, parent, encoded, mode, 0, self.born_ns, text=text))
        return inode

    def add_cached_file(self, parent: int, name: str, inode: int, file: CachedFile) -> None:
        """Put a cached file into a directory.

        Args:
            parent: inode of the directory.
            name: in it.
            inode: from 2 * HASHED up, below 4 * HASHED; one that was never another's.
            file: what it is.

        Raises:
            ConfigError: the name cannot be a file's name, or is taken.
        """
        encoded = self._free_name(parent, name, "cached")
        mode = stat.S_IFREG | (0o600 if file.writable else 0o400)
        self._add(Node(inode, parent, encoded, mode, 0, self.born_ns, cached=file))

    def remove(self, inode: int) -> None:
        """Forget a cached file. Who has it open asks on, and is told that there is none."""
        node = self._nodes.pop(inode)
        del self._names[node.parent, node.name]

    def _free_name(self, parent: int, name: str, kind: str) -> bytes:
        encoded = _checked_name(name, kind)
        if (parent, encoded) in self._names:
            raise ConfigError(
                f"two files are named {name!r}", hint=f"give each {kind} file a name of its own"
            )
        return encoded

    def _hashed(self, parent: int, name: bytes) -> int:
        """Return the number that this path has in every worker."""
        inode = HASHED | (xxh3_64_intdigest(name, parent) & (HASHED - 1))
        if inode in self._nodes:
            raise InvariantError(
                f"{name!r} and {self._nodes[inode].name!r} have the same inode",
                hint="report this as a bug",
            )
        return inode

    def _add(self, node: Node) -> None:
        self._nodes[node.inode] = node
        self._names[node.parent, node.name] = node

    def node(self, inode: int) -> Node | None:
        """Return the inode of this number, None if there is none."""
        return self._nodes.get(inode)

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """Return what `name` (which may be `.` or `..`) is in the directory `parent`.

        None if nothing.
        """
        if name == b".":
            return self._nodes.get(parent)
        if name == b"..":
            directory = self._nodes.get(parent)
            return self._nodes[directory.parent] if directory is not None else None
        return self._names.get((parent, name))

    def entries(self, parent: int, after: int = 0) -> list[Node]:
        """Return what is in a directory, by inode, from the first number above `after` on."""
        found = [
            node
            for (owner, _), node in self._names.items()
            if owner == parent and node.inode > after
        ]
        return sorted(found, key=lambda node: node.inode)

    def subdirectories(self, parent: int) -> Iterator[Node]:
        """Yield the directories in a directory."""
        return (node for node in self.entries(parent) if node.is_directory)

    def __len__(self) -> int:
        return len(self._nodes)


def _checked_name(name: str, kind: str) -> bytes:
    encoded = name.encode(errors="surrogateescape")
    if (
        not encoded
        or encoded in {b".", b".."}
        or len(encoded) > NAME_MAX
        or not name.isprintable()
        or "/" in name
    ):
        raise ConfigError(
            f"{name!r} cannot be the name of a {kind} file",
            hint=f"use 1 to {NAME_MAX} printable bytes without a slash",
        )
    return encoded
