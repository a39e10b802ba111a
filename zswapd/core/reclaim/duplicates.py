# SPDX-License-Identifier: GPL-2.0-or-later
"""An estimate of how many pages of the pool are the same page twice, by sampling.

Nothing is stored once for several pages: the estimate tells who would gain if it were. A pass looks
at every page of the pool and hashes its stored bytes. It keeps the hashes of one page in `stride`,
chosen by the hash itself. So either all copies of a page are in the sample or none, and the counts
of the sample times `stride` are estimates for the pool. A random choice of pages would miss most
pairs.

Equal pages with the same codec have equal stored bytes. The bytes that would be saved are those of
the objects of all copies but one, without their headers, which would name the shared bytes.

Same-filled pages are counted apart: they take 32 bytes each, and nothing would be saved.

Limits: copies with different codecs count as different pages. Pages that are stored, freed or moved
to the disk during a pass may be missed or counted twice.

Source of the idea: the content-based page sharing of VMware ESX (Waldspurger 2002), and sampling by
hash as in estimates of deduplication (Harnik et al., FAST 2016).
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from xxhash import xxh3_64_intdigest

from zswapd.core.compress.base import RAW, SAME_FILLED
from zswapd.core.pam.base import HEADER_BYTES
from zswapd.core.pam.zv import BODY_MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zswapd.core.pam.base import PageKey

SAMPLED: Final = 32768
"""Hashes of a sample, about: a few MiB of memory."""
STEP_S: Final = 0.0005
"""Time of one step, in which no page is served."""
LOOKS: Final = 16
"""Pages between two looks at the clock."""


class Searched(Protocol):
    """A device whose pages are looked at, such as `block.device.Device`."""

    name: str

    @property
    def pages(self) -> int:
        """Number of pages of the device."""

    def pampd_of(self, number: int) -> int:
        """Return where the pool has a page, or 0."""


@dataclass(frozen=True, slots=True)
class DuplicateStatistics:
    """The estimate for one file, or for all files together.

    Attributes:
        name: the file; empty for all together.
        pages: pages in the pool that were looked at, without same-filled ones.
        same_filled: same-filled pages.
        duplicates: pages that are equal to an earlier one of the same scope. For all files, copies
            in different files count too.
        saved_bytes: bytes of the pool that one copy for all of them would save.
    """

    name: str
    pages: int
    same_filled: int
    duplicates: int
    saved_bytes: int


class DuplicateSearch:
    """One pass over the pages of some devices.

    Args:
        devices: their pages are compared.
        memory: the arena.
        key_of: returns the header of a stored page.
        page_size: bytes in a page.
        stored: pages in the pool, about.
        clock: returns seconds; for tests.

    Attributes:
        stride: the sample has one hash in `stride`.
        looked: pages that were looked at.
        is_done: whether the pass has ended.
    """

    def __init__(
        self,
        devices: Sequence[Searched],
        memory: memoryview,
        key_of: Callable[[int], PageKey],
        *,
        page_size: int,
        stored: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices = list(devices)
        self._memory = memory
        self._key_of = key_of
        self._page_size = page_size
        self._clock = clock
        self.stride = max(stored // SAMPLED, 1)
        self.looked = 0
        self.is_done = not self._devices
        self._place = self._number = 0
        self._pages = [0] * len(self._devices)
        self._same_filled = [0] * len(self._devices)
        # By hash: the bytes of one copy, and the number of copies in each device.
        self._sample: dict[int, tuple[int, dict[int, int]]] = {}

    def step(self) -> None:
        """Continue the pass for STEP_S at most."""
        end = self._clock() + STEP_S
        while not self.is_done:
            for _ in range(LOOKS):
                self._look()
            if self._clock() >= end:
                return

    def _look(self) -> None:
        if self.is_done:
            return
        device = self._devices[self._place]
        if self._number >= device.pages:
            self._place, self._number = self._place + 1, 0
            self.is_done = self._place == len(self._devices)
            return
        pampd = device.pampd_of(self._number)
        self._number += 1
        if pampd:
            self.looked += 1
            self._note(pampd)

    def _note(self, pampd: int) -> None:
        key, place = self._key_of(pampd), self._place
        if key.codec == SAME_FILLED:
            self._same_filled[place] += 1
            return
        self._pages[place] += 1
        begin, length = pampd + HEADER_BYTES, key.length
        if key.codec == RAW:
            (word,) = struct.unpack_from("=Q", self._memory, begin)
            begin, length = word & BODY_MASK, self._page_size
        found = xxh3_64_intdigest(self._memory[begin : begin + length], key.codec)
        if found % self.stride:
            return
        _length, copies = self._sample.setdefault(found, (length, {}))
        copies[place] = copies.get(place, 0) + 1

    def result(self) -> list[DuplicateStatistics]:
        """Return the estimate for each device, and for all together as the last one."""
        extra = [0] * (len(self._devices) + 1)
        saved = list(extra)
        for length, copies in self._sample.values():
            for place, count in copies.items():
                extra[place] += count - 1
                saved[place] += (count - 1) * length
            beyond = sum(copies.values()) - 1
            extra[-1] += beyond
            saved[-1] += beyond * length
        names = [*(device.name for device in self._devices), ""]
        pages = [*self._pages, sum(self._pages)]
        same_filled = [*self._same_filled, sum(self._same_filled)]
        return [
            DuplicateStatistics(name, count, same, more * self.stride, size * self.stride)
            for name, count, same, more, size in zip(
                names, pages, same_filled, extra, saved, strict=True
            )
        ]
