# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface of a compressor, and the codec numbers.

The header of every stored object has the number of its codec. So numbers are permanent and must
never be used again.
"""

from __future__ import annotations

from typing import Final, Protocol

SAME_FILLED: Final = 0
"""Codec number of a page that is one machine word repeated. The word is all its data."""
RAW: Final = 1
"""Codec number of a page that is stored uncompressed."""
FIRST_CODEC: Final = 2
LZ4: Final = 2
"""Codec number of LZ4 blocks, which `core/pam/_pages.c` writes and reads too."""


class Compressor(Protocol):
    """One compression algorithm.

    Attributes:
        name: name in the configuration.
        codec: number in object headers.
    """

    name: str
    codec: int

    def compress(self, page: memoryview) -> bytes:
        """Return the compressed bytes of a page.

        They may be longer than the page (4096 random bytes become 4114 or 4116).
        """

    def decompress(self, data: memoryview, page_size: int) -> bytes:
        """Return the page.

        Raises:
            CorruptedPageError: `data` is not a page of that size, compressed by `compress`.
        """
