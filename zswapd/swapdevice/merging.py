# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the kernel merges requests to a loop device: `queue/nomerges`, 0 for yes, 2 for never.

Setting it freezes the queue: the kernel waits until all requests that are under way are answered,
and new ones wait meanwhile. So it must never be done by the thread that answers them. It takes
milliseconds as long as requests are answered.

A loop device keeps the value when its file is detached, for the next user.
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
        identities: what the files are, for them to be found under any path.
        kernel: answers for the identity of loop devices.
        root: where /proc and /sys are.
    """
    found = (
        find_all_attached(file, root, identity=identities.get(file), kernel=kernel)
        for file in files
    )
    return {item.device for items in found for item in items}


def set_merging(device: str, value: str, root: Path = Path("/")) -> bool:
    """Have requests to a loop device merged, or not; return whether that is so."""
    name = device.removeprefix("/dev/")
    if read_sysfs(name, "queue/nomerges", root) != value:
        with contextlib.suppress(OSError):
            (root / "sys/block" / name / "queue/nomerges").write_text(value)
    return read_sysfs(name, "queue/nomerges", root) == value


def restore_merging(device: str, root: Path = Path("/")) -> None:
    """Have requests merged again, if they are not at all."""
    if read_sysfs(device.removeprefix("/dev/"), "queue/nomerges", root) == UNMERGED:
        set_merging(device, MERGED, root)
