# SPDX-License-Identifier: GPL-2.0-or-later
"""AES-256-XTS of slots: each page is one data unit, its slot's number the tweak.

The key is random, lives in locked memory only (handover.py) and ends with it, so that what the daemon leaves on the disk is
noise. XTS hides contents, it does not prove them: that is what the checksums of block/slotmap.py are for.

Cost: 2.6 µs a page of 4 KiB with AES instructions, in the event loop's thread. The library holds the GIL meanwhile, so another
thread would gain nothing.

Source of the idea: IEEE 1619; dm-crypt's plain64 tweak.
"""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES: Final = 64
"""Two AES-256 keys: XTS takes one for data, one for tweaks."""


class SlotCipher:
    """Encrypts and decrypts pages.

    Args:
        key: KEY_BYTES random bytes.

    Raises:
        ValueError: the key has another length, or its halves are equal (as those of memory that was never filled are).
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"{len(key)} bytes are no key of {KEY_BYTES}")
        self._algorithm = algorithms.AES(key)
        self.encrypt(0, bytes(16))

    def encrypt(self, slot: int, page: bytes | memoryview) -> bytes:
        """Return what is to be written to a slot."""
        # Named, so that mypyc compiles it where cryptography is not installed: we are built before what we need is there.
        data: bytes = Cipher(self._algorithm, modes.XTS(slot.to_bytes(16, "little"))).encryptor().update(page)
        return data

    def decrypt(self, slot: int, page: bytes | memoryview) -> bytes:
        """Return what `encrypt` was given."""
        data: bytes = Cipher(self._algorithm, modes.XTS(slot.to_bytes(16, "little"))).decryptor().update(page)
        return data
