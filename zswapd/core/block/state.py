# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of one page: where its data is, and in which form (compare zram's block_state)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from zswapd.core.compress.base import RAW, SAME_FILLED

if TYPE_CHECKING:
    from zswapd.core.pam.base import PageKey


class PageState(NamedTuple):
    """The place and form of one page's data."""

    state: str
    """`compressed`, `same-filled` or `raw` in the pool; `writing`, `disk` or `lost` outside it.

    A page is `writing` after the pool has refused it, while it is on its way to the disk.
    """
    codec: int = 0
    """Codec of a compressed page, as in its header."""
    size: int = 0
    """Bytes of data in the pool, without the header."""
    epoch: int = 0
    """Writeback epoch of the last use; 0 where no ages are kept."""


def pool_state(key: PageKey, page_size: int, epoch: int = 0) -> PageState:
    """Return the state of a page in the pool.

    Args:
        key: from the page's header.
        page_size: bytes in a page.
        epoch: of its last use, 0 if unknown.
    """
    if key.codec == RAW:
        return PageState("raw", 0, page_size, epoch)
    return PageState(
        "same-filled" if key.codec == SAME_FILLED else "compressed", key.codec, key.length, epoch
    )
