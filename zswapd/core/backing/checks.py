# SPDX-License-Identifier: GPL-2.0-or-later
"""Refuses a backing that lies on our own mount, or in memory.

Writeback to our own files would wait for itself. A backing in memory would take the memory that it
is to free.

The checks follow a device down to its parts. These are the disk of a partition, the slaves of a dm
or md device, and the file of a loop device. A file lies on the device of its file system.

Limits: a file system of several devices (btrfs, bcachefs) names one of them only. A device on
another machine is not seen.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zswapd.errors import BackingError

if TYPE_CHECKING:
    from collections.abc import Iterator

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_MEMORY_DISKS = ("zram", "ram")


class MountedFileSystem(NamedTuple):
    """A line of mountinfo(5)."""

    kind: str
    """Type of the file system."""
    source: str
    """The source that mount(8) was given."""


def mounted_on(
    device: int, mountinfo: Path = Path("/proc/self/mountinfo")
) -> MountedFileSystem | None:
    """Return the mount with a file's st_dev, or None if this process sees no such mount."""
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    for line in mountinfo.read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[2] == wanted:
            kind, source = fields[fields.index(b"-") + 1 :][:2]
            return MountedFileSystem(os.fsdecode(kind), os.fsdecode(source))
    return None


def device_of(status: os.stat_result) -> int:
    """Return the block device that a file is on, or its st_dev if the kernel names no device."""
    with contextlib.suppress(OSError):
        mount = mounted_on(status.st_dev)
        # btrfs numbers its subvolumes, not its disks.
        if mount is not None and os.major(status.st_dev) == 0:
            return Path(mount.source).stat().st_rdev or status.st_dev
    return status.st_dev


def loops_below(device: int) -> Iterator[tuple[str, Path]]:
    """Yield the loop devices below a block device, each with its file."""
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    # The directory of a partition is in the directory of its disk.
    waiting = [base, base.parent] if (base / "partition").exists() else [base]
    while waiting:
        directory = waiting.pop()
        with contextlib.suppress(OSError):
            # The name may have any bytes: the loop device may belong to another program.
            yield (
                directory.name,
                Path(os.fsdecode((directory / "loop/backing_file").read_bytes().rstrip(b"\n"))),
            )
        with contextlib.suppress(OSError):
            waiting += [slave.resolve() for slave in (directory / "slaves").iterdir()]


def refuse_ours(device: int, path: Path, mountpoint: Path) -> None:
    """Refuse a device that lies on a file of our own mount, at any depth.

    Args:
        device: number of a block device.
        path: for messages.
        mountpoint: directory of our own files.

    Raises:
        BackingError: the device lies on one of these files.
    """
    ours, seen = mountpoint.resolve(), {device}
    waiting = [device]
    while waiting:
        for name, file in loops_below(waiting.pop()):
            if file.is_relative_to(ours):  # decided without stat(2): no worker may serve it yet
                raise BackingError(
                    f"backing.path {path} lies on our own file {file} ({name})",
                    hint="choose another path",
                )
            with contextlib.suppress(OSError):
                below = device_of(file.stat())
                waiting += {below} - seen
                seen.add(below)


def refuse_memory(path: Path, status: os.stat_result) -> None:
    """Refuse a file or device in memory.

    It would take the memory that it is to free, and the kernel swaps a tmpfs out, to us.

    Args:
        path: for messages.
        status: of the file, or of the block device.

    Raises:
        BackingError: the file or device is in memory.
    """
    if status.st_rdev:
        name = (
            Path(f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
            .resolve()
            .name
        )
        kind = "" if name.rstrip("0123456789") not in _MEMORY_DISKS else name
    else:
        mount = mounted_on(status.st_dev)
        kind = mount.kind if mount is not None and mount.kind in _IN_MEMORY else ""
    if kind:
        raise BackingError(
            f"backing.path {path} is in memory ({kind})", hint="name a file on a disk, or a disk"
        )
