# SPDX-License-Identifier: GPL-2.0-or-later
"""Where each page of a device is, page by page, for who wants to look: `zswapctl pages`.

A look at a million pages takes a second or so, in the event loop: `batches` cuts it into steps between which requests are
served, and keeps nothing. So what is told of two pages may be of different moments.

Source of the idea: zram's block_state.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from zswapd.core.compress.base import RAW, SAME_FILLED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zswapd.core.block.device import Device
    from zswapd.core.pam.base import PageKey

STEP_S = 0.0005
"""Time that one batch looks at pages."""
ROWS = 512
"""Most pages that one batch tells of: some 20 KB of JSON."""
_LOOKS = 64  # pages between two looks at the clock


class PageState(NamedTuple):
    """Where one page's data is."""

    state: str
    """`compressed`, `same-filled` or `raw`: in the pool; `writing`: refused by it, on its way to the disk; `disk`; `lost`."""
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
    return PageState("same-filled" if key.codec == SAME_FILLED else "compressed", key.codec, key.length, epoch)


def batches(device: Device, pages: int) -> Iterator[list[tuple[int, PageState]]]:
    """Yield lists of (number, state) of the pages that have data or are lost, in order; empty ones too, when time is up.

    Args:
        device: whose pages they are.
        pages: how many it has.
    """
    number = 0
    while number < pages:
        rows: list[tuple[int, PageState]] = []
        end = time.monotonic() + STEP_S
        while True:  # once at least, however slow the machine is
            for place in range(number, min(number + _LOOKS, pages)):
                state = device.state_of(place)
                if state is not None:
                    rows.append((place, state))
            number += _LOOKS
            if number >= pages or len(rows) > ROWS - _LOOKS or time.monotonic() >= end:
                break
        yield rows
