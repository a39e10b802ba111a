# SPDX-License-Identifier: GPL-2.0-or-later
"""A `BlockFile` of bytes in memory, with faults and refusals at chosen pages."""

from __future__ import annotations

from zswapd.core.pam.base import RejectReason
from zswapd.errors import CorruptedPageError

PAGE = 4096

BUG_PAGE, DAMAGED_PAGE, FULL_PAGE, FROZEN_PAGE = 100, 101, 102, 103
"""Pages, in this order: an access raises RuntimeError; an access raises CorruptedPageError; a write
is refused for lack of room; a write is refused as to a frozen file.
"""


class MemoryFile:
    """A file of bytes.

    Args:
        name: the name in the mount.
        size: the size in bytes.
        faulty: whether the four pages above misbehave when a request begins there.
        faults_inside: whether DAMAGED_PAGE and FULL_PAGE misbehave inside a request too.

    Attributes:
        data: the bytes of the file.
        discards: the discarded ranges as (offset, length).
    """

    def __init__(
        self,
        name: str = "swap",
        size: int = 1 << 20,
        *,
        faulty: bool = False,
        faults_inside: bool = False,
    ) -> None:
        self.name = name
        self.size = size
        self.data = bytearray(size)
        self.faulty = faulty
        self.faults_inside = faults_inside
        self.discards: list[tuple[int, int]] = []

    def read_into(self, offset: int, out: memoryview) -> None:
        """Copy bytes out."""
        assert offset >= 0
        assert offset + len(out) <= self.size
        self._fail(offset)
        front = DAMAGED_PAGE * PAGE - offset
        out[:] = memoryview(self.data)[offset : offset + len(out)]
        if self.faults_inside and 0 < front < len(out):
            out[front:] = b"\xee" * (len(out) - front)
            try:
                self._fail(DAMAGED_PAGE * PAGE)
            except CorruptedPageError as error:
                error.filled = front
                raise

    def write(self, offset: int, data: memoryview) -> RejectReason | None:
        """Copy bytes in, or refuse a page after copying the pages in front of it."""
        assert offset >= 0
        assert offset + len(data) <= self.size
        self._fail(offset)
        front = max(FULL_PAGE * PAGE - offset, 0)
        is_full = offset // PAGE == FULL_PAGE or (self.faults_inside and 0 < front < len(data))
        if self.faulty and is_full:
            self.data[offset : offset + front] = data[:front]
            return RejectReason.POOL_LIMIT_HIT
        if self.faulty and offset // PAGE == FROZEN_PAGE:
            return RejectReason.FROZEN
        self.data[offset : offset + len(data)] = data
        return None

    def discard(self, offset: int, length: int) -> None:
        """Zero a range and add it to `discards`."""
        assert offset >= 0
        assert offset + length <= self.size
        self._fail(offset)
        self.data[offset : offset + length] = bytes(length)
        self.discards.append((offset, length))

    def _fail(self, offset: int) -> None:
        if self.faulty and offset // PAGE == BUG_PAGE:
            raise RuntimeError("a bug, on purpose")
        if self.faulty and offset // PAGE == DAMAGED_PAGE:
            raise CorruptedPageError("page 101 does not match its checksum", hint="none in a test")
