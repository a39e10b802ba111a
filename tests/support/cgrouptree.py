# SPDX-License-Identifier: GPL-2.0-or-later
"""A made-up root directory of a system with memory cgroups, for code that takes `root`."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20
TOTAL = 1 << 34
UNLIMITED_V1 = 9223372036854771712
FIRST, SECOND = "cgroup cgroup rw,memory", "cgroup2 cgroup2 rw"
"""File system, source and options of a mount in mountinfo, by cgroup version."""


def write_system(
    root: Path, *lines: str, mounts: tuple[str, ...], available: int = TOTAL, total: int = TOTAL
) -> None:
    """Write /proc.

    Args:
        root: the root directory.
        lines: the lines of /proc/self/cgroup.
        mounts: "ROOT MOUNTPOINT VERSION" of each hierarchy.
        available: MemAvailable in bytes.
        total: MemTotal in bytes.
    """
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\n"
    )
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    rows = []
    for number, mount in enumerate(mounts):
        base, point, version = mount.split(" ")
        rows.append(
            f"{40 + number} 30 0:{30 + number} {base} {point} rw,nosuid shared:9 -"
            f" {FIRST if version == '1' else SECOND}\n"
        )
    (root / "proc/self/mountinfo").write_text("".join(rows))


def write_cgroup(root: Path, directory: str, **files: int | str) -> Path:
    """Write the files of a cgroup (memory__max=… is memory.max); return its directory."""
    path = root / directory.lstrip("/")
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(f"{value}\n")
    return path


def first(
    root: Path, directory: str, limit: int = UNLIMITED_V1, *, usage: int = 0, **files: int | str
) -> Path:
    """Write a cgroup of version 1."""
    named = {
        "memory__memsw__limit_in_bytes": UNLIMITED_V1,
        "memory__swappiness": 60,
        "memory__use_hierarchy": 1,
        **files,
    }
    named.setdefault(
        "memory__stat",
        f"hierarchical_memory_limit {UNLIMITED_V1}\ntotal_inactive_file 0\ntotal_active_file 0",
    )
    return write_cgroup(
        root,
        directory,
        memory__limit_in_bytes=limit,
        memory__usage_in_bytes=usage,
        memory__memsw__usage_in_bytes=usage,
        **named,
    )


def second(
    root: Path, directory: str, limit: int | str = "max", *, usage: int = 0, **files: int | str
) -> Path:
    """Write a cgroup of version 2."""
    named = {
        "memory__high": "max",
        "memory__swap__max": "max",
        "memory__stat": "inactive_file 0\nactive_file 0",
        **files,
    }
    return write_cgroup(root, directory, memory__max=limit, memory__current=usage, **named)
