# SPDX-License-Identifier: GPL-2.0-or-later
"""The directory that the mount shows: which names exist, and what their inodes are.

A mount holds a handful of files whose names are known when it is made, so the directory is a table, not a
tree of objects on some medium. Inode numbers are given once and never used again, so the kernel may cache
names and attributes for as long as it likes. Synchronous and free of pyfuse3; `operations.py` turns `Node`
into what the kernel is told.

Invariants: the root is inode 1 and its own parent; a name occurs once in its directory; numbers only grow.
"""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass
from typing import Protocol

from zswapd.errors import ConfigError

ROOT_INODE = 1
NAME_MAX = 255  # bytes, as the kernel has it


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


@dataclass(frozen=True, slots=True)
class Node:
    """One inode, as `stat` would tell it.

    Attributes:
        inode: its number, from 1 (the root) up.
        parent: inode of the directory that it is in.
        name: its name there; empty for the root.
        mode: file type and permission bits.
        size: bytes; 0 for directories.
        born_ns: when the mount was made, ns since the epoch; stands for all three times of the file.
        file: what the data comes from; None for directories.
    """

    inode: int
    parent: int
    name: bytes
    mode: int
    size: int
    born_ns: int
    file: BlockFile | None = None

    @property
    def is_directory(self) -> bool:
        """Whether it has entries instead of data."""
        return stat.S_ISDIR(self.mode)


class Directory:
    """All inodes of a mount; starts with an empty root.

    Everything belongs to root and is closed to everybody else: files have mode 0600, the root has 0700.

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
        name = _checked_name(file.name)
        if (ROOT_INODE, name) in self._names:
            raise ConfigError(f"two files are named {file.name!r}", hint="give each swap file a name of its own")
        inode = max(self._nodes) + 1
        node = Node(inode, ROOT_INODE, name, stat.S_IFREG | 0o600, file.size, self.born_ns, file)
        self._nodes[inode] = node
        self._names[ROOT_INODE, name] = node
        self.block_files[inode] = file
        return inode

    def node(self, inode: int) -> Node | None:
        """Return the inode of this number, None if there is none."""
        return self._nodes.get(inode)

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """Return what `name` (which may be `.` or `..`) is in the directory `parent`, None if nothing."""
        if name == b".":
            return self._nodes.get(parent)
        if name == b"..":
            directory = self._nodes.get(parent)
            return self._nodes[directory.parent] if directory is not None else None
        return self._names.get((parent, name))

    def entries(self, parent: int, after: int = 0) -> list[Node]:
        """Return what is in a directory, by inode, from the first number above `after` on."""
        return [node for (owner, _), node in self._names.items() if owner == parent and node.inode > after]

    @property
    def total_size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.block_files.values())

    def __len__(self) -> int:
        return len(self._nodes)


def _checked_name(name: str) -> bytes:
    encoded = name.encode(errors="surrogateescape")
    if not encoded or encoded in {b".", b".."} or len(encoded) > NAME_MAX or not name.isprintable() or "/" in name:
        raise ConfigError(
            f"{name!r} cannot be the name of a swap file",
            hint=f"use 1 to {NAME_MAX} printable bytes without a slash",
        )
    return encoded
