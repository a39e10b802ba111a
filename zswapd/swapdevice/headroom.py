# SPDX-License-Identifier: GPL-2.0-or-later
"""The check that swapped-out pages fit into memory, before swapoff.

Without the check, swapoff would get processes OOM-killed. There are two limits:

- The machine: the pages need available memory, or free swap on other areas.
- Each memory cgroup: swapoff charges a page to the cgroup that owns it. A cgroup at its limit is
  OOM-killed at once, even if the machine has free memory.

Two things reduce the need. Pages in the swap cache are already in memory. And the pool frees memory
as its pages go. Only half of this memory is counted: the kernel discards slots in clusters of
2 MiB. swapoff reads pages in another order than that of the slots, so most clusters become empty
late.

`root` stands for the root directory, for tests. Sizes are in bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.errors import HeadroomError
from zswapd.swapdevice.state import SwapArea, swap_areas
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

POOL_SHARE = 0.5
"""Share of the pool's memory that counts as freed in time."""
MARGIN_LEAST = 32 << 20
MARGIN_MOST = 256 << 20
"""Bounds in bytes of the margin, which is 2 % of memory. MemAvailable is only an estimate."""


@dataclass(frozen=True, slots=True)
class CrowdedCgroup:
    """A memory cgroup whose swapped pages do not fit its limit."""

    path: str
    swapped: int
    short_by: int
    limit_file: str


@dataclass(frozen=True, slots=True)
class Headroom:
    """The memory that swapoff needs, and the memory that is available; in bytes."""

    swapped: int
    """Slots in use on the areas to swap off."""
    cached: int
    """Part of `swapped` that is also in memory (swap cache)."""
    available: int
    other_swap: int
    """Free slots on the other areas."""
    pool_returns: int
    """Memory of the pool that counts as freed in time."""
    margin: int
    """Memory that must stay available."""
    crowded: tuple[CrowdedCgroup, ...]

    @property
    def short_by(self) -> int:
        """Bytes that the machine lacks; 0 if all pages fit."""
        needed = self.swapped - self.cached + self.margin
        return max(needed - self.available - self.other_swap - self.pool_returns, 0)

    def check(self) -> None:
        """Check that swapoff is safe.

        Raises:
            HeadroomError: the pages do not fit into the machine or into a memory cgroup.
        """
        if self.swapped and self.short_by:
            raise HeadroomError(
                f"{format_size(self.swapped)} swapped out do not fit into memory, by"
                f" {format_size(self.short_by)} ({format_size(self.available)} available,"
                f" {format_size(self.other_swap)} free in other swap)",
                hint=(
                    "end what uses much memory, or add other swap; --force tries all the same, and"
                    " may get processes killed"
                ),
            )
        if self.crowded:
            worst = max(self.crowded, key=lambda cgroup: cgroup.short_by)
            others = f" (and {len(self.crowded) - 1} more)" if len(self.crowded) > 1 else ""
            raise HeadroomError(
                f"the memory cgroup {worst.path}{others} has {format_size(worst.swapped)} swapped"
                f" out, {format_size(worst.short_by)} more than its limit has room for: swapoff"
                " would get it OOM-killed",
                hint=(
                    f"raise {worst.limit_file} by that much, or end what runs in it; --force tries"
                    " all the same"
                ),
            )


def measure(areas: Sequence[SwapArea], *, pool_bytes: int = 0, root: Path = Path("/")) -> Headroom:
    """Return the head-room for a swapoff.

    Args:
        areas: the areas to swap off.
        pool_bytes: memory of the pool for their pages in bytes; 0 without discard.
        root: directory that holds /proc and /sys.
    """
    memory = _meminfo(root)
    everywhere = swap_areas(root)
    going = {area.path for area in areas}
    swapped = sum(area.used for area in areas)
    in_use = sum(area.used for area in everywhere)
    cached = min(memory.get("SwapCached", 0) * swapped // in_use, swapped) if in_use else 0
    other_swap = sum(area.size - area.used for area in everywhere if area.path not in going)
    total = memory.get("MemTotal", 0)
    crowded = [
        cgroup for cgroup in _crowded_cgroups(swapped, total, root) if cgroup.short_by > other_swap
    ]
    return Headroom(
        swapped=swapped,
        cached=cached,
        available=memory.get("MemAvailable", 0),
        other_swap=other_swap,
        pool_returns=int(pool_bytes * POOL_SHARE),
        margin=min(max(total // 50, MARGIN_LEAST), MARGIN_MOST),
        crowded=tuple(crowded),
    )


def _meminfo(root: Path) -> dict[str, int]:
    text = _read(root / "proc/meminfo")
    return {
        name: int(value) * 1024
        for name, value in re.findall(r"^(\w+):\s*(\d+) kB", text, re.MULTILINE)
    }


def _crowded_cgroups(swapped: int, memory_total: int, root: Path) -> Iterator[CrowdedCgroup]:
    """Yield the cgroups that would exceed their limit with all their pages in memory.

    The pages of a cgroup count up to `swapped` bytes.
    """
    top = root / "sys/fs/cgroup"
    unified = (top / "cgroup.controllers").exists()
    base = top if unified else top / "memory"
    limit_name = "memory.max" if unified else "memory.limit_in_bytes"
    if not swapped or not base.is_dir():
        return
    for limit_file in base.rglob(limit_name):
        limit = _read(limit_file).strip()
        if not limit.isdecimal() or int(limit) >= memory_total:
            continue  # "max", or a number above the machine's memory
        cgroup = limit_file.parent
        in_swap, in_memory = _usage_v2(cgroup) if unified else _usage_v1(cgroup)
        in_swap = min(in_swap, swapped)
        if in_swap > 0 and in_swap + in_memory > int(limit):
            path = "/" + str(cgroup.relative_to(base))
            yield CrowdedCgroup(path, in_swap, in_swap + in_memory - int(limit), str(limit_file))


def _usage_v2(cgroup: Path) -> tuple[int, int]:
    """Return two sizes of a cgroup and its descendants in bytes.

    The first is in swap only. The second is in memory and cannot be dropped.
    """
    details = _stat(cgroup)
    in_swap = _number(cgroup / "memory.swap.current") - details.get("swapcached", 0)
    files = details.get("inactive_file", 0) + details.get("active_file", 0)
    return in_swap, max(_number(cgroup / "memory.current") - files, 0)


def _usage_v1(cgroup: Path) -> tuple[int, int]:
    details = _stat(cgroup)
    in_swap = details.get("total_swap", 0) - details.get("total_swapcached", 0)
    files = details.get("total_inactive_file", 0) + details.get("total_active_file", 0)
    return in_swap, max(_number(cgroup / "memory.usage_in_bytes") - files, 0)


def _stat(cgroup: Path) -> dict[str, int]:
    return {
        name: int(value)
        for name, value in re.findall(r"^(\w+) (\d+)$", _read(cgroup / "memory.stat"), re.MULTILINE)
    }


def _number(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the cgroup was removed, or this kernel does not have the file
        return ""
