# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pages of a device are in their slots.

One 32-bit word a page, 0 for none, else a checksum of the page.

The words lie in memory that outlives the process (0.1 % of the swap file). A word is one machine
store, so a page is in its slot or not, at every instruction; the checksum finds what a disk gives
back that was never written there: a torn slot, another disk's, one that lost a write. It is of the
page and the slot's number.

A word that becomes 0 by itself would turn its page into zeros. So there is a bit a page besides, in
other memory, that says "the word is not 0": it is set after the word, and taken away before it, so
no death leaves a bit without a word, and a page that has one has lost its data (`has_lost_word`). A
bit that changes by itself makes an error of zeros, or does not protect its page until the next
takeover.

Limits: 32 bits find all but one in four billion of such mistakes; they are no proof against
somebody who writes to the disk on purpose.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_intdigest

_MASK: Final = 0xFFFFFFFF
_STEP: Final = 4096
"""Words looked at together while they are all 0."""


def slot_map_bytes(size: int, page_size: int) -> int:
    """Return the bytes that the words of a device of `size` bytes take; a multiple of 8."""
    return (size // page_size + 1) // 2 * 8


def witness_bytes(size: int, page_size: int) -> int:
    """Return the bytes that the bits of a device of `size` bytes take."""
    return size // page_size // 8 + 1


class SlotMap:
    """The words of one device.

    Args:
        memory: `slot_map_bytes` bytes, backed and locked.
        base: slot of the device's first page.
        witness: memory for the bits, `witness_bytes` long, likewise; the process' own if there is
            none, as an older program leaves it.

    Attributes:
        base: as above.
        count: pages that are in their slots.
    """

    def __init__(self, memory: memoryview, base: int, witness: memoryview | None = None) -> None:
        self._words = memory.cast("I")
        self._witness = (
            witness
            if witness is not None
            else memoryview(bytearray(b"\0") * (len(self._words) // 8 + 1))
        )
        self.base = base
        self.count = len(self.numbers())

    def holds(self, number: int) -> bool:
        """Say whether a page is in its slot."""
        return bool(self._words[number])

    def word(self, number: int) -> int:
        """Return the word of a page: 0 if it is not in its slot."""
        return int(self._words[number])

    def checksum(self, number: int, page: bytes | memoryview) -> int:
        """Return what stands for a page in its slot; never 0."""
        return (xxh3_64_intdigest(page, self.base + number) & _MASK) or 1

    def is_sound(self, number: int, page: bytes | memoryview) -> bool:
        """Say whether what was read from a slot is what is said to be there."""
        return int(self._words[number]) == self.checksum(number, page)

    def has_lost_word(self, number: int) -> bool:
        """Say whether a page was in its slot until its word became 0 by itself."""
        return not self._words[number] and bool(self._witness[number >> 3] >> (number & 7) & 1)

    def enter(self, number: int, checksum: int) -> None:
        """Say that a page is in its slot, which has been written."""
        self.count += not self._words[number]
        self._words[number] = checksum
        self._witness[number >> 3] |= 1 << (number & 7)

    def clear(self, number: int) -> None:
        """Say that it is not, before anything makes its slot's data old."""
        self._witness[number >> 3] &= ~(1 << (number & 7))
        self.count -= self._words[number] != 0
        self._words[number] = 0

    def adopt(self) -> list[int]:
        """Make the bits agree with the words that a dead process has left.

        Return the pages that have lost their word.
        """
        lost: list[int] = []
        for first in range(0, len(self._words), 8 * _STEP):
            end = min(first + 8 * _STEP, len(self._words))
            begin, stop = first >> 3, (end + 7) >> 3
            bits = bytearray(stop - begin)
            for number in self.numbers(first, end):
                bits[(number >> 3) - begin] |= 1 << (number & 7)
            there = bytes(self._witness[begin:stop])
            if there != bits:
                self._witness[begin:stop] = bits
                lost += [
                    place * 8 + bit
                    for place in range(begin, stop)
                    for bit in range(8)
                    if there[place - begin] & ~bits[place - begin] & 1 << bit
                ]
        return lost

    def clear_range(self, first: int, last: int) -> None:
        """Say so of pages first..last."""
        if self.count:
            for number in self.numbers(first, last + 1):
                self.clear(number)
        # What is left are bits of pages that have lost their words.
        for start in range(first >> 3, (last >> 3) + 1, _STEP):
            stop = min(start + _STEP, (last >> 3) + 1)
            some = self._witness[start:stop].tobytes()
            if some.count(0) < len(some):
                for place in range(start, stop):
                    low, high = max(first - place * 8, 0), min(last - place * 8, 7)
                    self._witness[place] &= ~((1 << high + 1) - (1 << low))

    def numbers(self, first: int = 0, end: int | None = None) -> list[int]:
        """Return the pages in [first, end) that are in their slots; all by default."""
        words = self._words
        if end is None or end > len(words):
            end = len(words)
        found: list[int] = []
        for start in range(first, end, _STEP):
            some = words[start : min(start + _STEP, end)].tolist()
            if any(some):
                found += [number for number, word in enumerate(some, start) if word]
        return found
