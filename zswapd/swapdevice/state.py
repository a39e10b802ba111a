# SPDX-License-Identifier: GPL-2.0-or-later
"""What is attached and swapped on now, read from /proc and /sys.

`root` stands for the root directory, for tests.

Paths are compared as text: asking the file system about a file in the daemon's own mount would wait
for the daemon. /proc/swaps and mountinfo escape blanks and backslashes as octal numbers, sysfs does
not. Names are bytes, and strangers' need not be UTF-8.

A file has other paths, too: it is `/swap` to the kernel when its mount was detached (`umount -l`),
and another one below each bind mount. Who must not miss one knows the file's `Identity`. The kernel
is asked for that of few loop devices, since it may ask the file system: of those over a file of
that name, unless it is in another FUSE mount, whose daemon may hang.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zswapd.paths import without_links

if TYPE_CHECKING:
    from zswapd.swapdevice.kernel import Kernel

_OCTAL = re.compile(r"\\([0-7]{3})")
_DELETED = " (deleted)"


class SwapArea(NamedTuple):
    """One line of /proc/swaps; sizes in bytes."""

    path: str
    size: int
    used: int
    """Slots in use, including those whose page is back in memory as well (swap cache)."""
    priority: int


class Attachment(NamedTuple):
    """A loop device over a file, and the swap on it, if any."""

    device: str
    """Path of the device node, `/dev/loopN`."""
    backing: Path
    swap: SwapArea | None

    @property
    def name(self) -> str:
        """The device's name in sysfs."""
        return self.device.removeprefix("/dev/")


class Identity(NamedTuple):
    """What a file is, under whatever path."""

    device: int
    """Of its file system, as in st_dev."""
    inode: int


def swap_areas(root: Path = Path("/")) -> list[SwapArea]:
    """Return everything that is swapped on, in the kernel's order.

    Nothing if the kernel has no swap.
    """
    try:
        lines = _read(root / "proc/swaps").split("\n")[1:]
    except OSError:
        return []
    fields = [
        line.rsplit(None, 4) for line in lines if line
    ]  # from the right: a name may have blanks of Unicode's in it
    return [
        SwapArea(
            unescape(path).removesuffix(_DELETED), int(size) * 1024, int(used) * 1024, int(priority)
        )
        for path, _, size, used, priority in fields
    ]


def attachments(root: Path = Path("/")) -> list[Attachment]:
    """Return all loop devices that have a file, in the order of their numbers."""
    swaps = {area.path: area for area in swap_areas(root)}
    found = []
    for backing in (root / "sys/block").glob("loop*/loop/backing_file"):
        name = backing.parts[-3]
        try:
            path = _read(backing).rstrip("\n").removesuffix(_DELETED)
        except OSError:  # detached between the glob and the read
            continue
        found.append(Attachment(f"/dev/{name}", Path(path), swaps.get(f"/dev/{name}")))
    return sorted(found, key=lambda item: (len(item.device), item.device))


def find_attached(
    file: Path,
    root: Path = Path("/"),
    *,
    identity: Identity | None = None,
    kernel: Kernel | None = None,
) -> Attachment | None:
    """Return the loop device over a file, one that is swapped on first, or None.

    Args:
        file: path of the backing file. Symbolic links on the way are resolved, down to its
            directory, which is the mountpoint: to look further would be a question to the daemon.
        root: where /proc and /sys are.
        identity: what the file is, for it to be found under any path.
        kernel: answers for the identity of loop devices; without it, paths alone count.
    """
    found = find_all_attached(file, root, identity=identity, kernel=kernel)
    return max(found, key=lambda item: item.swap is not None, default=None)


def find_all_attached(
    file: Path,
    root: Path = Path("/"),
    *,
    identity: Identity | None = None,
    kernel: Kernel | None = None,
) -> list[Attachment]:
    """Return all loop devices over a file; the arguments are those of `find_attached`."""
    path = without_links(file.parent) / file.name
    return [
        item
        for item in attachments(root)
        if item.backing == path
        or (identity and kernel and _is_over(item, path.name, identity, kernel, root))
    ]


def _is_over(item: Attachment, name: str, identity: Identity, kernel: Kernel, root: Path) -> bool:
    if item.backing.name != name or _is_in_other_fuse_mount(item.backing, identity.device, root):
        return False
    try:
        return kernel.loop_identity(item.device) == identity
    except OSError:  # it has just let go
        return False


def _is_in_other_fuse_mount(path: Path, device: int, root: Path) -> bool:
    """Say whether a path is in a FUSE mount of another device than this one."""
    mounts = [mount for mount in mounts_of(root) if path.is_relative_to(mount.path)]
    covering = max(mounts, key=lambda mount: len(mount.path.parts), default=None)
    return covering is not None and covering.kind.startswith("fuse.") and covering.device != device


class MountEntry(NamedTuple):
    """One line of mountinfo."""

    path: Path
    kind: str
    source: str
    device: int
    """As in st_dev."""


def mounts_of(root: Path = Path("/")) -> list[MountEntry]:
    """Return what this process sees mounted, in the kernel's order."""
    entries = []
    for line in filter(None, _read(root / "proc/self/mountinfo").split("\n")):
        fields = line.split(" ")
        kind, source = fields[fields.index("-") + 1 :][:2]
        major, minor = map(int, fields[2].split(":"))
        entries.append(
            MountEntry(Path(unescape(fields[4])), kind, source, os.makedev(major, minor))
        )
    return entries


def left_on(mountpoint: Path, root: Path = Path("/")) -> dict[str, str]:
    """Return what has to be done before a mount can go.

    For each loop device over a file in it, that is the command that frees the device.
    """
    commands = {}
    for item in attachments(root):
        if item.backing.is_relative_to(mountpoint):
            place = mountpoint_of(item.device, root)
            free = f"umount {shlex.quote(place)}" if place else f"losetup --detach {item.device}"
            commands[item.device] = f"swapoff {item.device}" if item.swap else free
    return commands


def mountpoint_of(device: str, root: Path = Path("/")) -> str | None:
    """Return where a block device is mounted, or None."""
    return next((str(mount.path) for mount in mounts_of(root) if mount.source == device), None)


def read_sysfs(name: str, attribute: str, root: Path = Path("/")) -> str:
    """Return an attribute of a block device, for example `queue/rotational`.

    Nothing if it is not there.
    """
    try:
        return _read(root / "sys/block" / name / attribute).strip()
    except OSError:
        return ""


def unescape(field: str) -> str:
    """Undo the octal escapes of the kernel's tables."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    return os.fsdecode(path.read_bytes())
