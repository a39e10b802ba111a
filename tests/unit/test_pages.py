# SPDX-License-Identifier: GPL-2.0-or-later
"""Page arithmetic."""

from __future__ import annotations

import mmap

from hypothesis import given
from hypothesis import strategies as st

from zswapd.pages import PAGE_SIZE, round_down, round_up


def test_page_size_is_the_systems() -> None:
    assert PAGE_SIZE == mmap.PAGESIZE
    assert PAGE_SIZE & (PAGE_SIZE - 1) == 0


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 30))
def test_rounding_meets_the_nearest_multiples(value: int, unit: int) -> None:
    low, high = round_down(value, unit), round_up(value, unit)
    assert low % unit == high % unit == 0
    assert low <= value <= high
    assert value - low < unit
    assert high - value < unit
