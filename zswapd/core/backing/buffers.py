# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory for pages on their way to the disk and back: there from the start, since nobody may wait for memory then."""

from __future__ import annotations

import mmap

from zswapd.pages import round_down


def make_buffers(size: int, page_size: int) -> memoryview:
    """Return private memory for pages on their way, touched, and aligned as direct I/O wants it.

    Args:
        size: bytes; rounded down to the page.
        page_size: bytes in a page.
    """
    memory = mmap.mmap(-1, round_down(size, page_size))
    memory.madvise(mmap.MADV_DONTDUMP)
    view = memoryview(memory)
    for place in range(0, len(view), mmap.PAGESIZE):
        view[place] = 0
    return view
