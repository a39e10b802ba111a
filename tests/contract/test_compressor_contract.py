# SPDX-License-Identifier: GPL-2.0-or-later
"""What every compressor promises (core/compress/base.py); one body, all that are registered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import KINDS, contents, page, page_sizes
from zswapd.core import compress
from zswapd.core.compress.base import FIRST_CODEC, RAW, SAME_FILLED, Compressor
from zswapd.errors import ConfigError, CorruptedPageError

NAMES = compress.names()


@pytest.fixture(params=NAMES)
def compressor(request: pytest.FixtureRequest) -> Compressor:
    """Each compressor by its name."""
    return compress.get(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_gives_the_same_page(compressor: Compressor, kind: str, page_size: int) -> None:
    for seed in range(5):
        data = page(kind, seed, page_size)
        packed = compressor.compress(memoryview(data))
        assert compressor.decompress(memoryview(packed), page_size) == data


@pytest.mark.parametrize("name", NAMES)
@given(
    page_size=page_sizes(),
    pieces=st.lists(st.tuples(contents(), st.integers(1, 4096)), min_size=1, max_size=8),
)
def test_round_trip_of_patchwork_pages(
    name: str, page_size: int, pieces: list[tuple[tuple[str, int], int]]
) -> None:
    compressor = compress.get(name)
    patchwork = b"".join(page(*content, page_size)[:length] for content, length in pieces)
    data = (patchwork * (page_size // len(patchwork) + 1))[:page_size]
    assert (
        compressor.decompress(memoryview(compressor.compress(memoryview(data))), page_size) == data
    )


def test_compresses_what_can_be_compressed(compressor: Compressor, page_size: int) -> None:
    for kind, most in {"zeros": 0.02, "sparse": 0.2, "words": 0.75, "half": 0.6}.items():
        assert len(compressor.compress(memoryview(page(kind, 1, page_size)))) <= most * page_size, (
            kind
        )


def test_noise_grows_by_little(compressor: Compressor, page_size: int) -> None:
    packed = compressor.compress(memoryview(page("noise", 1, page_size)))
    assert page_size < len(packed) <= page_size + page_size // 64 + 64


def test_works_on_a_slice_of_a_larger_buffer(compressor: Compressor, page_size: int) -> None:
    # As pages come in from FUSE and lie in the arena: in the middle of something.
    data = page("words", 3, page_size)
    around = memoryview(bytearray(b"x" * 100 + data + b"y" * 100))
    packed = compressor.compress(around[100 : 100 + page_size])
    stored = memoryview(bytearray(b"z" * 17 + packed + b"z" * 9))
    assert compressor.decompress(stored[17 : 17 + len(packed)], page_size) == data


def test_compression_is_repeatable(compressor: Compressor, page_size: int) -> None:
    data = memoryview(page("pointers", 1, page_size))
    assert compressor.compress(data) == compressor.compress(data)


def test_truncated_data_is_a_corrupted_page(compressor: Compressor, page_size: int) -> None:
    packed = compressor.compress(memoryview(page("words", 1, page_size)))
    for length in {0, 1, 2, len(packed) // 2, len(packed) - 1}:
        with pytest.raises(CorruptedPageError):
            compressor.decompress(memoryview(packed)[:length], page_size)


def test_page_of_another_size_is_a_corrupted_page(compressor: Compressor, page_size: int) -> None:
    for wrong in (page_size // 2, page_size * 2):
        packed = compressor.compress(memoryview(page("words", 1, wrong)))
        with pytest.raises(CorruptedPageError):
            compressor.decompress(memoryview(packed), page_size)


def test_damage_never_yields_anything_but_a_page_or_the_error(
    compressor: Compressor, page_size: int
) -> None:
    rng = random.Random(page_size)
    packed = compressor.compress(memoryview(page("words", 2, page_size)))
    caught = 0
    for _ in range(300):
        damaged = bytearray(packed)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            assert len(compressor.decompress(memoryview(damaged), page_size)) == page_size
        except CorruptedPageError:
            caught += 1
    assert caught, "no damage at all was noticed"


def test_garbage_is_refused_or_makes_a_page(compressor: Compressor, page_size: int) -> None:
    for seed in range(50):
        garbage = page("noise", seed, page_size)[: 10 + seed * 7]
        try:
            assert len(compressor.decompress(memoryview(garbage), page_size)) == page_size
        except CorruptedPageError:
            continue


def test_codec_numbers_are_unique_and_clear_of_the_reserved_ones() -> None:
    numbers = [compress.get(name).codec for name in NAMES]
    assert len(set(numbers)) == len(numbers)
    assert all(FIRST_CODEC <= number <= 255 for number in numbers)
    assert {SAME_FILLED, RAW}.isdisjoint(numbers)


def test_codec_numbers_are_for_ever() -> None:
    # They stand in stored objects, which a successor process of another version reads.
    assert (SAME_FILLED, RAW) == (0, 1)
    assert {name: compress.get(name).codec for name in ("lz4", "lzo", "zstd")} == {
        "lz4": 2,
        "lzo": 3,
        "zstd": 4,
    }


def test_compressors_are_found_by_codec_and_by_name() -> None:
    assert {codec: c.name for codec, c in compress.by_codec().items()} == {
        compress.get(n).codec: n for n in NAMES
    }
    assert NAMES[0] == "lz4"


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="zstd-19") as caught:
        compress.get("zstd-19")
    assert all(name in str(caught.value) for name in NAMES)
