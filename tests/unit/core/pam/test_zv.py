# SPDX-License-Identifier: GPL-2.0-or-later
"""zv: which form a page takes, what policy turns away, and what is counted under which name."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.fakes import FailingCompressor
from tests.support.stack import Stack, build
from tests.support.strategies import KINDS, page
from zswapd.core import compress
from zswapd.core.compress.base import RAW, SAME_FILLED
from zswapd.core.pam.base import HEADER, HEADER_BYTES, MAX_INDEX, MAX_OID, MAX_POOLS, RejectReason
from zswapd.core.pam.zv import DIST_CHUNK
from zswapd.errors import CorruptedPageError, InvariantError

Make = Callable[..., Stack]


@pytest.fixture
def make() -> Iterator[Make]:
    """Build stacks that are checked and closed at the end."""
    made: list[Stack] = []

    def make_stack(*args: Any, **options: Any) -> Stack:
        made.append(build(*args, **options))
        return made[-1]

    yield make_stack
    for stack in made:
        stack.frames.check()
        stack.allocator.check()
        stack.close()


@pytest.fixture
def stack(make: Make, page_size: int) -> Stack:
    return make(page_size)


def _create(stack: Stack, data: bytes, index: int = 0, *, replacing: bool = False) -> int:
    return stack.zv.create(0, 5, index, memoryview(data), replacing=replacing)


def _get(stack: Stack, pampd: int, index: int = 0) -> bytes:
    out = bytearray(stack.page_size)
    stack.zv.get(pampd, 5, index, memoryview(out))
    return bytes(out)


def _header(stack: Stack, pampd: int) -> tuple[int, int]:
    """Return (length, codec)."""
    _, _, _, _, length, codec, _ = HEADER.unpack_from(stack.arena.view, pampd)
    return length, codec


# Forms.


@pytest.mark.parametrize("word", [bytes(8), b"\xff" * 8, b"abcdefgh", bytes(7) + b"\1"])
def test_same_filled_page_takes_no_data(stack: Stack, page_size: int, word: bytes) -> None:
    pampd = _create(stack, word * (page_size // 8))
    assert _header(stack, pampd) == (8, SAME_FILLED)
    assert _get(stack, pampd) == word * (page_size // 8)
    assert stack.zv.statistics().curr_same_filled == 1
    stack.zv.free(pampd)
    assert stack.zv.statistics().curr_same_filled == 0


@pytest.mark.parametrize("where", ["first", "second word", "middle", "odd", "last word", "last"])
def test_page_that_differs_in_one_byte_is_not_same_filled(
    stack: Stack, page_size: int, where: str
) -> None:
    at = {
        "first": 0,
        "second word": 9,
        "middle": page_size // 2,
        "odd": page_size // 3,
        "last word": -8,
        "last": -1,
    }
    data = bytearray(b"abcdefgh" * (page_size // 8))
    data[at[where]] ^= 1
    pampd = _create(stack, bytes(data))
    assert _header(stack, pampd)[1] != SAME_FILLED
    assert _get(stack, pampd) == data


@pytest.mark.parametrize("kind", ["words", "half", "pointers", "sparse"])
def test_compressible_page_is_stored_with_its_codec(
    stack: Stack, page_size: int, kind: str
) -> None:
    data = page(kind, 1, page_size)
    pampd = _create(stack, data)
    assert _header(stack, pampd) == (
        len(compress.get("lz4").compress(memoryview(data))),
        compress.get("lz4").codec,
    )


def test_incompressible_page_is_stored_as_it_is(stack: Stack, page_size: int) -> None:
    data = page("noise", 1, page_size)
    pampd = _create(stack, data)
    assert _header(stack, pampd)[1] == RAW
    assert _get(stack, pampd) == data
    seen = stack.zv.statistics()
    assert (seen.curr_incompressible, seen.curr_zbytes) == (1, page_size)
    assert data in bytes(stack.arena.view), "not as it is"
    stack.zv.free(pampd)
    seen = stack.zv.statistics()
    assert (seen.curr_incompressible, seen.curr_zbytes, stack.frames.used_frames) == (0, 0, 0)


@pytest.mark.parametrize("margin", range(-40, 41, 8))
def test_pages_around_the_largest_that_fit_behind_a_header(make: Make, margin: int) -> None:
    # The border between "compressed in one object" and "as it is in a frame of its own".
    stack = make(4096)
    rng = random.Random(1)
    noise = 4096 - HEADER_BYTES - 20 + margin  # lz4 adds about twenty bytes to this much noise
    data = rng.randbytes(noise) + bytes(4096 - noise)
    pampd = _create(stack, data)
    length, codec = _header(stack, pampd)
    assert codec == RAW or length + HEADER_BYTES <= 4096
    assert _get(stack, pampd) == data


def test_raw_page_that_gets_a_frame_but_no_header_leaves_nothing(make: Make) -> None:
    stack = make(4096, frames=3)
    stack.zv.limit_frames = 100
    held = []
    while (pampd := _create(stack, page("noise", len(held), 4096), len(held))) > 0:
        held.append(pampd)
    assert len(held) in (1, 2)
    used = stack.frames.used_frames
    assert _create(stack, page("noise", 9, 4096), 9) == -RejectReason.FAILED_ALLOC
    assert stack.frames.used_frames == used
    for pampd in held:
        stack.zv.free(pampd)
    assert stack.frames.used_frames == 0


# Policy.


def _poor_size(data: bytes) -> int:
    return len(compress.get("lz4").compress(memoryview(data)))


@pytest.mark.parametrize("keep_poor", [True, False])
def test_max_zsize_decides_what_compresses_poorly(
    make: Make, page_size: int, keep_poor: bool
) -> None:
    stack = make(page_size, keep_poor=keep_poor)
    data = page("half", 1, page_size)
    size = _poor_size(data)
    stack.zv.max_zsize = size  # not above: not poor
    assert _create(stack, data, 1) > 0
    assert stack.zv.statistics().compress_poor == 0
    stack.zv.max_zsize = size - 1
    outcome = _create(stack, data, 2)
    seen = stack.zv.statistics()
    assert seen.compress_poor == 1
    if keep_poor:
        assert _get(stack, outcome, 2) == data
        assert (seen.stored_poor, seen.stores) == (1, 2)
    else:
        assert outcome == -RejectReason.COMPRESS_POOR
        assert (seen.stored_poor, seen.stores) == (0, 1)


def test_max_zsize_is_seven_eighths_and_mean_five_eighths_by_default(
    stack: Stack, page_size: int
) -> None:
    assert (stack.zv.max_zsize, stack.zv.max_mean_zsize) == (page_size * 7 // 8, page_size * 5 // 8)
    assert stack.zv.policy_percent == 75


@pytest.mark.parametrize("keep_poor", [True, False])
def test_mean_zsize_refuses_poor_pages_until_good_ones_bring_it_down(
    make: Make, page_size: int, keep_poor: bool
) -> None:
    stack = make(page_size, keep_poor=keep_poor)
    threshold = page_size // 4
    stack.zv.max_mean_zsize = threshold
    poor, good = page("half", 1, page_size), page("sparse", 1, page_size)
    assert _poor_size(good) < threshold < _poor_size(poor)
    pampds = [_create(stack, poor, 1)]
    assert pampds[0] > 0, "nothing is stored yet, so there is no mean to be above"
    outcome = _create(stack, poor, 2)
    assert stack.zv.statistics().mean_compress_poor == 1
    assert stack.zv.statistics().compress_poor == 0
    if keep_poor:
        assert outcome > 0
        return
    assert outcome == -RejectReason.MEAN_COMPRESS_POOR
    # A page at the threshold or below is always welcome.
    while stack.zv.statistics().curr_zbytes > threshold * stack.zv.statistics().curr_pages:
        assert _create(stack, good, 3) > 0
    assert _create(stack, poor, 4) > 0
    assert stack.zv.statistics().mean_compress_poor == 1


def test_mean_forgets_pages_that_were_freed(make: Make) -> None:
    stack = make(4096, keep_poor=False)
    stack.zv.max_mean_zsize = 1000
    first = _create(stack, page("half", 1, 4096), 1)
    assert _create(stack, page("half", 2, 4096), 2) == -RejectReason.MEAN_COMPRESS_POOR
    stack.zv.free(first)
    assert _create(stack, page("half", 2, 4096), 2) > 0


def test_page_count_policy_percent_bounds_the_frames(make: Make, page_size: int) -> None:
    stack = make(page_size, total_frames=80)  # 75 % are 60
    index = 0
    while (outcome := _create(stack, page("noise", index, page_size), index)) > 0:
        index += 1
    assert outcome == -RejectReason.POLICY_PERCENT_EXCEEDED
    assert 60 <= stack.frames.used_frames < 60 + 16
    seen = stack.zv.statistics()
    assert (seen.policy_percent_exceeded, seen.stores, seen.failed_alloc) == (1, index, 0)
    stack.zv.policy_percent = 150
    while _create(stack, page("noise", index, page_size), index) > 0:
        index += 1
    assert 120 <= stack.frames.used_frames < 120 + 16


@pytest.mark.parametrize("bound", ["limit_frames", "policy"])
def test_once_full_pages_are_taken_again_only_below_accept_frames(make: Make, bound: str) -> None:
    stack = make(4096, total_frames=10_000 if bound == "limit_frames" else 64)
    stack.zv.limit_frames, stack.zv.accept_frames = 48 if bound == "limit_frames" else 1 << 30, 40
    kept = []
    while (outcome := _create(stack, page("noise", len(kept), 4096), len(kept))) > 0:
        kept.append(outcome)
    assert outcome == -(
        RejectReason.POOL_LIMIT_HIT
        if bound == "limit_frames"
        else RejectReason.POLICY_PERCENT_EXCEEDED
    )
    while stack.frames.used_frames > 41:
        stack.zv.free(kept.pop())
        assert _create(stack, page("noise", 1, 4096), 1000) < 0 or stack.frames.used_frames <= 41, (
            "too early"
        )
    while stack.frames.used_frames > 40:
        stack.zv.free(kept.pop())
    taken = 0
    while _create(stack, page("noise", taken, 4096), 2000 + taken) > 0:
        taken += 1
    assert stack.frames.used_frames >= 48, "it is taken until it is full again"


def test_pool_limit_bounds_the_frames(make: Make, page_size: int) -> None:
    stack = make(page_size)
    stack.zv.limit_frames = 40
    index = 0
    while (outcome := _create(stack, page("noise", index, page_size), index)) > 0:
        index += 1
    assert outcome == -RejectReason.POOL_LIMIT_HIT
    assert 40 <= stack.frames.used_frames < 40 + 16
    assert stack.zv.statistics().pool_limit_hit == 1
    replaced = _create(stack, page("words", 1, page_size), 0, replacing=True)
    assert replaced > 0, "a page whose older copy goes right after may pass the limit"


def test_empty_reserve_refuses_at_once_and_is_counted(make: Make, page_size: int) -> None:
    stack = make(page_size, frames=256, reserve=0)
    backed = stack.arena.backed_bytes()
    assert _create(stack, page("words", 1, page_size)) == -RejectReason.FAILED_ALLOC
    assert _create(stack, page("noise", 1, page_size)) == -RejectReason.FAILED_ALLOC
    assert stack.zv.statistics().failed_alloc == 2
    assert stack.frames.statistics().failed_get_free_pages == 2
    assert stack.arena.backed_bytes() == backed, "a refusal asked the kernel for memory"
    stack.frames.reserve_target = 256
    stack.frames.refill_now()
    assert _create(stack, page("words", 1, page_size)) > 0


@pytest.mark.parametrize(
    ("reason", "number"),
    [
        (RejectReason.COMPRESS_POOR, "EIO"),
        (RejectReason.MEAN_COMPRESS_POOR, "EIO"),
        (RejectReason.FROZEN, "EIO"),
        (RejectReason.INDEX_LIMIT, "EIO"),
        (RejectReason.POOL_LIMIT_HIT, "ENOSPC"),
        (RejectReason.POLICY_PERCENT_EXCEEDED, "ENOSPC"),
        (RejectReason.FAILED_ALLOC, "ENOSPC"),
        (RejectReason.FAILED_OBJNODE, "ENOSPC"),
    ],
)
def test_reason_says_whether_it_is_a_matter_of_room(reason: RejectReason, number: str) -> None:
    import errno

    assert errno.errorcode[reason.errno_] == number
    assert reason > 0, "negated, it has to be told from a pampd"


# Codecs.


def test_old_pages_stay_readable_after_a_switch_of_codec(stack: Stack, page_size: int) -> None:
    held = {}
    for index in range(40):
        stack.zv.compressor = compress.get(("lz4", "lzo")[index % 2])
        data = page("words", index, page_size)
        held[index] = _create(stack, data, index), data
    codecs = {_header(stack, pampd)[1] for pampd, _ in held.values()}
    assert codecs == {compress.get("lz4").codec, compress.get("lzo").codec}
    for index, (pampd, data) in held.items():
        assert _get(stack, pampd, index) == data


def test_unknown_codec_in_a_header_is_a_corruption(make: Make) -> None:
    stack = make(4096, checksum=False)
    pampd = _create(stack, page("words", 1, 4096))
    stack.arena.view[pampd + 22] = 200
    with pytest.raises(CorruptedPageError):
        _get(stack, pampd)


def test_compressor_that_fails_leaves_nothing_behind(make: Make, page_size: int) -> None:
    stack = make(page_size, compressor=FailingCompressor(compress.get("lz4"), "RER"))
    assert _create(stack, page("words", 1, page_size), 1) > 0
    before = (stack.frames.used_frames, stack.zv.statistics())
    with pytest.raises(MemoryError):
        _create(stack, page("words", 2, page_size), 2)
    assert (stack.frames.used_frames, stack.zv.statistics()) == before
    assert _create(stack, page("words", 2, page_size), 2) > 0


# Corruption.


@pytest.mark.parametrize("kind", ["same", "words", "poor", "noise"])
def test_every_damaged_byte_of_a_page_is_noticed(make: Make, kind: str) -> None:
    stack = make(4096)
    data = page(kind, 1, 4096)
    pampd = _create(stack, data)
    length, codec = _header(stack, pampd)
    places = list(range(pampd, pampd + HEADER_BYTES + length))
    if codec == RAW:
        body = struct.unpack_from("=Q", stack.arena.view, pampd + HEADER_BYTES)[0] & (1 << 40) - 1
        places += list(range(body, body + 4096))
    rng = random.Random(2)
    for place in (
        places
        if len(places) < 400
        else places[:HEADER_BYTES] + rng.sample(places[HEADER_BYTES:], 300)
    ):
        bit = 1 << rng.randrange(8)
        stack.arena.view[place] ^= bit
        try:
            with pytest.raises(CorruptedPageError) as caught:
                _get(stack, pampd)
        finally:
            stack.arena.view[place] ^= bit
        assert "index 0" in str(caught.value)
        assert caught.value.hint
    assert stack.zv.statistics().corrupted > 20
    assert _get(stack, pampd) == data


def test_damage_is_counted_and_is_no_load(stack: Stack, page_size: int) -> None:
    for number, kind in enumerate(("words", "noise", "same"), 1):
        pampd = _create(stack, page(kind, 1, page_size), number)
        at = pampd + HEADER_BYTES
        stack.arena.view[at] ^= 1
        loads = stack.zv.statistics().loads
        with pytest.raises(CorruptedPageError):
            _get(stack, pampd, number)
        assert stack.zv.statistics().corrupted == number
        assert stack.zv.statistics().loads == loads, kind
        stack.arena.view[at] ^= 1


def test_damaged_body_of_a_raw_page_is_counted_and_is_no_load(stack: Stack, page_size: int) -> None:
    pampd = _create(stack, page("noise", 1, page_size))
    body = struct.unpack_from("=Q", stack.arena.view, pampd + HEADER_BYTES)[0] & (1 << 40) - 1
    stack.arena.view[body + page_size - 1] ^= 0x80
    with pytest.raises(CorruptedPageError):
        _get(stack, pampd)
    seen = stack.zv.statistics()
    assert (seen.corrupted, seen.loads) == (1, 0)


def test_pages_without_checksum_are_readable_when_it_is_switched_on(
    make: Make, page_size: int
) -> None:
    stack = make(page_size, checksum=False)
    held = {}
    for index, kind in enumerate(KINDS * 2):
        stack.zv.checksum = index >= len(KINDS)
        data = page(kind, index, page_size)
        held[index] = _create(stack, data, index), data
    for index, (pampd, data) in held.items():
        assert _get(stack, pampd, index) == data


# Counters.


def test_distributions_count_objects_by_size(stack: Stack, page_size: int) -> None:
    expected: dict[int, int] = {}
    pampds = []
    raw = 0
    for index in range(60):
        kind = KINDS[index % len(KINDS)]
        pampd = _create(stack, page(kind, index, page_size), index)
        pampds.append(pampd)
        length, codec = _header(stack, pampd)
        if codec == RAW:
            raw += 1
        else:
            column = -(-(HEADER_BYTES + length) // DIST_CHUNK)
            expected[column] = expected.get(column, 0) + 1
    seen = stack.zv.statistics()
    assert {column: n for column, n in enumerate(seen.curr_dist_counts[:-1]) if n} == expected
    assert seen.curr_dist_counts[-1] == raw > 0
    assert seen.curr_dist_counts == seen.cumul_dist_counts
    assert sum(seen.curr_dist_counts) == seen.curr_pages == seen.stores == 60
    for pampd in pampds[::2]:
        stack.zv.free(pampd)
    later = stack.zv.statistics()
    assert sum(later.curr_dist_counts) == later.curr_pages == 30
    assert later.cumul_dist_counts == seen.cumul_dist_counts, (
        "freed pages stay in the cumulative distribution"
    )
    for pampd in pampds[1::2]:
        stack.zv.free(pampd)
    assert not any(stack.zv.statistics().curr_dist_counts)


def test_distribution_has_sixty_four_columns_to_a_page_of_4096() -> None:
    assert DIST_CHUNK == 64


def test_counters_of_a_quiet_life(stack: Stack, page_size: int) -> None:
    data = page("words", 1, page_size)
    pampds = [_create(stack, data, index) for index in range(4)]
    for pampd, index in zip(pampds[:3], range(3), strict=True):
        _get(stack, pampd, index)
    stack.zv.free(pampds.pop())
    seen = stack.zv.statistics()
    assert (seen.stores, seen.loads, seen.curr_pages, seen.curr_pages_max) == (4, 3, 3, 4)
    assert seen.curr_zbytes == 3 * _poor_size(data)
    refusals = (
        seen.compress_poor,
        seen.mean_compress_poor,
        seen.pool_limit_hit,
        seen.policy_percent_exceeded,
    )
    assert refusals == (0, 0, 0, 0)
    assert (seen.failed_alloc, seen.corrupted, seen.stored_poor) == (0, 0, 0)
    stack.zv.check(pampds)


def test_check_finds_wrong_sums(stack: Stack, page_size: int) -> None:
    pampds = [_create(stack, page(kind, 1, page_size), index) for index, kind in enumerate(KINDS)]
    for name in ("_zbytes", "_same_filled", "_raw"):
        setattr(stack.zv, name, getattr(stack.zv, name) + 1)
        with pytest.raises(InvariantError):
            stack.zv.check(pampds)
        setattr(stack.zv, name, getattr(stack.zv, name) - 1)
    stack.zv._curr_dist[3] += 1
    with pytest.raises(InvariantError):
        stack.zv.check(pampds)
    stack.zv._curr_dist[3] -= 1
    stack.zv.check(pampds)


def test_check_after_damage_still_counts_the_pages(stack: Stack, page_size: int) -> None:
    pampds = [_create(stack, page("words", index, page_size), index) for index in range(3)]
    stack.arena.view[pampds[0] + HEADER_BYTES] ^= 1
    stack.zv.free(pampds.pop(0))
    assert stack.zv.statistics().damaged_pages == 1
    stack.zv.check(pampds)
    with pytest.raises(InvariantError):
        stack.zv.check(pampds[:1])


def test_object_bytes_are_what_the_allocator_was_asked_for(
    stack: Stack, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = stack.zv._alloc
    monkeypatch.setattr(stack.zv, "_alloc", lambda size: asked.append(size) or real(size))
    pampds = [_create(stack, page(kind, 1, page_size), index) for index, kind in enumerate(KINDS)]
    assert stack.zv.statistics().curr_object_bytes == sum(asked)
    for pampd in pampds:
        stack.zv.free(pampd)
    assert stack.zv.statistics().curr_object_bytes == 0


def test_limits_are_those_of_the_header() -> None:
    assert (HEADER_BYTES, MAX_POOLS, MAX_OID, MAX_INDEX) == (24, 256, (1 << 64) - 1, (1 << 32) - 1)


def test_check_finds_a_page_that_no_index_names(stack: Stack, page_size: int) -> None:
    pampds = [_create(stack, page("words", index, page_size), index) for index in range(3)]
    stack.zv.check(pampds)
    with pytest.raises(InvariantError):
        stack.zv.check(pampds[:2])
    stack.zv.free(pampds[0])
    with pytest.raises(InvariantError):
        stack.zv.check(pampds)


@pytest.mark.parametrize("generous", [False, True])
def test_page_between_what_fits_behind_a_header_and_a_page_is_kept_as_it_is(
    stack: Stack, page_size: int, generous: bool
) -> None:
    class Barely:
        name, codec = "barely", 200

        def compress(self, page: memoryview) -> bytes:
            return bytes(page[: page_size - HEADER_BYTES // 2])

        def decompress(self, data: memoryview, page_size: int) -> bytes:
            raise AssertionError("it was not to be compressed")

    if generous:
        stack.zv.max_zsize = stack.zv.max_mean_zsize = page_size
    stack.zv.compressor = Barely()
    data = page("noise", 1, page_size)
    assert _get(stack, _create(stack, data)) == data
    assert stack.zv.statistics().curr_incompressible == 1
