# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's merging of requests to a loop device: `queue/nomerges`, 0 for yes, 2 for never.

A write to that file freezes the queue: the kernel waits until all requests in flight are answered,
and new requests wait. The thread that answers requests must therefore never write it. The write
takes milliseconds while requests are answered.

A loop device keeps the value after its file is detached.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.swapdevice.state import find_all_attached, read_sysfs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from zswapd.swapdevice.kernel import Kernel
    from zswapd.swapdevice.state import Identity

MERGED, UNMERGED = "0", "2"


def loops_over(
    files: Iterable[Path],
    identities: Mapping[Path, Identity],
    *,
    kernel: Kernel | None = None,
    root: Path = Path("/"),
) -> set[str]:
    """Return the paths of all loop devices over some files, swapped on or not.

    Args:
        files: the backing files.
        identities: the identities of the files, to find them by any path.
        kernel: returns the identities of loop devices.
        root: directory that holds /proc and /sys.
    """
    found = (
        find_all_attached(file, root, identity=identities.get(file), kernel=kernel)
        for file in files
    )
    return {item.device for items in found for item in items}


def set_merging(device: str, value: str, root: Path = Path("/")) -> bool:
    """Set `queue/nomerges` of a loop device; return whether it has the value."""
    name = device.removeprefix("/dev/")
    if read_sysfs(name, "queue/nomerges", root) != value:
        with contextlib.suppress(OSError):
            (root / "sys/block" / name / "queue/nomerges").write_text(value)
    return read_sysfs(name, "queue/nomerges", root) == value


def restore_merging(device: str, root: Path = Path("/")) -> None:
    """Turn merging on again, if it is off."""
    if read_sysfs(device.removeprefix("/dev/"), "queue/nomerges", root) == UNMERGED:
        set_merging(device, MERGED, root)
