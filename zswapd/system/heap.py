# SPDX-License-Identifier: GPL-2.0-or-later
"""Heaps that grow before use and never shrink, and a garbage collector that runs only when idle.

The page path must not allocate memory from the kernel. Python objects come from two allocators:

- malloc, for objects larger than 512 bytes. It is set to keep its memory (no trim), to use no mmap,
  and to serve all threads from one heap. Then one large allocation, touched and freed, grows it.
- pymalloc, for smaller objects. Its arenas have 1 MiB (256 KiB before Python 3.10), and go back to
  the kernel when their last object dies. So arenas are filled with small objects, and at least one
  object of each arena is kept for ever.

A forked process shares both heaps, and the first write to each page copies the page. `own_memory`
copies all pages at once.

The interpreter uses this memory for all its objects. Limit: an allocation that is larger than the
free part of its heap still goes to the kernel. Swap with eight clients that always ask for status,
counters and metrics takes 2.2 MiB of malloc and 2.6 MiB of pymalloc. SMALL_HEAP is half as much
again. Requests that wait for a disk hold up to their whole length, and need the large heaps.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL_HEAP = 4 << 20
"""Bytes of each heap at the start of a worker with swap only, and of any successor.

A successor that needs large heaps grows them when it is idle.
"""
LIBC_HEAP = 32 << 20
"""Bytes of malloc's heap where requests may wait for a disk."""
PYTHON_HEAP = 24 << 20
"""Bytes of Python's arenas where requests may wait for a disk."""

_MADV_DONTDUMP, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 16, 22, 23
_PRESENT, _SWAPPED = b"p", b"s"
_STATES = bytes(ord("p" if top & 128 else "s" if top & 64 else "-") for top in range(256))
"""The state of a page, by the highest byte of its entry in /proc/self/pagemap."""
_TOP_BYTE = 7 if sys.byteorder == "little" else 0
_PRIVATE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p ", re.MULTILINE)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
_TOP_PAD = 1 << 20

_BLOCK = 512 - sys.getsizeof(b"")  # the largest object that pymalloc takes
_WINDOW = (
    128 << 10
)  # half an old arena: every arena covers at least one aligned window of this size whole

_GARBAGE_OBJECTS = 10_000

_held: list[bytes] = []


def grow_libc_heap(libc: ctypes.CDLL, size: int) -> bool:
    """Grow malloc's heap by `size` bytes for ever; return False if this libc cannot do it."""
    if not hasattr(libc, "mallopt"):
        return False
    options = ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, _TOP_PAD), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1))
    if not all(libc.mallopt(option, value) for option, value in options):
        return False
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if not block:
        return False
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
    return True


def grow_python_heap(size: int) -> int:
    """Grow Python's arenas by `size` bytes for ever; return the MiB held by all calls."""
    blocks = [bytes(_BLOCK) for _ in range(size // 512)]
    windows = {id(block) // _WINDOW: block for block in blocks}
    _held.extend(windows.values())
    return len(_held) * _WINDOW >> 20


def _used_runs(root: Path, states: bytes) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of the runs of pages of private memory whose state is in `states`.

    Without /proc/self/pagemap, all pages count as present.
    """
    runs = re.compile(b"[" + states + b"]+")
    with contextlib.ExitStack() as files:
        pagemap = None
        with contextlib.suppress(OSError):
            pagemap = files.enter_context((root / "proc/self/pagemap").open("rb"))
        for found in _PRIVATE.finditer((root / "proc/self/maps").read_text()):
            start, end = int(found[1], 16), int(found[2], 16)
            pages = (end - start) // mmap.PAGESIZE
            tops = _PRESENT * pages
            if pagemap is not None:
                pagemap.seek(start // mmap.PAGESIZE * 8)
                # The two bits are the highest ones of an entry of 8 bytes.
                tops = pagemap.read(pages * 8)[_TOP_BYTE::8].translate(_STATES)
            for run in runs.finditer(tops):
                place, count = run.start(), run.end() - run.start()
                yield start + place * mmap.PAGESIZE, count * mmap.PAGESIZE


def _populate(libc: ctypes.CDLL, runs: list[tuple[int, int]], advice: int) -> int:
    """Populate runs of pages; return their bytes, or -1 before Linux 5.14."""
    for start, size in runs:
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice) != 0:
            return -1
    return sum(size for _, size in runs)


def own_memory(libc: ctypes.CDLL, root: Path = Path("/")) -> int:
    """Copy the private memory that this process shares with its parent.

    Memory that no process has touched stays untouched, such as the rest of a thread's stack.

    Args:
        libc: the C library, for madvise.
        root: directory of /proc, for tests.

    Returns:
        The bytes of private memory in use; -1 if the copy fails.
    """
    return _populate(libc, list(_used_runs(root, _PRESENT + _SWAPPED)), _MADV_POPULATE_WRITE)


def swap_in(libc: ctypes.CDLL, root: Path = Path("/")) -> int:
    """Read the private memory of this process that is in swap; leave it shared with its parent.

    Memory that is locked on fault is swapped out only before it is locked.

    Args:
        libc: the C library, for madvise.
        root: directory of /proc, for tests.

    Returns:
        The bytes; -1 if the kernel cannot do it.
    """
    return _populate(libc, list(_used_runs(root, _SWAPPED)), _MADV_POPULATE_READ)


def shared_bytes(root: Path = Path("/")) -> int:
    """Return the private memory, bytes, that this process shares with others until a write.

    The result is 0 where the kernel does not say it.

    Args:
        root: directory of /proc, for tests.
    """
    with contextlib.suppress(OSError):
        rollup = (root / "proc/self/smaps_rollup").read_text()
        if found := re.search(r"^Shared_Dirty: +(\d+) kB", rollup, re.MULTILINE):
            return int(found[1]) << 10
    return 0


def leave_out_of_core_dumps(libc: ctypes.CDLL, root: Path = Path("/")) -> bool:
    """Leave the present private memory out of core dumps, because pages pass through the heaps.

    Limit: memory that is mapped later is not covered.

    Args:
        libc: the C library, for madvise.
        root: directory of /proc, for tests.

    Returns:
        Whether all of it is left out.
    """
    ranges = [
        (int(found[1], 16), int(found[2], 16))
        for found in _PRIVATE.finditer((root / "proc/self/maps").read_text())
    ]
    outcomes = [
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTDUMP)
        for start, end in ranges
    ]
    return not any(outcomes)


def freeze_garbage_collector() -> None:
    """Exempt all present objects from garbage collection, and switch automatic collection off.

    The worker calls it before it serves. A collection walks all containers. On the page path, that
    would take milliseconds and touch memory all over the heap.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


def has_garbage() -> bool:
    """Say whether a collection is due, by the number of objects made since the last one."""
    return gc.get_count()[0] > _GARBAGE_OBJECTS


def collect_garbage() -> int:
    """Collect garbage, when no page is waited for; return the number of unreachable objects."""
    return gc.collect()
