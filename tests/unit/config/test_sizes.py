# SPDX-License-Identifier: GPL-2.0-or-later
"""Size expressions: what they come to, and what is said about those that are none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd.config.sizes import ValueRefused, parse_size
from zswapd.units import format_size

TOTAL = 8 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("512M", 512 << 20),
        ("512 MiB", 512 << 20),
        ("1T", 1 << 40),
        ("1.5K", 1536),
        ("50%", 4 << 30),
        ("12.5 %", 1 << 30),
        ("150%", 12 << 30),
        ("min(50%, 4G)", 4 << 30),
        ("min(25%, 4G)", 2 << 30),
        ("MAX( 1G,25% )", 2 << 30),
        ("max(1G, min(50%, 3G), 7)", 3 << 30),
        ("  7  ", 7),
        ("min(1G)", 1 << 30),
    ],
)
def test_parse_size_gives_bytes(text: str, size: int) -> None:
    assert parse_size(text, memory_total=TOTAL).bytes == size


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("5000", True),
        ("2G", True),
        ("1.5G", False),
        ("50%", False),
        ("min(50%, 1G)", True),
        ("min(10%, 1G)", False),
    ],
)
def test_parse_size_tells_a_whole_number_from_a_computed_one(text: str, exact: bool) -> None:
    assert parse_size(text, memory_total=TOTAL).exact is exact


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "is empty", "2G"),
        ("   ", "is empty", "2G"),
        ("0", "0 bytes", "2G"),
        ("0%", "0 bytes", "2G"),
        ("0.5", "0 bytes", "2G"),
        ("-1G", "negative", "2G"),
        ("2GB", "unknown unit 'GB'", "binary"),
        ("2X", "unknown unit 'X'", "K, M, G and T"),
        ("G", "'G' where a number", "2G"),
        ("2 3", "has '3'", "2G"),
        ("2G%", "has '%'", "2G"),
        ("min(50%, 4G", "the end where ',' or ')' should be", "2G"),
        ("min 4G", "'4' where '(' should be", "2G"),
        ("min()", "')' where a number", "2G"),
        ("min(1G,)", "')' where a number", "2G"),
        ("min", "the end where '('", "2G"),
        ("max(1G; 2G)", "';', which is not valid", "2G"),
        ("1e9", "unknown unit 'e'", "K, M"),
        ("99999999T", "larger than the largest file", "2G"),
        ("9" * 201, "longer than 200", "2G"),
        ("min(" * 20 + "1" + ")" * 20, "more than 16", "2G"),
    ],
)
def test_parse_size_refuses_and_says_what_is_wrong(text: str, message: str, hint: str) -> None:
    with pytest.raises(ValueRefused) as caught:
        parse_size(text, memory_total=TOTAL)
    assert message in caught.value.message
    assert hint in caught.value.hint


@given(st.text(alphabet="0123456789.%KMGTiBminax(),- \n٣²", max_size=60))
def test_parse_size_of_anything_gives_a_size_or_a_refusal(text: str) -> None:
    with contextlib.suppress(ValueRefused):
        assert 0 < parse_size(text, memory_total=TOTAL).bytes < 1 << 62


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_min_and_max_of_two_sizes_are_theirs(a: int, b: int) -> None:
    assert parse_size(f"min({a},{b})", memory_total=TOTAL).bytes == min(a, b)
    assert parse_size(f"max({a},{b})", memory_total=TOTAL).bytes == max(a, b)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_format_size_is_short(count: int, text: str) -> None:
    assert format_size(count) == text
