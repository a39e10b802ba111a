# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages with contents that matter to a compressor, and Hypothesis strategies over them.

A page follows from its kind and a seed. So an example is two small numbers, and a test can make the
same page again to compare it.
"""

from __future__ import annotations

import functools
import random

from hypothesis import strategies as st

KINDS = ("zeros", "same", "almost-same", "sparse", "words", "pointers", "half", "poor", "noise")
"""The kinds, from zeros to data that no compressor shrinks; see `page`."""

_WORDS = (
    b"the kernel keeps a page until its slot is written and only then gives up the frame it was"
    b" in \n".split(b" ")
)


@functools.lru_cache(maxsize=512)
def page(kind: str, seed: int, page_size: int) -> bytes:
    """Return a page.

    Args:
        kind: "zeros"; "same" (one machine word repeated); "almost-same" (the same except one
            byte); "sparse" (few bytes among zeros); "words" (text); "pointers" (addresses with
            equal upper bytes, as in a heap); "half" (compresses to about half); "poor" (saves a few
            percent); "noise" (does not compress); and beyond KINDS "letters" (compresses only by
            the frequencies of its bytes, which only zstd uses).
        seed: the number that makes two pages of a kind differ.
        page_size: the page size in bytes.
    """
    rng = random.Random(f"{kind}/{seed}")
    match kind:
        case "zeros":
            return bytes(page_size)
        case "same":
            return rng.randbytes(8) * (page_size // 8)
        case "almost-same":
            data = bytearray(rng.randbytes(8) * (page_size // 8))
            data[rng.randrange(page_size)] ^= 1 + rng.randrange(255)
            return bytes(data)
        case "sparse":
            data = bytearray(page_size)
            for _ in range(page_size // 100):
                data[rng.randrange(page_size)] = rng.randrange(1, 256)
            return bytes(data)
        case "words":
            return b" ".join(rng.choices(_WORDS, k=page_size // 3))[:page_size]
        case "pointers":
            base = rng.randrange(1 << 46)
            return b"".join(
                (base + rng.randrange(1 << 20) * 16).to_bytes(8, "little")
                for _ in range(page_size // 8)
            )
        case "half":
            return rng.randbytes(page_size // 2) + bytes(page_size // 2)
        case "poor":
            return rng.randbytes(page_size * 61 // 64) + bytes(page_size - page_size * 61 // 64)
        case "noise":
            return rng.randbytes(page_size)
        case "letters":
            return bytes(rng.choices(range(64, 128), k=page_size))
        case _:
            raise ValueError(kind)


def contents() -> st.SearchStrategy[tuple[str, int]]:
    """Draw (kind, seed) for `page`; shrinks to zeros."""
    return st.tuples(st.sampled_from(KINDS), st.integers(0, 50))


PAGE_SIZES = (4096, 16384, 65536)


def page_sizes() -> st.SearchStrategy[int]:
    """Draw a page size; shrinks to 4096."""
    return st.sampled_from(PAGE_SIZES)
