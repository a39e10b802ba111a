# SPDX-License-Identifier: GPL-2.0-or-later
"""The present loop devices and swap areas, read from /proc and /sys.

`root` stands for the root directory, for tests.

Paths are compared as text, because a call to the daemon's own mount would wait for the daemon.
/proc/swaps and mountinfo escape spaces and backslashes as octal numbers. sysfs does not. Names are
bytes, and those of other programs need not be UTF-8.

A file can have several paths. For the kernel it is `/swap` after its mount was detached
(`umount -l`), and it has another path below each bind mount. A caller that must find all loop
devices passes the file's `Identity`. The kernel may ask the file system for the identity of a loop
device's file, and that may hang. So it is read only for files of the same name, and not for files
in another FUSE mount.
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
    """Slots in use, including those whose page is also in memory (swap cache)."""
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
    """The identity of a file, which does not depend on its path."""

    device: int
    """The st_dev of its file system."""
    inode: int


def swap_areas(root: Path = Path("/")) -> list[SwapArea]:
    """Return all swap areas in the kernel's order; none if the kernel has no swap."""
    try:
        lines = _read(root / "proc/swaps").split("\n")[1:]
    except OSError:
        return []
    # Split from the right, because a name may contain Unicode spaces.
    fields = [line.rsplit(None, 4) for line in lines if line]
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
    """Return the loop device over a file, preferably one that is swapped on, or None.

    Args:
        file: path of the backing file. Symbolic links are resolved down to its directory, which is
            the mountpoint. The last part is not resolved, because that would ask the daemon.
        root: directory that holds /proc and /sys.
        identity: identity of the file, to find it by any path.
        kernel: returns the identities of loop devices; without it only paths count.
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
    except OSError:  # it was detached meanwhile
        return False


def _is_in_other_fuse_mount(path: Path, device: int, root: Path) -> bool:
    """Return whether a path is in a FUSE mount with another st_dev."""
    mounts = [mount for mount in mounts_of(root) if path.is_relative_to(mount.path)]
    covering = max(mounts, key=lambda mount: len(mount.path.parts), default=None)
    return covering is not None and covering.kind.startswith("fuse.") and covering.device != device


class MountEntry(NamedTuple):
    """One line of mountinfo."""

    path: Path
    kind: str
    source: str
    device: int
    """The st_dev of its files."""


def mounts_of(root: Path = Path("/")) -> list[MountEntry]:
    """Return the mounts in this process's namespace, in the kernel's order."""
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
    """Return the commands that must run before a mount can be unmounted.

    There is one for each loop device over a file in the mount, by path of the device. It unmounts
    the device, swaps off or detaches.
    """
    commands = {}
    for item in attachments(root):
        if item.backing.is_relative_to(mountpoint):
            place = mountpoint_of(item.device, root)
            free = f"umount {shlex.quote(place)}" if place else f"losetup --detach {item.device}"
            commands[item.device] = f"swapoff {item.device}" if item.swap else free
    return commands


def mountpoint_of(device: str, root: Path = Path("/")) -> str | None:
    """Return the mountpoint of a block device, or None."""
    return next((str(mount.path) for mount in mounts_of(root) if mount.source == device), None)


def read_sysfs(name: str, attribute: str, root: Path = Path("/")) -> str:
    """Return an attribute of a block device, such as `queue/rotational`; empty if absent."""
    try:
        return _read(root / "sys/block" / name / attribute).strip()
    except OSError:
        return ""


def unescape(field: str) -> str:
    """Undo the octal escapes of the kernel's tables."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def _read(path: Path) -> str:
    return os.fsdecode(path.read_bytes())
