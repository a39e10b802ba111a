# SPDX-License-Identifier: GPL-2.0-or-later
"""AES-256-XTS of slots: each page is one data unit, its slot's number the tweak.

The key is random, lives in locked memory only (handover.py) and ends with it, so that what the daemon leaves on the disk is
noise. XTS hides contents, it does not prove them: that is what the checksums of block/slotmap.py are for.

A page is encrypted as late as can be, and decrypted at once, by the thread that moves it to or from the disk: whole requests at
a time and without the GIL, 0.6 µs a page of 4 KiB with AES instructions, of which the event loop feels nothing while there is
another processor. It is encrypted into memory of the thread's own, since readers of a page on its way get it from its buffer.

Source of the idea: IEEE 1619; dm-crypt's plain64 tweak.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Final

from zswapd.backing._xts import context, transform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zswapd.backing._xts import Context
    from zswapd.backing.store import Slots

KEY_BYTES: Final = 64
"""Two AES-256 keys: XTS takes one for data, one for tweaks."""


class EncryptedStore:
    """Slots that nobody without the key can read; used as the store that they are in.

    Args:
        store: which moves what is encrypted.
        key: KEY_BYTES random bytes.
        lanes: memory of whole pages for each thread that may be in here, as long as what it writes at a time.

    Raises:
        ValueError: the key has another length, or its halves are equal (as those of memory that was never filled are).
    """

    def __init__(self, store: Slots, key: bytes | memoryview, lanes: Sequence[memoryview]) -> None:
        self._store = store
        self._lanes: queue.SimpleQueue[tuple[Context, Context, memoryview]] = queue.SimpleQueue()
        for lane in lanes:
            self._lanes.put((context(key, True), context(key, False), lane))  # noqa: FBT003 - C takes no names
        self.write_label = store.write_label

    def read(self, first: int, pages: Sequence[memoryview]) -> None:
        """Do as `SlotStore.read` does, then decrypt."""
        self._store.read(first, pages)
        lane = self._lanes.get()
        try:
            transform(lane[1], first, pages)
        finally:
            self._lanes.put(lane)

    def write(self, first: int, pages: Sequence[memoryview]) -> None:
        """Encrypt, then do as `SlotStore.write` does; the pages stay as they are."""
        lane = self._lanes.get()
        try:
            memory, size = lane[2], len(pages[0])
            transform(lane[0], first, pages, memory)
            self._store.write(first, [memory[place * size : (place + 1) * size] for place in range(len(pages))])
        finally:
            self._lanes.put(lane)
