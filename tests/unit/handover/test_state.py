# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared state: what a worker writes the next one reads.

Also when the writer dies in the middle.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from zswapd.core.allocators.arena import punch_hole
from zswapd.errors import HandoverError
from zswapd.handover import state as state_module
from zswapd.handover.state import (
    GEOMETRY_BYTES,
    SLOT_BYTES,
    HookWord,
    Phase,
    SharedState,
    Word,
    hook_bytes,
)
from zswapd.host.machine import EHWPOISON

GEOMETRY: dict[str, Any] = {"mountpoint": "/run/x", "page_size": 4096, "files": {"swap": 1 << 20}}
MAX_IO = 1 << 16


@pytest.fixture(params=["auto", "memfd"])
def state(request: pytest.FixtureRequest) -> Iterator[SharedState]:
    made = SharedState.new(
        GEOMETRY, lost={"swap": 33, "other": 5}, max_io=MAX_IO, kind=request.param
    )
    yield made
    made.close()


def successor(state: SharedState) -> SharedState:
    """What another process makes of the same file."""
    return SharedState(os.dup(state.fd))


def test_new_state_is_empty_populated_and_says_what_it_is_for(state: SharedState) -> None:
    assert state.geometry == {**GEOMETRY, "lost": {"swap": 33, "other": 5}}
    assert state.load() == {}
    assert set(state.words) == {0}
    assert os.fstat(state.fd).st_blocks * 512 >= os.fstat(state.fd).st_size
    assert Phase.STARTING == 0


def test_successor_sees_words_hook_lost_pages_and_document(state: SharedState) -> None:
    state.words[Word.STARTED] = 7
    state.hook_words[HookWord.POISON] = 1 << 63
    state.hook[-1] = 9
    state.lost()["swap"][32] = 3
    state.lost()["other"][4] = 4
    state.save({"settings": {"pool.compressor": "lzo"}})

    other = successor(state)

    assert other.words[Word.STARTED] == 7
    assert other.hook_words[HookWord.POISON] == 1 << 63
    assert other.hook[-1] == 9
    assert (other.lost()["swap"][32], other.lost()["other"][4]) == (3, 4)
    assert bytes(other.lost()["swap"][:32]) == bytes(32)
    assert other.load() == {"settings": {"pool.compressor": "lzo"}}
    other.close()


def test_hook_gets_as_much_as_it_asks_for_on_a_page_boundary(state: SharedState) -> None:
    assert len(state.hook) >= hook_bytes(MAX_IO)
    offset = bytes(state.hook[:8])
    state.hook[:8] = b"here it "
    with mmap.mmap(state.fd, 0) as mapping:
        assert mapping.find(b"here it ") % mmap.PAGESIZE == 0
    state.hook[:8] = offset


@given(
    documents=st.lists(st.dictionaries(st.text(max_size=5), st.integers()), min_size=1, max_size=6)
)
def test_last_document_counts(documents: list[dict[str, int]]) -> None:
    state = SharedState.new(GEOMETRY, lost={}, max_io=MAX_IO, kind="memfd")
    for document in documents:
        state.save(document)
        assert state.load() == document
    state.close()


@pytest.mark.parametrize("torn", range(0, 120, 7))
def test_writer_that_dies_leaves_the_document_before(state: SharedState, torn: int) -> None:
    """The new document's bytes up to any point, without its header.

    Or with a header that got no further.
    """
    state.save({"number": 1})
    state.save({"number": 2})
    slots = [state._view[mmap.PAGESIZE + k * SLOT_BYTES :][:SLOT_BYTES] for k in (0, 1)]
    before = [bytes(slot[:200]) for slot in slots]
    state.save({"number": 3, "padding": "x" * 90})
    changed = next(k for k in (0, 1) if bytes(slots[k][:200]) != before[k])
    after = bytes(slots[changed][:200])
    # Data first (behind the 24 bytes of header), then the header.
    slots[changed][:200] = (
        before[changed][:24] + after[24 : 24 + torn] + before[changed][24 + torn :]
    )

    assert state.load() == {"number": 2}
    slots[changed][:200] = after[: torn % 24] + before[changed][torn % 24 : 24] + after[24:]
    assert state.load()["number"] in (2, 3)


def test_document_too_long_is_refused_and_the_last_one_stays(state: SharedState) -> None:
    state.save({"a": 1})
    with pytest.raises(HandoverError, match="too many"):
        state.save({"a": "x" * SLOT_BYTES})
    assert state.load() == {"a": 1}


def test_geometry_too_long_is_refused() -> None:
    with pytest.raises(HandoverError):
        SharedState.new({"files": "x" * GEOMETRY_BYTES}, lost={}, max_io=MAX_IO, kind="memfd")


def test_programs_that_do_not_know_zstd_refuse_once_there_may_be_some(
    state: SharedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.note_codecs(["lz4", "lzo"])
    assert state.layout == state_module.LAYOUT_VERSION
    state.note_codecs(["lz4", "zstd"])
    heir = successor(state)
    assert heir.layout == state_module.LAYOUT_WITH_ZSTD
    heir.close()
    monkeypatch.setattr(
        state_module, "READABLE_LAYOUTS", (state_module.LAYOUT_VERSION,)
    )  # an older one's
    with pytest.raises(HandoverError, match="layout 2"):
        successor(state)


def test_file_of_another_layout_or_kind_is_refused(
    state: SharedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "READABLE_LAYOUTS", (99,))
    with pytest.raises(HandoverError, match=r"layout 1, this program knows \(99,\)") as caught:
        successor(state)
    assert caught.value.hint
    for size in (0, mmap.PAGESIZE):
        fd = os.memfd_create("test")
        os.ftruncate(fd, size)
        with pytest.raises(HandoverError):
            SharedState(fd)
        os.close(fd)


# What changes by itself.


def shape(state: SharedState) -> tuple[object, ...]:
    return (
        state.geometry,
        state.layout,
        len(state.hook),
        {name: len(bits) for name, bits in state.lost().items()},
    )


def flip(fd: int, place: int, bit: int) -> None:
    (byte,) = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([byte ^ 1 << bit]), place)


SUPERBLOCK, GEOMETRY_AT = 40, mmap.PAGESIZE + 2 * SLOT_BYTES


@pytest.mark.parametrize("at", [0, GEOMETRY_AT + GEOMETRY_BYTES - 48])
def test_no_bit_of_the_superblock_or_its_copy_makes_another_state(
    state: SharedState, at: int
) -> None:
    state.note_codecs(["zstd"])
    before = shape(state)
    for place in range(at, at + SUPERBLOCK):
        for bit in range(8):
            flip(state.fd, place, bit)
            heir = successor(state)
            assert shape(heir) == before, f"bit {bit} of byte {place}"
            heir.close()
    assert os.pread(state.fd, SUPERBLOCK, 0) == os.pread(
        state.fd, SUPERBLOCK, GEOMETRY_AT + GEOMETRY_BYTES - 48
    )


@pytest.mark.parametrize("at", [GEOMETRY_AT, GEOMETRY_AT + GEOMETRY_BYTES // 2])
def test_no_bit_of_the_geometry_makes_another(state: SharedState, at: int) -> None:
    before = shape(state)
    for place in range(at, at + 24 + 130):
        flip(state.fd, place, place % 8)
        heir = successor(state)
        assert shape(heir) == before, f"byte {place}"
        heir.close()


@pytest.mark.parametrize(
    "at",
    [
        0,
        GEOMETRY_AT,
        GEOMETRY_AT + GEOMETRY_BYTES // 2,
        GEOMETRY_AT + GEOMETRY_BYTES - mmap.PAGESIZE,
    ],
)
def test_page_that_has_become_zeros_is_made_again(state: SharedState, at: int) -> None:
    before = shape(state)
    os.pwrite(state.fd, bytes(mmap.PAGESIZE), at)
    for _ in range(2):
        heir = successor(state)
        assert shape(heir) == before
        heir.close()


def test_damage_in_both_places_is_refused(state: SharedState) -> None:
    for at in (GEOMETRY_AT, GEOMETRY_AT + GEOMETRY_BYTES // 2):
        flip(state.fd, at + 30, 0)
    with pytest.raises(HandoverError, match="does not say what it serves"):
        successor(state)


def made_by_an_older_program(areas: dict[str, int]) -> int:
    """A file as it was made without second copies, byte by byte."""
    fd = os.memfd_create("older")
    document = {**GEOMETRY, "lost": {"swap": 33}, **({"areas": areas} if areas else {})}
    text = json.dumps(document, separators=(",", ":")).encode()
    hook_at = -(-(GEOMETRY_AT + GEOMETRY_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
    lost_at = hook_at + 2 * mmap.PAGESIZE + MAX_IO
    end = lost_at + sum(-(-size // 8) * 8 for size in (33, *areas.values()))
    os.ftruncate(fd, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE)
    os.pwrite(fd, struct.pack("=8sIIQQQ", b"zswapd\0H", 1, mmap.PAGESIZE, hook_at, lost_at, end), 0)
    os.pwrite(fd, struct.pack("=QQQ", 1, len(text), xxh3_64_intdigest(text, 1)) + text, GEOMETRY_AT)
    os.pwrite(fd, struct.pack("=QQ", 77, 4711), 256 + 8 * Word.WORKER)
    os.pwrite(fd, b"\x80", lost_at + 32)
    return fd


@pytest.mark.parametrize("areas", [{}, {"tried:swap": 256, "backing.key": 64}])
def test_file_of_an_older_program_is_adopted_and_gets_its_copies(areas: dict[str, int]) -> None:
    state = SharedState(made_by_an_older_program(areas))
    assert state.words[Word.WORKER] == 77
    assert state.check_words(Word.WORKER_CHECK), "what has no checksum is believed"
    assert state.lost()["swap"][32] == 0x80
    assert set(state.areas) == set(areas)
    before = shape(state)
    flip(state.fd, 16, 3)
    flip(state.fd, GEOMETRY_AT + 40, 3)
    heir = successor(state)
    assert shape(heir) == before
    heir.close()
    state.close()


@pytest.mark.parametrize("place", range(16, 40))
def test_superblock_without_a_copy_that_contradicts_itself_is_refused(place: int) -> None:
    fd = made_by_an_older_program({})
    flip(fd, place, 3)
    with pytest.raises(HandoverError):
        SharedState(fd)
    os.close(fd)


def test_documents_damaged_both_are_forgotten_and_the_log_says_so(
    state: SharedState, expect_log: Any
) -> None:
    assert state.load() == {}
    state.save({"number": 1})
    state.save({"number": 2})
    flip(state.fd, mmap.PAGESIZE + 30, 0)
    assert state.load() in ({"number": 1}, {"number": 2})
    expect_log(
        "settings and volumes of run time, a freeze, and counters are lost",
        level=logging.ERROR,
        count=1,
    )
    flip(state.fd, mmap.PAGESIZE + SLOT_BYTES + 30, 0)
    assert state.load() == {}


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (Word.WORKER_CHECK, (Word.WORKER, Word.WORKER_BORN)),
        (
            Word.FILES_CHECK,
            tuple(Word(place) for place in range(Word.FILE_FUSE, Word.FILE_BACKING + 1)),
        ),
    ],
)
def test_word_that_others_rely_on_is_not_believed_with_one_bit_changed(
    state: SharedState, check: Word, words: tuple[Word, ...]
) -> None:
    for number, word in enumerate(words):
        state.words[word] = 1000 + number
    state.seal_words(check)
    assert state.check_words(check)
    for word in words:
        for bit in range(64):
            state.words[word] ^= 1 << bit
            assert not state.check_words(check)
            state.words[word] ^= 1 << bit
        kept, state.words[word] = state.words[word], 0
        assert not state.check_words(check)
        state.words[word] = kept


class Poisoned:
    """A mapping with pages that the kernel says are poisoned, until a hole is punched there."""

    def __init__(self, state: SharedState, pages: set[int]) -> None:
        self.pages = pages
        self._map = state._map

    def madvise(self, advice: int, start: int, length: int) -> None:
        assert advice == state_module._MADV_POPULATE_WRITE
        if any(start <= page < start + length for page in self.pages):
            raise OSError(EHWPOISON, "Memory page has hardware error")


@pytest.mark.parametrize(
    "place", ["words", "a document", "geometry", "its copy", "hook", "the end"]
)
def test_poisoned_page_gets_other_memory_and_what_has_a_copy_comes_back(
    state: SharedState, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    offset = {
        "words": 0,
        "a document": mmap.PAGESIZE,
        "geometry": GEOMETRY_AT,
        "its copy": GEOMETRY_AT + GEOMETRY_BYTES - mmap.PAGESIZE,
        "hook": GEOMETRY_AT + GEOMETRY_BYTES,
        "the end": len(state._view) - mmap.PAGESIZE,
    }[place]
    state.save({"number": 1})
    state.save({"number": 1})
    before, mapping = shape(state), Poisoned(state, {offset})

    def punch(fd: int, start: int, length: int) -> None:
        assert length == mmap.PAGESIZE
        punch_hole(fd, start, length)
        mapping.pages.remove(start)

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "punch_hole", punch)
        patch.setattr(state, "_map", mapping)
        assert state.refresh() == 1
        assert state.refresh() == 0
    assert not mapping.pages
    heir = successor(state)
    assert shape(heir) == before
    assert heir.load() == {"number": 1}
    heir.close()
