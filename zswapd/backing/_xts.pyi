# SPDX-License-Identifier: GPL-2.0-or-later
from collections.abc import Sequence

class Context: ...

def context(key: bytes | memoryview, encrypts: bool) -> Context:
    """Return what one thread at a time transforms pages with, in one direction.

    Args:
        key: 64 bytes, one AES key for data and one for tweaks.
        encrypts: the direction.

    Raises:
        ValueError: the key has another length, or its halves are equal.
    """

def transform(context: Context, first: int, pages: Sequence[memoryview], out: memoryview | None = None) -> None:
    """Encrypt or decrypt pages, the GIL being released for more than 16 KiB.

    Args:
        context: what `context` has returned.
        first: number of the first page, a tweak; the next one's is one more.
        pages: of one length, 16 bytes at least.
        out: where they go, one behind the other; None to have them changed in place.

    Raises:
        ValueError: the lengths do not fit.
        OSError: libcrypto failed.
    """
