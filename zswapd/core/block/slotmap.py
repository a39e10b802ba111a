# SPDX-License-Identifier: GPL-2.0-or-later
"""The slot map of a device: which pages are in their slots.

Each page has one 32-bit word: 0 if the page is not in its slot, else a checksum.

The words are in memory that outlives the process (0.1 % of the swap file). A word is written by one
machine store, so at every instruction a page is in its slot or not. The checksum covers the page
and the slot's number. It detects data that was never written to this slot: a torn slot, a slot of
another disk, or a lost write.

A word that is zeroed by damage would turn its page into zeros. So each page also has a witness bit,
in other memory, that means "the word is not 0". The bit is set after the word and cleared before
it, so no death leaves a bit without a word. A page with a bit and no word has lost its data
(`has_lost_word`). A bit that is set by damage makes an error of zeros. A bit that is cleared by
damage does not protect its page until the next takeover.

Limits: 32 bits miss one such mistake in four billion. They do not protect against an attacker that
writes to the disk.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_intdigest

_MASK: Final = 0xFFFFFFFF
_STEP: Final = 4096
"""Words that are tested together for zeros."""


def slot_map_bytes(size: int, page_size: int) -> int:
    """Return the bytes of the words of a device of `size` bytes; a multiple of 8."""
    return (size // page_size + 1) // 2 * 8


def witness_bytes(size: int, page_size: int) -> int:
    """Return the bytes of the witness bits of a device of `size` bytes."""
    return size // page_size // 8 + 1


class SlotMap:
    """The slot map of one device.

    Args:
        memory: `slot_map_bytes` bytes, backed and locked.
        base: slot of the device's first page.
        witness: `witness_bytes` bytes, backed and locked; without it, private memory (an older
            program leaves none).

    Attributes:
        base: slot of the device's first page.
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
        """Return the word of a page, or 0 if the page is not in its slot."""
        return int(self._words[number])

    def checksum(self, number: int, page: bytes | memoryview) -> int:
        """Return the word for a page in its slot; never 0."""
        return (xxh3_64_intdigest(page, self.base + number) & _MASK) or 1

    def is_sound(self, number: int, page: bytes | memoryview) -> bool:
        """Say whether a page that was read from its slot matches its word."""
        return int(self._words[number]) == self.checksum(number, page)

    def has_lost_word(self, number: int) -> bool:
        """Say whether a page was in its slot until damage zeroed its word."""
        return not self._words[number] and bool(self._witness[number >> 3] >> (number & 7) & 1)

    def enter(self, number: int, checksum: int) -> None:
        """Record that a page is in its slot. The slot has been written before."""
        self.count += not self._words[number]
        self._words[number] = checksum
        self._witness[number >> 3] |= 1 << (number & 7)

    def clear(self, number: int) -> None:
        """Record that a page is not in its slot. Call this before newer data exists."""
        self._witness[number >> 3] &= ~(1 << (number & 7))
        self.count -= self._words[number] != 0
        self._words[number] = 0

    def adopt(self) -> list[int]:
        """Make the witness bits agree with the words that a dead process has left.

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
        """Clear pages first..last."""
        if self.count:
            for number in self.numbers(first, last + 1):
                self.clear(number)
        # The bits that are left belong to pages that have lost their words.
        for start in range(first >> 3, (last >> 3) + 1, _STEP):
            stop = min(start + _STEP, (last >> 3) + 1)
            some = self._witness[start:stop].tobytes()
            if some.count(0) < len(some):
                for place in range(start, stop):
                    low, high = max(first - place * 8, 0), min(last - place * 8, 7)
                    self._witness[place] &= ~((1 << high + 1) - (1 << low))

    def numbers(self, first: int = 0, end: int | None = None) -> list[int]:
        """Return the pages in [first, end) that are in their slots; by default all."""
        words = self._words
        if end is None or end > len(words):
            end = len(words)
        found: list[int] = []
        for start in range(first, end, _STEP):
            some = words[start : min(start + _STEP, end)].tolist()
            if any(some):
                found += [number for number, word in enumerate(some, start) if word]
        return found
