# SPDX-License-Identifier: GPL-2.0-or-later
"""The states of all pages of a device, in batches, for `zswapctl pages`.

A look at a million pages takes about a second in the event loop. `batches` cuts it into steps.
Requests are served between two steps, so the states of two pages may be of different moments.

Source of the idea: zram's block_state.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zswapd.core.block.device import Device
    from zswapd.core.block.state import PageState

STEP_S = 0.0005
"""Time of one batch, s."""
ROWS = 512
"""Most pages in one batch: about 20 KB of JSON."""
PAGES_PER_STEP = 64
"""Pages between two looks at the clock."""


def batches(device: Device, pages: int) -> Iterator[list[tuple[int, PageState]]]:
    """Yield lists of (number, state) of the pages that have data or are lost, by ascending number.

    A list is empty if no such page was found in STEP_S.

    Args:
        device: the device.
        pages: number of its pages.
    """
    number = 0
    while number < pages:
        rows: list[tuple[int, PageState]] = []
        end = time.monotonic() + STEP_S
        while True:  # once at least, even on a slow machine
            for place in range(number, min(number + PAGES_PER_STEP, pages)):
                state = device.state_of(place)
                if state is not None:
                    rows.append((place, state))
            number += PAGES_PER_STEP
            if number >= pages or len(rows) > ROWS - PAGES_PER_STEP or time.monotonic() >= end:
                break
        yield rows
