# SPDX-License-Identifier: GPL-2.0-or-later
"""What a backing lies on: never our own files, since writeback would wait for itself.

And no memory, which it is to free.

A device is looked through down to what it consists of: its disk, if it is a partition, slaves (dm,
md), and the file of a loop device. A file lies on the device of its file system.

Limits: file systems of several devices (btrfs, bcachefs) name one of them; what is on another
machine is not seen.
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


class MountEntry(NamedTuple):
    """A line of mountinfo(5)."""

    kind: str
    """Of its file system."""
    source: str
    """What is mounted, as mount(8) was told."""


def mounted_on(device: int, mountinfo: Path = Path("/proc/self/mountinfo")) -> MountEntry | None:
    """Return the mount of a file's st_dev, None if there is none to be seen."""
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    for line in mountinfo.read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[2] == wanted:
            kind, source = fields[fields.index(b"-") + 1 :][:2]
            return MountEntry(os.fsdecode(kind), os.fsdecode(source))
    return None


def device_of(status: os.stat_result) -> int:
    """Return the block device that a file is on.

    Or its st_dev if that is none that the kernel tells of.
    """
    with contextlib.suppress(OSError):
        mount = mounted_on(status.st_dev)
        if (
            mount is not None and os.major(status.st_dev) == 0
        ):  # btrfs numbers its subvolumes, not its disks
            return Path(mount.source).stat().st_rdev or status.st_dev
    return status.st_dev


def loops_below(device: int) -> Iterator[tuple[str, Path]]:
    """Yield the loop devices that a block device consists of, with their files."""
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    # A partition's directory is in its disk's.
    waiting = [base, base.parent] if (base / "partition").exists() else [base]
    while waiting:
        directory = waiting.pop()
        with contextlib.suppress(OSError):
            # Any bytes: somebody else's loop device may be one of them.
            yield (
                directory.name,
                Path(os.fsdecode((directory / "loop/backing_file").read_bytes().rstrip(b"\n"))),
            )
        with contextlib.suppress(OSError):
            waiting += [slave.resolve() for slave in (directory / "slaves").iterdir()]


def refuse_ours(device: int, path: Path, mountpoint: Path) -> None:
    """Refuse what lies on our own files, however deep.

    Args:
        device: a block device's number.
        path: for messages.
        mountpoint: where our files are.

    Raises:
        BackingError: it does.
    """
    ours, seen = mountpoint.resolve(), {device}
    waiting = [device]
    while waiting:
        for name, file in loops_below(waiting.pop()):
            if file.is_relative_to(ours):  # and not asked of: nobody may serve it yet
                raise BackingError(
                    f"backing.path {path} lies on our own file {file} ({name})",
                    hint="choose another path",
                )
            with contextlib.suppress(OSError):
                below = device_of(file.stat())
                waiting += {below} - seen
                seen.add(below)


def refuse_memory(path: Path, status: os.stat_result) -> None:
    """Refuse what lies in memory.

    It would take what it is to free, and a tmpfs is swapped out, to us.

    Args:
        path: for messages.
        status: of the file, or of the block device.

    Raises:
        BackingError: it does.
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
