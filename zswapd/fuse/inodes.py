# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory tree of the mount: names and inodes.

A mount has few files: swap files in the root, directories of small text files, and one directory of
cache volumes. The tree is therefore a table. This module is synchronous and does not use pyfuse3.
`operations.py` converts a `Node` to the form for the kernel.

A file stays open during a takeover, and the kernel continues to use its inode number. A number
therefore depends only on the configuration and on names:

- swap files have 2, 3, … in the order of the configuration, and further ones if they come at run
  time (handover/roster.py);
- directories and text files have a hash of their path;
- cached files have a number that `volumes/` keeps.

The kernel may cache names and attributes without a time limit, except those of cached files. Cached
files appear, disappear and change their length.

Invariants: the root is inode 1 and its own parent. A name occurs once in its directory. Numbers
above 1 and below HASHED are block files.
"""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from xxhash import xxh3_64_intdigest

from zswapd.errors import ConfigError, InvariantError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT_INODE = 1
NAME_MAX = 255  # bytes, as the kernel has it
HASHED = 1 << 40
"""First number of inodes by hash. The last one is below twice this."""


class Refusal(Protocol):
    """The reason of a refused write, such as `pam.base.RejectReason`."""

    @property
    def errno_(self) -> int:
        """The errno that the writer gets."""


class BlockFile(Protocol):
    """The data of a swap file, such as `block.device.Device`.

    The caller passes only ranges inside the file. Failures are `ZswapdError`.
    """

    @property
    def name(self) -> str:
        """The file's name in the mount."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset` on. Bytes that were never written are zero."""

    def write(self, offset: int, data: memoryview) -> Refusal | None:
        """Store all of `data` and return None, or return the reason if not all was stored."""

    def discard(self, offset: int, length: int) -> None:
        """Discard a range of bytes; it reads as zeros afterwards."""


class TextFile(Protocol):
    """A small file whose content is made at each open, as in sysfs. Its size is unknown to `stat`.

    Both functions run in the event loop's thread and are short. They raise `ZswapdError` with the
    errno for the client.
    """

    @property
    def writable(self) -> bool:
        """True if the file can be written; its mode is 0600 instead of 0400."""

    def read(self) -> bytes:
        """Return the present content."""

    def write(self, data: bytes) -> None:
        """Apply the data of one write, completely or not at all. The offset does not matter."""


class CachedFile(Protocol):
    """A file that the kernel's page cache may hold, such as `volumes.volume.Volume`.

    Its coroutines may wait for a device. They run beside the page path. Failures are `ZswapdError`.
    """

    @property
    def size(self) -> int:
        """Last known size in bytes."""

    @property
    def mtime_ns(self) -> int:
        """Time of the last change by another program, in ns since the epoch."""

    @property
    def attribute_s(self) -> float:
        """Time in seconds for which the kernel may cache size and times."""

    @property
    def writable(self) -> bool:
        """True if it can be opened for writing."""

    async def refresh(self) -> None:
        """Check the backing file if size and times may be too old."""

    async def opened(self) -> None:
        """Check the backing file, so that size, times and page cache are as new as this call."""

    def closed(self) -> None:
        """Record that one open file is closed, and that its mappings are gone."""

    async def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end of the file. It may be cancelled."""

    async def write(self, offset: int, data: bytes) -> int:
        """Write data and return the number of written bytes, at least 1."""

    async def sync(self) -> None:
        """Flush the written data to the device."""


@dataclass(frozen=True, slots=True)
class Node:
    """One inode.

    Attributes:
        inode: its number; the root has 1.
        parent: inode of its directory.
        name: its name in the directory; empty for the root.
        mode: file type and permission bits.
        size: size in bytes; 0 for directories and text files. A cached file has its own size.
        born_ns: time of the mount in ns since the epoch; all three times of the file.
        file: the data of a block file, otherwise None.
        text: the content of a text file, otherwise None.
        cached: the data of a cached file, otherwise None.
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
        """True for a directory."""
        return stat.S_ISDIR(self.mode)


class Directory:
    """All inodes of a mount, at first only an empty root.

    All files belong to root, and other users have no access: directories have mode 0700, files 0600
    or 0400.

    Args:
        born_ns: time of the mount in ns since the epoch; now by default.

    Attributes:
        block_files: the block files by inode; the page path makes one look-up a request.
        born_ns: as above.
    """

    def __init__(self, *, born_ns: int | None = None) -> None:
        self.born_ns = time.time_ns() if born_ns is None else born_ns
        root = Node(ROOT_INODE, ROOT_INODE, b"", stat.S_IFDIR | 0o700, 0, self.born_ns)
        self._nodes: dict[int, Node] = {ROOT_INODE: root}
        self._names: dict[tuple[int, bytes], Node] = {}
        self.block_files: dict[int, BlockFile] = {}

    def add_block_file(self, file: BlockFile, inode: int = 0) -> int:
        """Add a block file to the root and return its inode.

        Args:
            file: its data.
            inode: its number, which no other file had; 0 for the next one.

        Raises:
            ConfigError: the name is not a valid file name, or it exists.
        """
        inode = inode or max(self.block_files, default=ROOT_INODE) + 1
        name = self._free_name(ROOT_INODE, file.name, "swap")
        self._add(
            Node(inode, ROOT_INODE, name, stat.S_IFREG | 0o600, file.size, self.born_ns, file)
        )
        self.block_files[inode] = file
        return inode

    def add_directory(self, name: str, parent: int = ROOT_INODE) -> int:
        """Add a directory and return its inode.

        Raises:
            ConfigError: the name is not a valid file name, or it exists.
        """
        encoded = self._free_name(parent, name, "directory")
        inode = self._hashed(parent, encoded)
        self._add(Node(inode, parent, encoded, stat.S_IFDIR | 0o700, 0, self.born_ns))
        return inode

    def add_text_file(self, parent: int, name: str, text: TextFile) -> int:
        """Add a text file to a directory and return its inode.

        Raises:
            ConfigError: the name is not a valid file name, or it exists.
        """
        encoded = self._free_name(parent, name, "text")
        inode = self._hashed(parent, encoded)
        mode = stat.S_IFREG | (0o600 if text.writable else 0o400)
        self._add(Node(inode, parent, encoded, mode, 0, self.born_ns, text=text))
        return inode

    def add_cached_file(self, parent: int, name: str, inode: int, file: CachedFile) -> None:
        """Add a cached file to a directory.

        Args:
            parent: inode of the directory.
            name: its name in the directory.
            inode: its number, from 2 * HASHED up and below 4 * HASHED, which no other file had.
            file: its data.

        Raises:
            ConfigError: the name is not a valid file name, or it exists.
        """
        encoded = self._free_name(parent, name, "cached")
        mode = stat.S_IFREG | (0o600 if file.writable else 0o400)
        self._add(Node(inode, parent, encoded, mode, 0, self.born_ns, cached=file))

    def inode_of(self, name: str) -> int:
        """Return the inode of a block file, or 0."""
        node = self._names.get((ROOT_INODE, name.encode(errors="surrogateescape")))
        return node.inode if node is not None and node.file is not None else 0

    def resized(self, inode: int) -> None:
        """Take the present size of a block file."""
        node = self._nodes[inode]
        assert node.file is not None
        self._add(replace(node, size=node.file.size))

    def remove(self, inode: int) -> None:
        """Remove a block file or a cached file.

        Later requests of processes that have it open get ESTALE.
        """
        node = self._nodes.pop(inode)
        del self._names[node.parent, node.name]
        self.block_files.pop(inode, None)

    def _free_name(self, parent: int, name: str, kind: str) -> bytes:
        encoded = _checked_name(name, kind)
        if (parent, encoded) in self._names:
            raise ConfigError(
                f"two files are named {name!r}", hint=f"give each {kind} file a name of its own"
            )
        return encoded

    def _hashed(self, parent: int, name: bytes) -> int:
        """Return the number of a path, which is the same in every worker."""
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
        """Return the inode of a number, or None."""
        return self._nodes.get(inode)

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """Return the inode of a name in a directory, or None. The name may be `.` or `..`."""
        if name == b".":
            return self._nodes.get(parent)
        if name == b"..":
            directory = self._nodes.get(parent)
            return self._nodes[directory.parent] if directory is not None else None
        return self._names.get((parent, name))

    def entries(self, parent: int, after: int = 0) -> list[Node]:
        """Return the entries of a directory whose inode is above `after`, in order of inodes."""
        found = [
            node
            for (owner, _), node in self._names.items()
            if owner == parent and node.inode > after
        ]
        return sorted(found, key=lambda node: node.inode)

    def subdirectories(self, parent: int) -> Iterator[Node]:
        """Yield the subdirectories of a directory."""
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
