# SPDX-License-Identifier: GPL-2.0-or-later
"""What is attached and swapped on now, read from /proc and /sys; `root` stands for the root directory, for tests.

Paths are compared as text: asking the file system about a file in the daemon's own mount would wait for the daemon. /proc/swaps
and mountinfo escape blanks and backslashes as octal numbers, sysfs does not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

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


def swap_areas(root: Path = Path("/")) -> list[SwapArea]:
    """Return everything that is swapped on, in the kernel's order; nothing if the kernel has no swap."""
    try:
        lines = (root / "proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return []
    fields = [line.split() for line in lines]
    return [
        SwapArea(unescape(path).removesuffix(_DELETED), int(size) * 1024, int(used) * 1024, int(priority))
        for path, _, size, used, priority in fields
    ]


def attachments(root: Path = Path("/")) -> list[Attachment]:
    """Return all loop devices that have a file, in the order of their numbers."""
    swaps = {area.path: area for area in swap_areas(root)}
    found = []
    for backing in (root / "sys/block").glob("loop*/loop/backing_file"):
        name = backing.parts[-3]
        try:
            path = backing.read_text().rstrip("\n").removesuffix(_DELETED)
        except OSError:  # detached between the glob and the read
            continue
        found.append(Attachment(f"/dev/{name}", Path(path), swaps.get(f"/dev/{name}")))
    return sorted(found, key=lambda item: (len(item.device), item.device))


def find_attached(file: Path, root: Path = Path("/")) -> Attachment | None:
    """Return the loop device over a file, one that is swapped on first, or None.

    Args:
        file: path of the backing file. Symbolic links on the way are resolved, down to the directory above its own, which is
            the mountpoint: to look further would be a question to the daemon.
        root: where /proc and /sys are.
    """
    path = file.absolute()
    path = path.parent.parent.resolve() / path.parent.name / path.name
    found = [item for item in attachments(root) if item.backing == path]
    return max(found, key=lambda item: item.swap is not None, default=None)


def mountpoint_of(device: str, root: Path = Path("/")) -> str | None:
    """Return where a block device is mounted, or None."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 2] == device:
            return unescape(fields[4])
    return None


def read_sysfs(name: str, attribute: str, root: Path = Path("/")) -> str:
    """Return an attribute of a block device, for example `queue/rotational`; nothing if it is not there."""
    try:
        return (root / "sys/block" / name / attribute).read_text().strip()
    except OSError:
        return ""


def unescape(field: str) -> str:
    """Undo the octal escapes of the kernel's tables."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)
