# SPDX-License-Identifier: GPL-2.0-or-later
"""What every page accessible memory promises (core/pam/base.py).

One body, each back end over each allocator and compressor.

A new back end or allocator joins by a line in BACKENDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.stack import Stack, build
from tests.support.strategies import KINDS, page
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.pam.base import HEADER_BYTES, MAX_INDEX, MAX_OID, MAX_POOLS, Pam, RejectReason
from zswapd.errors import CorruptedPageError, InvariantError

BACKENDS: dict[str, dict[str, Any]] = {
    "zv-zsmalloc-lz4": {"compressor": "lz4"},
    "zv-zsmalloc-lz4-python": {"compressor": "lz4", "packer": False},
    "zv-zsmalloc-lzo": {"compressor": "lzo"},
    "zv-zsmalloc-unchecked": {"checksum": False},
    "zv-zsmalloc-16": {"allocator": lambda frames: ZsPool(frames, max_zspage_frames=16)},
    "zv-zbud": {"allocator": ZbudPool},
    "zbuds-zbud": {"ephemeral": "zbud"},
    "zbuds-zbud-python": {"ephemeral": "zbud", "packer": False},
    "zbuds-zbud-unchecked": {"ephemeral": "zbud", "checksum": False},
    "zbuds-zsmalloc": {"ephemeral": "zsmalloc", "compressor": "lzo"},
}
REFUSED = {
    "zbuds-zsmalloc": ("noise", "poor"),
    "zbuds-zbud": ("noise",),
    "zbuds-zbud-python": ("noise",),
    "zbuds-zbud-unchecked": ("noise",),
}
"""Kinds of pages that a back end does not keep, as it would gain nothing."""
Get = Callable[[int, int, int], bytes]


@pytest.fixture(params=BACKENDS)
def stack(request: pytest.FixtureRequest, page_size: int) -> Iterator[Stack]:
    made = build(page_size, **BACKENDS[request.param])
    yield made
    made.frames.check()
    made.allocator.check()
    made.cache.allocator.check()
    assert made.frames.ephemeral_frames == made.cache.allocator.used_frames()
    made.close()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.node.callspec.params["stack"]
    return name


@pytest.fixture
def pam(stack: Stack, backend: str) -> Pam:
    """The back end by itself, without an index."""
    return stack.cache.zbuds if backend.startswith("zbuds") else stack.zv


@pytest.fixture
def kinds(backend: str) -> list[str]:
    """The kinds of pages that it keeps."""
    return [kind for kind in KINDS if kind not in REFUSED.get(backend, ())]


@pytest.fixture
def get(pam: Pam, page_size: int) -> Get:
    def get_page(pampd: int, oid: int, index: int) -> bytes:
        out = bytearray(page_size)
        pam.get(pampd, oid, index, memoryview(out))
        return bytes(out)

    return get_page


def _create(pam: Pam, data: bytes, *, pool: int = 1, oid: int = 2, index: int = 3) -> int:
    pampd = pam.create(pool, oid, index, memoryview(data), replacing=False)
    assert pampd > 0, RejectReason(-pampd)
    return pampd


@pytest.mark.parametrize("kind", KINDS)
def test_page_comes_back_as_it_was_more_than_once(
    pam: Pam, get: Get, page_size: int, kind: str, kinds: list[str]
) -> None:
    data = page(kind, 1, page_size)
    if kind not in kinds:
        assert pam.create(1, 2, 3, memoryview(data), replacing=False) == -RejectReason.COMPRESS_POOR
        return
    pampd = _create(pam, data)
    assert get(pampd, 2, 3) == data
    assert get(pampd, 2, 3) == data


def test_many_pages_of_all_kinds_side_by_side(
    pam: Pam, get: Get, stack: Stack, page_size: int, kinds: list[str]
) -> None:
    held = {}
    for index in range(90):
        data = page(kinds[index % len(kinds)], index, page_size)
        held[_create(pam, data, index=index)] = index, data
    assert len(held) == 90
    for pampd, (index, data) in held.items():
        assert get(pampd, 2, index) == data
    for pampd in held:
        pam.free(pampd)
    assert stack.frames.used_frames == 0


@pytest.mark.parametrize("kind", KINDS)
def test_key_is_kept_with_the_page(pam: Pam, page_size: int, kind: str, kinds: list[str]) -> None:
    kind = kind if kind in kinds else "half"
    for pool, oid, index in ((0, 0, 0), (MAX_POOLS - 1, MAX_OID, MAX_INDEX), (7, 1 << 40, 1 << 20)):
        key = pam.key_of(_create(pam, page(kind, 1, page_size), pool=pool, oid=oid, index=index))
        assert (key.pool, key.oid, key.index) == (pool, oid, index)


def test_later_copy_has_the_later_generation(pam: Pam, page_size: int) -> None:
    generations = [
        pam.key_of(_create(pam, page("words", 1, page_size))).generation for _ in range(5)
    ]
    assert generations == sorted(set(generations))
    assert min(generations) > 0


@pytest.mark.parametrize(("oid", "index"), [(2, 4), (3, 3), (3, 2)])
def test_get_under_another_key_is_a_corruption(
    pam: Pam, get: Get, page_size: int, oid: int, index: int
) -> None:
    # The index and the page contradict each other, so the data may be another page's.
    pampd = _create(pam, page("words", 1, page_size))
    with pytest.raises(CorruptedPageError):
        get(pampd, oid, index)


def test_freed_page_is_not_given_out_any_more(pam: Pam, get: Get, page_size: int) -> None:
    data = page("words", 1, page_size)
    keep, pampd = _create(pam, data, index=1), _create(pam, data, index=2)
    pam.free(pampd)
    with pytest.raises(CorruptedPageError):
        get(pampd, 2, 2)
    assert get(keep, 2, 1) == data


@pytest.mark.parametrize("neighbour", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_second_free_is_noticed(
    pam: Pam, stack: Stack, page_size: int, kind: str, neighbour: bool, kinds: list[str]
) -> None:
    # With and without something that keeps the frames of the page in use.
    kind = kind if kind in kinds else "half"
    data = page(kind, 1, page_size)
    before = [_create(pam, page("half", 1, page_size), index=index) for index in range(20)]
    keep = _create(pam, data, index=1) if neighbour else 0
    pampd = _create(pam, data, index=2)
    for other in before:
        pam.free(other)
    pam.free(pampd)
    with pytest.raises(InvariantError):
        pam.free(pampd)
    stack.frames.check()
    if keep:
        pam.free(keep)
    assert stack.frames.used_frames == 0


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_none_when_all_is_freed(
    pam: Pam, stack: Stack, page_size: int, kind: str, kinds: list[str]
) -> None:
    kind = kind if kind in kinds else "half"
    pampds = [_create(pam, page(kind, seed, page_size), index=seed) for seed in range(20)]
    assert stack.frames.used_frames > 0
    for pampd in pampds:
        pam.free(pampd)
    assert stack.frames.used_frames == 0


def test_full_back_end_refuses_with_a_reason_and_keeps_what_it_has(
    pam: Pam, get: Get, stack: Stack, page_size: int, kinds: list[str]
) -> None:
    held = {}
    kind = "noise" if "noise" in kinds else "half"
    for index in range(100_000):
        data = page(kind, index % 7, page_size)
        pampd = pam.create(1, 2, index, memoryview(data), replacing=False)
        if pampd <= 0:
            break
        held[pampd] = index, data
    else:
        pytest.fail("256 frames held 100000 incompressible pages")
    assert RejectReason(-pampd) is not None
    used = stack.frames.used_frames
    for _ in range(3):
        assert pam.create(1, 2, 0, memoryview(page(kind, 1, page_size)), replacing=False) < 0
    assert stack.frames.used_frames == used, "a refused page left something behind"
    for handle, (index, data) in held.items():
        assert get(handle, 2, index) == data


def test_rule_9_no_page_is_stored_larger_than_a_page(
    pam: Pam, stack: Stack, page_size: int, kinds: list[str]
) -> None:
    count = 60
    if "noise" not in kinds:
        for index in range(count):
            assert (
                pam.create(
                    1, 2, index, memoryview(page("noise", index, page_size)), replacing=False
                )
                < 0
            )
        assert stack.frames.used_frames == 0
        return
    for index in range(count):
        _create(pam, page("noise", index, page_size), index=index)
    # Each has a header beside it: half a frame of zbud's if nothing else is there that it fits
    # beside.
    dense = -(-count * 2 * HEADER_BYTES // page_size) * 16
    headers = count // 2 if isinstance(stack.allocator, ZbudPool) else dense
    assert stack.frames.used_frames <= count + headers


def test_compaction_follows_every_page(
    pam: Pam, get: Get, stack: Stack, page_size: int, kinds: list[str]
) -> None:
    movable = [
        kind for kind in ("words", "half", "pointers", "noise", "poor", "same") if kind in kinds
    ]
    held = {}
    for index in range(160):
        data = page(movable[index % len(movable)], index, page_size)
        held[index] = _create(pam, data, index=index), data
    for index in list(held):
        if index % 5:
            pam.free(held.pop(index)[0])

    def moved(pool: int, oid: int, index: int, old: int, new: int) -> None:
        pampd, data = held[index]
        assert (pool, oid, pampd) == (1, 2, old)
        assert get(old, 2, index) == get(new, 2, index) == data
        held[index] = new, data

    before = stack.frames.used_frames
    freed = pam.compact(moved, 1 << 30)
    assert freed > 0
    assert before - stack.frames.used_frames == freed
    for index, (pampd, data) in held.items():
        assert get(pampd, 2, index) == data
    for pampd, _ in held.values():
        pam.free(pampd)
    assert stack.frames.used_frames == 0
