# SPDX-License-Identifier: GPL-2.0-or-later
"""The self-test before a worker serves: it stores and loads sample pages with every codec."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING

from zswapd.core import compress
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.core.pam.zv import Zv
from zswapd.errors import CorruptedPageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.allocators.base import Allocator

_FRAMES = 64
"""Frames of the test's own arena. The longest zspage and a body fit several times over."""


def sample_pages(page_size: int) -> tuple[bytes, ...]:
    """Return four pages: same-filled, compressible, poorly compressible, and noise."""
    text = b"".join(b"%d:" % (number * 2654435761 % 4294967296) for number in range(page_size // 4))
    noise = hashlib.shake_128(b"zswapd").digest(page_size)
    # Digits alone gain too little with lz4 and lzo: the page would be kept raw and never
    # decompressed.
    return (
        b"\x5a" * page_size,
        text[: page_size // 4] * 4,
        text[: page_size // 8] + noise[page_size // 8 :],
        noise,
    )


def run(make_allocator: Callable[[PageFrames], Allocator], page_size: int) -> None:
    """Store and load the sample pages with every codec, in a zv and an arena of the test's own.

    In the serving arena, a death would leave test pages, which a successor would find.

    Args:
        make_allocator: makes an allocator over page frames.
        page_size: bytes of a page.

    Raises:
        CorruptedPageError: a page differs after loading. The daemon must not serve then.
    """
    arena = Arena(_FRAMES, page_size, kind="memfd")
    try:
        frames = PageFrames(arena, reserve_frames=_FRAMES)
        frames.refill_now()
        codecs = compress.by_codec()
        zv = Zv(
            make_allocator(frames),
            frames,
            compress.get(compress.names()[0]),
            codecs,
            total_frames=_FRAMES,
        )
        for codec in compress.names():
            _try(zv, codec, page_size)
    finally:
        arena.close()


def _try(zv: Zv, codec: str, page_size: int) -> None:
    """Store and load the sample pages with one codec."""
    zv.compressor = compress.get(codec)
    out = memoryview(bytearray(page_size))
    for page in sample_pages(page_size):
        pampd = zv.create(0, 0, 0, memoryview(page), replacing=True)
        out[:] = bytes(page_size)
        if pampd > 0:
            with contextlib.suppress(CorruptedPageError):
                zv.get(pampd, 0, 0, out)
            zv.free(pampd)
        if pampd <= 0 or out != page:
            raise CorruptedPageError(
                f"self-test: a page stored with {codec} is different after loading",
                hint="reinstall the codec's library; test the machine's memory",
            )
