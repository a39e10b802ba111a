# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap on a disk that goes before a device whose daemon is killed whole.

While supervisor and worker are both dead, nobody serves their device until somebody has started the
program again, and that somebody may wait for a page that lies there. A whole machine has stood
still that way: its kernel writes cold pages out long before memory is short (DAMON), and in a
container whose files are in memory the program itself is such a page. So where only the device is
tried and nothing need be swapped out, the kernel gets something better to fill first.

It is a loop device, not a swap file: the kernel puts no large folio into a file, and would go on to
the next area with it. The file has no name once it is attached, so nothing but a loop device can be
left behind; leftovers.py knows it by that name.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.bench.harness import system

PLACE = Path("/var/tmp")
SIZE = 512 << 20
PRIORITY = 1000
"""Above what zswapd has by default.

(`swap.priority`), below what tests and benchmarks that swap for real take.
"""


def missing(place: Path = PLACE) -> str:
    """Return why there can be no decoy below `place`, or an empty string."""
    kind = system.run("stat", "-f", "-c", "%T", place).strip()
    if kind in {"tmpfs", "ramfs", "overlayfs", "fuseblk", "fuse", "nfs"}:
        return (
            f"{place} is on {kind}; a disk's file system is needed there, for swap that goes before"
            " what is killed"
        )
    free = os.statvfs(place)
    if free.f_bavail * free.f_frsize < 2 * SIZE:
        return (
            f"{place} has less than {2 * SIZE >> 20} MiB free, for swap that goes before what is"
            " killed"
        )
    return ""


@contextlib.contextmanager
def decoy(place: Path = PLACE) -> Iterator[str]:
    """Be swapped on to a file on a disk; yields the device.

    Skips the test, with the reason, where that cannot be.
    """
    if reason := missing(place):
        pytest.skip(reason)
    file = place / f"zswapd-decoy-{os.getpid()}"
    with contextlib.ExitStack() as undo:
        undo.callback(file.unlink, missing_ok=True)
        system.run("fallocate", "--length", str(SIZE), file)
        file.chmod(0o600)
        device = system.attach_loop(file)
        undo.callback(subprocess.run, ("losetup", "--detach", device), check=True, timeout=60)
        file.unlink()
        system.run("mkswap", device)
        undo.callback(system.swap_off, device)
        system.run("swapon", "--priority", str(PRIORITY), device)
        yield device
