# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared state: what a worker writes the next one reads, also when the writer dies in the middle."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import handover
from zswapd.errors import HandoverError
from zswapd.handover import GEOMETRY_BYTES, SLOT_BYTES, HookWord, Phase, SharedState, Word, hook_bytes

GEOMETRY: dict[str, Any] = {"mountpoint": "/run/x", "page_size": 4096, "files": {"swap": 1 << 20}}
MAX_IO = 1 << 16


@pytest.fixture(params=["auto", "memfd"])
def state(request: pytest.FixtureRequest) -> Iterator[SharedState]:
    made = SharedState.new(GEOMETRY, lost={"swap": 33, "other": 5}, max_io=MAX_IO, kind=request.param)
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


@given(documents=st.lists(st.dictionaries(st.text(max_size=5), st.integers()), min_size=1, max_size=6))
def test_last_document_counts(documents: list[dict[str, int]]) -> None:
    state = SharedState.new(GEOMETRY, lost={}, max_io=MAX_IO, kind="memfd")
    for document in documents:
        state.save(document)
        assert state.load() == document
    state.close()


@pytest.mark.parametrize("torn", range(0, 120, 7))
def test_writer_that_dies_leaves_the_document_before(state: SharedState, torn: int) -> None:
    """The new document's bytes up to any point, without its header; or with a header that got no further."""
    state.save({"number": 1})
    state.save({"number": 2})
    slots = [state._view[mmap.PAGESIZE + k * SLOT_BYTES :][:SLOT_BYTES] for k in (0, 1)]
    before = [bytes(slot[:200]) for slot in slots]
    state.save({"number": 3, "padding": "x" * 90})
    changed = next(k for k in (0, 1) if bytes(slots[k][:200]) != before[k])
    after = bytes(slots[changed][:200])
    # Data first (behind the 24 bytes of header), then the header.
    slots[changed][:200] = before[changed][:24] + after[24 : 24 + torn] + before[changed][24 + torn :]

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
    assert state.layout == handover.LAYOUT_VERSION
    state.note_codecs(["lz4", "zstd"])
    heir = successor(state)
    assert heir.layout == handover.LAYOUT_WITH_ZSTD
    heir.close()
    monkeypatch.setattr(handover, "READABLE_LAYOUTS", (handover.LAYOUT_VERSION,))  # an older one's
    with pytest.raises(HandoverError, match="layout 2"):
        successor(state)


def test_file_of_another_layout_or_kind_is_refused(state: SharedState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "READABLE_LAYOUTS", (99,))
    with pytest.raises(HandoverError, match=r"layout 1, this program knows \(99,\)") as caught:
        successor(state)
    assert caught.value.hint
    for size in (0, mmap.PAGESIZE):
        fd = os.memfd_create("test")
        os.ftruncate(fd, size)
        with pytest.raises(HandoverError):
            SharedState(fd)
        os.close(fd)
