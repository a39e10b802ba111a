# SPDX-License-Identifier: GPL-2.0-or-later
"""Load programs and libraries into memory, so that no page request waits for their disk.

The lock of all memory (MCL_ONFAULT) then keeps them there.

A first start may wait for the disk. A takeover may not: if the program's files are on a tmpfs, as
in a container, and supervisor and worker are dead, no process has them locked. Their pages may then
be swapped out to the device that this program is about to serve, and to wait for them is to wait
for ever. So each process first maps only the pages that are in memory. If pages are missing, a
thread of the worker reads the files when pages are served (`read`), and then the rest is mapped. A
read holds no lock of the address space while it waits; to populate would.

Limit: kernels before 5.14 cannot populate. Pages are then loaded and locked at their first use.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MADV_POPULATE_READ = 22
_READ_BYTES = 256 << 10
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[x-]p ([0-9a-f]+) \S+ [1-9][0-9]* +/")


class Mapping(NamedTuple):
    """A mapped part of a file with code or constants; addresses and offset in bytes."""

    start: int
    end: int
    offset: int


def mappings(root: Path = Path("/")) -> list[Mapping]:
    """Return the mappings of code and constants of this process, by address."""
    text = (root / "proc/self/maps").read_text()
    found = (_MAPPING.match(line) for line in text.splitlines())
    return [Mapping(*(int(number, 16) for number in match.groups())) for match in found if match]


def populate(
    libc: ctypes.CDLL | None = None, root: Path = Path("/"), *, waits: bool = False
) -> bool:
    """Fault in code and constants of this process; return whether all of them are mapped.

    Args:
        libc: the C library, for tests.
        root: directory of /proc, for tests.
        waits: also load pages that are not in memory, and wait for their disk.
    """
    libc = libc or ctypes.CDLL(None, use_errno=True)
    is_whole = True
    for item in mappings(root):
        for begin, end, is_there in [(item.start, item.end, True)] if waits else _runs(libc, item):
            if is_there:
                libc.madvise(
                    ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ
                )
            is_whole = is_whole and is_there
    return is_whole


def read(root: Path = Path("/")) -> None:
    """Read code and constants into the page cache; this may wait for a disk without limit."""
    buffer = bytearray(_READ_BYTES)
    for item in mappings(root):
        # Without map_files (a container may lack the right), pages are loaded at their first use.
        with contextlib.suppress(OSError):
            file = os.open(
                root / f"proc/self/map_files/{item.start:x}-{item.end:x}",
                os.O_RDONLY | os.O_CLOEXEC,
            )
            try:
                for offset in range(item.offset, item.offset + item.end - item.start, _READ_BYTES):
                    os.preadv(file, [buffer], offset)
            finally:
                os.close(file)


def _runs(libc: ctypes.CDLL, item: Mapping) -> Iterator[tuple[int, int, bool]]:
    """Yield (begin, end, is in memory) over a mapping; not in memory if the kernel cannot tell."""
    pages = ctypes.create_string_buffer((item.end - item.start) // mmap.PAGESIZE)
    if (
        libc.mincore(ctypes.c_void_p(item.start), ctypes.c_size_t(item.end - item.start), pages)
        != 0
    ):
        yield item.start, item.end, False
        return
    begin = item.start
    for is_there, run in groupby(pages.raw, lambda page: bool(page & 1)):
        end = begin + sum(1 for _ in run) * mmap.PAGESIZE
        yield begin, end, is_there
        begin = end
