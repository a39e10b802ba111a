# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that a program tries itself with, before it serves."""

from __future__ import annotations

import hashlib


def sample_pages(page_size: int) -> tuple[bytes, ...]:
    """Return a page that is same-filled, one that compresses, one that does so poorly, and one that does not."""
    text = b"".join(b"%d:" % (number * 2654435761 % 4294967296) for number in range(page_size // 4))
    noise = hashlib.shake_128(b"zswapd").digest(page_size)
    # Digits alone gain too little with lz4 and lzo: they would be kept as they are, and never decompressed.
    return b"\x5a" * page_size, text[: page_size // 4] * 4, text[: page_size // 8] + noise[page_size // 8 :], noise
