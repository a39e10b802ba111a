# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory that settings cost, compared with the memory of the machine.

A start makes the comparison before it makes anything else. `zswapd config check` makes it too.

There are two sums. The memory *locked at start*, before the first page comes, is that of the
processes, the reserve, and the shared state: bits and bytes for each page of the swap files. The
*books* of full swap files are these bits and bytes, the index, and the kernel's tables of a swap
area. Books grow with swap.size, not with the compressed data. So they show a typing error in a size
("4T" for "4G").

The memory is that of the machine, or the lowest limit above the daemon (host/cgroups.py).
pool.limit and cache.limit are bounds, and cost nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.core.allocators.arena import label_room
from zswapd.core.backing.transfers import RUN_MAX
from zswapd.core.frontends.frontswap import MAX_SWAPFILES
from zswapd.core.sizing import arena_frames, label, lost_bitmap_bytes, reserve_frames
from zswapd.core.tmem.objnodes import NODE_BYTES, NODE_SLOTS
from zswapd.errors import ArenaError, ConfigError
from zswapd.fuse.mount import MAX_IO
from zswapd.handover.areas import backing_areas, lost_copies, marks_areas, marks_bytes
from zswapd.handover.state import GEOMETRY_BYTES, SLOT_BYTES, hook_bytes
from zswapd.host import cgroups
from zswapd.system.heap import LIBC_HEAP, PYTHON_HEAP, SMALL_HEAP
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config

PROCESSES = 98 << 20
"""Bytes of supervisor, worker and spare with small heaps, without the reserve (PSS, measured)."""
SPARE = 15 << 20
"""The spare's part of PROCESSES."""
COPY = 25 << 20
"""Bytes of the interpreter and its modules.

A spare has a copy where requests may wait for files.
"""
THREAD = 64 << 10
"""Bytes of a waiting thread: its kernel stack, its touched stack, and its part of malloc."""
CHUNK = 40
"""Bytes of a worker's list for each 2 MiB of the arena's address space."""
KERNEL_PAGE_BITS = 25
"""Bits of the kernel's tables for each page of a swap area.

They are 8 of swap_map, 16 of the owner's number, and 1 for zero-filled pages.
"""
INDEX_PAGE_BITS = 8 * (NODE_BYTES + 1) // NODE_SLOTS + 2
"""Bits of the index for each page, including inner nodes."""
START_PERCENT = 80
"""Limit of the memory locked at start, in percent of memory."""
BOOKS_PERCENT = 25
"""Limit of the books of full swap files, in percent of memory: files of 90 times the memory."""


def at_start(config: Config) -> dict[str, int]:
    """Return the memory that is locked before the first page comes, bytes by purpose."""
    context = config.context
    chunks = arena_frames(config) * context.page_size >> 21
    costs = {
        "the processes": (
            PROCESSES
            - (0 if config.service.spare else SPARE)
            + CHUNK * chunks
            + _large_heaps(config)
            + _copy(config)
            + _threads(config)
        ),
        "memory.reserve": reserve_frames(config) * context.page_size,
        **_state(config),
    }
    if config.backing.path:
        lanes = (
            config.backing.threads * RUN_MAX * context.page_size if config.backing.encrypt else 0
        )
        # A spare has buffers of its own.
        costs["backing.threads"], costs["backing.buffers"] = (
            lanes * _workers(config),
            config.backing.buffers * _workers(config),
        )
    return costs


def books(config: Config) -> dict[str, int]:
    """Return the memory of full swap files without the data of pages, bytes by purpose."""
    pages = sum(config.swap_files().values()) // config.context.page_size
    costs = {**_state(config), "the kernel's tables of swap areas": pages * KERNEL_PAGE_BITS // 8}
    if config.backing.path:
        costs["ages of pages"] = pages  # pages on the disk are not in the index
    else:
        costs["the index"] = pages * INDEX_PAGE_BITS // 8
    return costs


def check(config: Config, root: Path = Path("/")) -> None:
    """Check that this machine has the memory for the settings.

    Args:
        config: the settings.
        root: directory of /proc and /sys, for tests.

    Raises:
        ConfigError: the settings cost more than START_PERCENT or BOOKS_PERCENT of memory.
        ArenaError: the settings cost more than the available memory.
    """
    _check_forms(config)
    total, available = config.context.memory_total, available_bytes(root)
    kept, begun = books(config), at_start(config)
    if sum(kept.values()) > total * BOOKS_PERCENT // 100:
        files = ", ".join(
            f"{name} of {format_size(size)}" for name, size in config.swap_files().items()
        )
        raise ConfigError(
            f"{config.origins('swap.size', 'swap.files')}: swap files ({files}) are too large for"
            f" this memory: the books of full ones take {summed(kept)}, more than {BOOKS_PERCENT}%"
            f" of {_memory(config)}",
            hint=_smaller(config, kept),
        )
    if sum(begun.values()) > total * START_PERCENT // 100:
        raise ConfigError(
            f"{config.origins('memory.reserve', 'backing.buffers', 'swap.size')}: what is locked at"
            f" start takes {summed(begun)}, more than {START_PERCENT}% of {_memory(config)}",
            hint=_less(config, begun, total * START_PERCENT // 100),
        )
    if sum(begun.values()) > available:
        raise ArenaError(
            f"what is locked at start takes {summed(begun)}, and {format_size(available)} of memory"
            " are available",
            hint=f"end what uses much memory; or {_less(config, begun, available)}",
        )


def check_files(config: Config) -> None:
    """Check that there is memory for the books of swap files that come at run time.

    Raises:
        ConfigError: the books of full files take more than BOOKS_PERCENT of memory.
    """
    total, kept = config.context.memory_total, books(config)
    if sum(kept.values()) > total * BOOKS_PERCENT // 100:
        raise ConfigError(
            f"the swap files would be too large for this memory: the books of full ones take"
            f" {summed(kept)}, more than {BOOKS_PERCENT}% of {_memory(config)}",
            hint="choose a smaller size",
        )


def check_change(before: Config, after: Config, *, marked: bool, root: Path = Path("/")) -> None:
    """Check that there is memory for the marks of recompression, if a change adds them.

    Args:
        before: the settings that count now.
        after: the settings after the change.
        marked: the marks exist already.
        root: see `check`.

    Raises:
        ConfigError: the memory for the marks is not available.
    """
    if marked or not after.pool.recompress_age or before.pool.recompress_age:
        return
    check_marks(after, "pool.recompress_age", root)


def check_marks(config: Config, what: str, root: Path = Path("/")) -> None:
    """Check that there is memory for the marks of recompression.

    Args:
        config: the settings.
        what: the setting or command that needs the marks, for the message.
        root: see `check`.

    Raises:
        ConfigError: the memory for the marks is not available.
    """
    needed, available = sum(marks_bytes(config).values()), available_bytes(root)
    if needed > available // 2 or needed > config.context.memory_total * BOOKS_PERCENT // 100:
        raise ConfigError(
            f"{what} needs a byte for each page of the swap files, {format_size(needed)};"
            f" {format_size(available)} of memory are available",
            hint="leave it off, or use smaller swap files",
        )


def available_bytes(root: Path = Path("/")) -> int:
    """Return the available memory, bytes: the machine's, or the room below the lowest limit."""
    found = re.search(
        r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE
    )
    available = int(found[1]) << 10 if found else 1 << 62
    limits = cgroups.Limits(root)
    try:
        room = limits.room()
    finally:
        limits.close()
    return max(min(available, room.left if room else available), 0)


def _state(config: Config) -> dict[str, int]:
    """Return the memory of the shared state, bytes by purpose (see `SharedState`)."""
    areas = backing_areas(config)
    costs = {
        "the shared state": 2 * SLOT_BYTES + GEOMETRY_BYTES + hook_bytes(MAX_IO),
        "marks of lost pages": (
            sum(lost_bitmap_bytes(config).values()) + sum(lost_copies(config).values())
        ),
        "marks of recompression": sum(marks_areas(config).values()),
        "the slot map": sum(areas.values()),
    }
    return {name: size for name, size in costs.items() if size}


def _large_heaps(config: Config) -> int:
    return LIBC_HEAP + PYTHON_HEAP - 2 * SMALL_HEAP if config.may_wait_for_files else 0


def _copy(config: Config) -> int:
    return COPY if config.service.spare and config.may_wait_for_files else 0


def _threads(config: Config) -> int:
    of_volumes = (
        config.cache.max_volumes * (config.cache.queue_depth + 2)
        if config.cache.limit is not None
        else 0
    )
    of_disk = config.backing.threads if config.backing.path else 0
    return (of_volumes + of_disk) * THREAD * _workers(config)


def _workers(config: Config) -> int:
    return 2 if config.service.spare else 1


def _check_forms(config: Config) -> None:
    """Refuse swap files that the kernel's table or the arena's label has no room for."""
    files = len(config.swap_files())
    if files > MAX_SWAPFILES:
        raise ConfigError(
            f"{config.origins('swap.files')}: there are {files} swap files, {MAX_SWAPFILES} are the"
            " most",
            hint="use fewer and larger ones",
        )
    if len(label(config)) >= label_room(config.context.page_size):
        raise ConfigError(
            f"{config.origins('swap.files')}: the names of {files} swap files are too long"
            " together",
            hint="use fewer files or shorter names",
        )


def _smaller(config: Config, kept: Mapping[str, int]) -> str:
    """Return a hint with the largest size of the file `swap` for which the books fit."""
    page, files = config.context.page_size, config.swap_files()
    pages = sum(files.values()) // page
    per_page = sum(kept.values()) / max(pages, 1)
    allowed = int(config.context.memory_total * BOOKS_PERCENT / 100 / per_page) * page
    left = allowed - sum(size for name, size in files.items() if name != "swap")
    return (
        f"set swap.size to {_size(left)} or less"
        if left >= 1 << 20
        else "use smaller swap files, or fewer"
    )


def _less(config: Config, begun: Mapping[str, int], allowed: int) -> str:
    """Return a hint with a setting by which at most `allowed` bytes are locked at start."""
    over = sum(begun.values()) - allowed
    for name in ("memory.reserve", "backing.buffers"):
        shrunk = begun.get(name, 0) - over
        least = 8 << 20
        if shrunk >= least:
            return (
                f"set {name} to"
                f" {_size(shrunk // (1 if name == 'memory.reserve' else _workers(config)))} or less"
            )
    if config.service.spare and over <= SPARE:
        return "set service.spare to false"
    return "give the daemon more memory, or use less swap"


def summed(costs: Mapping[str, int]) -> str:
    """Return the sum of costs, and the three largest of them, as text."""
    parts = sorted(costs.items(), key=lambda item: -item[1])[:3]
    return (
        f"{format_size(sum(costs.values()))}"
        f" ({', '.join(f'{name}: {format_size(size)}' for name, size in parts)})"
    )


def _memory(config: Config) -> str:
    by = f", the limit in {config.context.limited_by}" if config.context.limited_by else ""
    return f"the memory ({format_size(config.context.memory_total)}{by})"


def _size(count: int) -> str:
    """Return a size in the form of a setting, rounded down."""
    for unit, shift in (("T", 40), ("G", 30), ("M", 20)):
        if count >= 2 << shift or unit == "M":
            return f"{max(count >> shift, 1)}{unit}"
    raise AssertionError("unreachable")
