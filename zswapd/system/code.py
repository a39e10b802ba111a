# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs and libraries in memory beforehand, so that no page request waits for their disk.

MCL_ONFAULT keeps them there.

Where nothing is stored yet, that may wait for it. But of a program that takes swap over, pages of
its own files may be swapped out, to the device that it is about to serve: if they lie on a tmpfs,
as a container's may, and nobody has them locked any more because supervisor and worker have died.
To wait for one of those before pages are served is to wait for ever. So each process maps what is
in memory, which waits for nothing; if that was not all, the worker, when it serves, has a thread
read the files (`read`), which holds no lock of the address space while it waits, as populating
would; and what is in memory then is mapped.

Best effort: kernels before 5.14 refuse to populate, and pages come and stay one by one.
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
    """A part of a file that is mapped to be run or read; in bytes."""

    start: int
    end: int
    offset: int


def mappings(root: Path = Path("/")) -> list[Mapping]:
    """Return code and constants of this process, by address."""
    text = (root / "proc/self/maps").read_text()
    found = (_MAPPING.match(line) for line in text.splitlines())
    return [Mapping(*(int(number, 16) for number in match.groups())) for match in found if match]


def populate(
    libc: ctypes.CDLL | None = None, root: Path = Path("/"), *, waits: bool = False
) -> bool:
    """Fault it in; return whether that was all of it.

    Args:
        libc: for tests.
        root: where /proc is, likewise.
        waits: also for what is not in memory, but on the disk or wherever.
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
    """Read all of it into the page cache, however long that takes."""
    buffer = bytearray(_READ_BYTES)
    for item in mappings(root):
        with contextlib.suppress(
            OSError
        ):  # this kernel, or this container, does not let us have it: it comes when it is run
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
    """Yield (begin, end, whether it is in memory) over a mapping.

    Nothing of it is, if the kernel does not say.
    """
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
