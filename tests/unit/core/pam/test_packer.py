# SPDX-License-Identifier: GPL-2.0-or-later
"""`_pages.Packer` and zpages.py do the same.

Each reads what the other has written, and finds the same damage.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from tests.support.stack import Stack, build
from tests.support.strategies import KINDS, contents, page, page_sizes
from zswapd.core import compress, crashpoints
from zswapd.core.compress.base import FIRST_CODEC, LZ4, RAW, SAME_FILLED
from zswapd.core.pam import zpages
from zswapd.core.pam.base import CLIENT_MASK, CLIENT_SHIFT, HEADER_BYTES
from zswapd.errors import CorruptedPageError, InvariantError

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("ZSWAPD_PURE")), reason="this run is on plain Python"
)
KEY = (3, 0x1234567890, 77)
"""Pool, oid, index."""


@pytest.fixture
def make() -> Iterator[Callable[..., Stack]]:
    made: list[Stack] = []

    def make_stack(*args: Any, **options: Any) -> Stack:
        made.append(build(*args, **options))
        return made[-1]

    yield make_stack
    for stack in made:
        stack.close()


def put(stack: Stack, data: bytes, *, packer: bool) -> int:
    """Store a page by one of the two; return its pampd."""
    zv, kept = stack.zv, stack.zv.packer
    assert kept is not None
    if not packer:
        zv.packer = None
    pampd = zv.create(*KEY, memoryview(data), replacing=True)
    zv.packer = kept
    assert pampd > 0
    return pampd


def take(stack: Stack, pampd: int, *, packer: bool) -> bytes | str:
    """Load a page by one of the two; return it, or what is wrong with it."""
    zv, kept = stack.zv, stack.zv.packer
    out = memoryview(bytearray(stack.page_size))
    if not packer:
        zv.packer = None
    try:
        zv.get(pampd, KEY[1], KEY[2], out)
    except CorruptedPageError as error:
        return error.message
    finally:
        zv.packer = kept
    return bytes(out)


def weigh(stack: Stack, pampd: int, *, packer: bool) -> tuple[int, list[zpages.Page]]:
    """What both ways to look at a page without reading it say."""
    zv, kept = stack.zv, stack.zv.packer
    if not packer:
        zv.packer = None
    try:
        return zv.weigh(pampd), zv.survey(pampd, stack.page_size, 1)
    finally:
        zv.packer = kept


def test_it_is_there() -> None:
    assert zpages.make_packer(memoryview(bytearray(4096)), 4096) is not None


def test_numbers_are_those_of_the_reference() -> None:
    from zswapd.core.pam import _pages

    for name in ("NOT_THE_PAGE", "WRONG_CHECKSUM", "NO_LZ4_BLOCK", "NO_PAGE"):
        assert getattr(_pages, name) == getattr(zpages, name)
    assert compress.get("lz4").codec == LZ4 == FIRST_CODEC
    assert (SAME_FILLED, RAW) == (0, 1)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_both_write_the_same_bytes_and_read_each_others(
    make: Callable[..., Stack], page_size: int, kind: str, checksum: bool
) -> None:
    stack, objects = make(page_size, checksum=checksum), []
    for packer in (True, False):
        stack.zv._generation = 41  # the serial number is in the header
        pampd = put(stack, page(kind, 5, page_size), packer=packer)
        length = stack.zv.key_of(pampd).length
        objects.append(bytes(stack.arena.view[pampd : pampd + HEADER_BYTES + length]))
        assert [take(stack, pampd, packer=reader) for reader in (True, False)] == [
            page(kind, 5, page_size)
        ] * 2
        (weight, seen), reference = (weigh(stack, pampd, packer=packer) for packer in (True, False))
        assert (weight, seen) == reference
        assert weight > 0
        ((place, generation, oid, index, length, codec, pool),) = seen
        assert place == pampd
        client = oid >> CLIENT_SHIFT & CLIENT_MASK
        assert (pool, oid, index, client << 24 | length << 8 | codec) == (*KEY, weight)
        assert generation == stack.zv.newest
    if kind in ("noise", "poor"):  # whose object names the frame that holds it
        objects = [held[8:HEADER_BYTES] for held in objects]
    assert objects[0] == objects[1]


@settings(max_examples=150)
@given(
    size=page_sizes(),
    content=contents(),
    at=st.integers(0, 1 << 20),
    flip=st.integers(1, 255),
    checksum=st.booleans(),
)
def test_both_find_the_same_damage(
    size: int, content: tuple[str, int], at: int, flip: int, checksum: bool
) -> None:
    stack = build(size, frames=64, checksum=checksum)
    try:
        pampd = put(stack, page(*content, size), packer=True)
        length = HEADER_BYTES + stack.zv.key_of(pampd).length
        # In the header as often as in all of the data.
        stack.arena.view[pampd + at % (HEADER_BYTES if at % 2 else length)] ^= flip
        if stack.zv.key_of(pampd).codec == RAW:
            return  # without a checksum, the damage may have made up a place for the body
        seen = [take(stack, pampd, packer=packer) for packer in (True, False)]
        if isinstance(seen[0], str) and "LZ4" in seen[0]:  # in different words
            assert isinstance(seen[1], str)
        elif "codec" not in str(seen[1]):
            assert seen[0] == seen[1]
        assert weigh(stack, pampd, packer=True) == weigh(stack, pampd, packer=False)
        if checksum:
            assert isinstance(seen[0], str)
    finally:
        stack.close()


@pytest.mark.parametrize("point", ["store_data", "store_header", "store_checked", "store_alive"])
def test_both_come_by_the_same_points(make: Callable[..., Stack], point: str) -> None:
    seen = []
    for packer in (True, False):
        stack = make(4096)
        crashpoints.arm(point, 1, "bug")
        try:
            with pytest.raises(RuntimeError, match=crashpoints.ON_PURPOSE):
                put(stack, page("words", 1, 4096), packer=packer)
        finally:
            crashpoints.disarm()
        (first,) = stack.frames.used_runs(0)
        seen.append(bytes(stack.arena.view[first * 4096 : first * 4096 + 2100]))
    data = 2100 - HEADER_BYTES
    assert seen[0][-data:] == seen[1][-data:] != bytes(data)
    # A reader of what a crash left may rely on what was written before the point, and no more.
    if point != "store_data":
        assert seen[0] == seen[1]
    assert bool(seen[0][4]) is (point == "store_alive"), "it lives too early, or too late"


def test_an_object_that_cannot_be_is_refused() -> None:
    arena = memoryview(bytearray(1 << 16))
    packer = zpages.make_packer(arena, 4096)
    assert packer is not None
    out = memoryview(bytearray(4096))
    with pytest.raises(ValueError, match="pack"):
        packer.commit(64, *KEY, 1, True, 0)
    packer.pack(memoryview(page("words", 1, 4096)))
    for handle in ((1 << 16) - 100, 1 << 40, (1 << 64) - 8, 12):
        with pytest.raises(IndexError):
            packer.commit(handle, *KEY, 1, True, 0)
    for handle in (1 << 16, (1 << 64) - 8):
        with pytest.raises(IndexError):
            packer.unpack(handle, *KEY[1:], out)
        with pytest.raises(IndexError):
            packer.weigh(handle)
        with pytest.raises(IndexError):
            packer.survey(handle, 4096, 1)
    # The last one there can be, and a length that reaches beyond.
    packer.pack(memoryview(bytes(4096)))
    last = (1 << 16) - HEADER_BYTES - 8
    packer.commit(last, *KEY, 1, True, 0)
    assert packer.unpack(last, *KEY[1:], out) == SAME_FILLED
    arena[last + 20 : last + 22] = b"\xff\xff"
    assert packer.unpack(last, *KEY[1:], out) == packer.weigh(last) == zpages.WRONG_CHECKSUM
    assert packer.survey(last, 1 << 16, 1) == [(last, 0, 0, 0, 0, 0, 0)]
    for wrong in (b"", bytes(4095), bytes(8192)):
        with pytest.raises(ValueError, match="page"):
            packer.pack(memoryview(wrong))
        with pytest.raises(ValueError, match="page"):
            packer.unpack(last, *KEY[1:], memoryview(bytearray(wrong)))


def test_a_closed_arena_has_no_objects() -> None:
    arena = memoryview(bytearray(1 << 16))
    packer = zpages.make_packer(arena, 4096)
    assert packer is not None
    packer.pack(memoryview(page("words", 1, 4096)))
    packer.commit(64, *KEY, 1, True, 0)
    arena.release()
    for attempt in (
        lambda: packer.commit(64, *KEY, 1, True, 0),
        lambda: packer.unpack(64, *KEY[1:], memoryview(bytearray(4096))),
        lambda: packer.weigh(64),
        lambda: packer.survey(64, 4096, 1),
    ):
        with pytest.raises(IndexError):
            attempt()


def test_what_is_no_page_is_not_freed(make: Callable[..., Stack]) -> None:
    stack = make(4096)
    pampd = put(stack, page("words", 1, 4096), packer=True)
    stack.zv.free(pampd)
    with pytest.raises(InvariantError):
        stack.zv.free(pampd)


@pytest.mark.parametrize("memory", [bytes(8192), bytearray(8192)])
@pytest.mark.parametrize("size", [0, 512, 5000, 1 << 20])
def test_nonsense_makes_no_packer(memory: bytes | bytearray, size: int) -> None:
    from zswapd.core.pam._pages import Packer

    with pytest.raises(ValueError, match="page size"):
        Packer(memoryview(memory), size)
    if isinstance(memory, bytes):
        with pytest.raises(ValueError, match="written"):
            Packer(memoryview(memory), 4096)


@given(
    data=st.binary(max_size=1000)
    | st.integers(0, 70_000).map(lambda n: random.Random(n).randbytes(n)),
    seed=st.integers(0, 2**32 - 1),
)
@example(data=b"", seed=0)
@example(data=bytes(240), seed=1)
@example(data=bytes(241), seed=1)
def test_every_width_of_the_checksum_is_the_library_s(data: bytes, seed: int) -> None:
    from zswapd.core.pam._pages import digests

    assert set(digests(data, seed)) == {xxh3_64_intdigest(data, seed)}
