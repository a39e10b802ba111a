# SPDX-License-Identifier: GPL-2.0-or-later
"""Heaps that are grown before use and never shrink.

And a garbage collector that runs only when nobody waits.

On the page path nothing may ask the kernel for memory. Two allocators stand between Python objects
and the kernel:

- malloc, for whatever is larger than 512 bytes. It is told to keep what it has (no trim), to take
  nothing by mmap, and to serve all threads from one heap; then the heap is grown by one large
  allocation that is touched and freed.
- pymalloc, for small objects, in arenas of 1 MiB (256 KiB before Python 3.10) that go back to the
  kernel when their last object dies. So arenas are filled with small objects, of which a few stay
  for good, one at least in each arena.

A forked process has neither to itself: the first write to each page copies it. `own_memory` does
that for all at once.

What is held is memory that the interpreter reuses for everything, not a reserve beside it. Limit:
an allocation larger than what is left of either heap still goes to the kernel. Swap alone, with
eight clients that ask for status, counters and metrics all the time, takes 2.2 MiB of the first and
2.6 of the second: SMALL_HEAP of each is three times that. Where requests may wait for a disk, each
of them holds up to its whole length meanwhile.
"""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

SMALL_HEAP = 8 << 20
"""Bytes of each at start, for swap alone.

Also for any successor: what more it needs comes in an idle moment.
"""
LIBC_HEAP = 32 << 20
"""Bytes of malloc's heap where requests may wait for a disk."""
PYTHON_HEAP = 24 << 20
"""Bytes of Python's arenas, likewise."""

_MADV_DONTDUMP, _MADV_POPULATE_WRITE = 16, 23
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
    """Make malloc's heap `size` bytes larger and keep it so.

    Return False if this libc cannot be told.
    """
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
    """Make Python's arenas `size` bytes larger and keep them.

    Return the MiB held in all calls so far.
    """
    blocks = [bytes(_BLOCK) for _ in range(size // 512)]
    windows = {id(block) // _WINDOW: block for block in blocks}
    _held.extend(windows.values())
    return len(_held) * _WINDOW >> 20


def own_memory(libc: ctypes.CDLL, root: Path = Path("/")) -> int:
    """Copy all private memory that is still shared with the process that forked this one.

    Return the bytes, -1 if it fails.

    Args:
        libc: for madvise.
        root: where /proc is, for tests.
    """
    copied = 0
    for found in _PRIVATE.finditer((root / "proc/self/maps").read_text()):
        start, end = int(found[1], 16), int(found[2], 16)
        if (
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)
            != 0
        ):
            return -1  # before Linux 5.14 there is no such advice
        copied += end - start
    return copied


def leave_out_of_core_dumps(libc: ctypes.CDLL, root: Path = Path("/")) -> bool:
    """Have no core dump contain the private memory that there is now, heaps above all.

    Pages pass through them.

    What is mapped later is not covered.

    Args:
        libc: for madvise.
        root: where /proc is, for tests.

    Returns:
        Whether it worked throughout.
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
    """Move all objects that exist out of the collector's sight, and let it run only when asked.

    To be called when the daemon is built and before it serves: a collection in the middle of a
    page's way
    walks all containers, which takes milliseconds and touches memory all over the heap.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


def has_garbage() -> bool:
    """Say whether so many objects were made since the last collection that one is due although no page was moved."""
    return gc.get_count()[0] > _GARBAGE_OBJECTS


def collect_garbage() -> int:
    """Collect now, while nobody waits for a page; return how many objects were found unreachable."""
    return gc.collect()
