# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of one page: where its data is, and in which form.

Source of the idea: zram's block_state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from zswapd.core.compress.base import RAW, SAME_FILLED

if TYPE_CHECKING:
    from zswapd.core.pam.base import PageKey


class PageState(NamedTuple):
    """Where one page's data is."""

    state: str
    """`compressed`, `same-filled` or `raw`: in the pool.

    `writing`: refused by it, on its way to the disk; `disk`; `lost`.
    """
    codec: int = 0
    """As in the page's header; of a compressed page."""
    size: int = 0
    """Bytes of data in the pool, without the header."""
    epoch: int = 0
    """When it was last used, as an epoch of writeback; 0 where no ages are kept."""


def pool_state(key: PageKey, page_size: int, epoch: int = 0) -> PageState:
    """Return the state of a page that the pool has.

    Args:
        key: what its header says.
        page_size: bytes in a page.
        epoch: of its last use, 0 if that is not known.
    """
    if key.codec == RAW:
        return PageState("raw", 0, page_size, epoch)
    return PageState(
        "same-filled" if key.codec == SAME_FILLED else "compressed", key.codec, key.length, epoch
    )
