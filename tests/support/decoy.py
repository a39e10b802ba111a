# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap on a disk, which the kernel fills before a device whose supervisor and worker both die.

While both are dead, no process serves their device until a new start. The program that starts them
may itself wait for a page on the device. A whole machine has hung in this way: its kernel writes
cold pages out long before memory is short (DAMON), and in a container whose files are in memory,
the program's pages are among these. So a test that needs only the device, and no swapped-out
pages, gives the kernel an area with a higher priority.

The decoy is a loop device, not a swap file: the kernel puts no large folio into a file, and would
take the next area for it. The file is removed once it is attached, so only a loop device can be
left behind; leftovers.py finds it by the name of its file.
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
"""The decoy's priority: above zswapd's default, below that of tests with real swap."""


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
    """Run swapon for a file on a disk, and yield its device; skip the test if that fails."""
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
