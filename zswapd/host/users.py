# SPDX-License-Identifier: GPL-2.0-or-later
"""Who uses a file: the processes that have it open, from /proc.

The paths of open files are compared as text, so the file itself is not asked, and a file system
that does not answer delays nothing.

Limits: a process in another mount namespace may have the file open under another path. A process
that this one may not look into is left out.
"""

from __future__ import annotations

import os
from pathlib import Path


def processes_with(path: Path, root: Path = Path("/")) -> list[str]:
    """Return `NAME (process NUMBER)` of each process that has a file open.

    Args:
        path: the file, as the kernel shows it.
        root: directory that holds /proc, for tests.
    """
    wanted, found = str(path), []
    for process in sorted((root / "proc").glob("[0-9]*"), key=lambda one: int(one.name)):
        if _has_open(process, wanted):
            try:
                name = (process / "comm").read_text(errors="replace").strip()
            except OSError:  # it ended meanwhile
                continue
            found.append(f"{name} (process {process.name})")
    return found


def _has_open(process: Path, wanted: str) -> bool:
    try:
        with os.scandir(process / "fd") as entries:
            return any(_target(entry.path) == wanted for entry in entries)
    except OSError:
        return False


def _target(link: str) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - the text alone, for thousands of links
    except OSError:
        return ""
