# SPDX-License-Identifier: GPL-2.0-or-later
"""The roster: which swap files there are, as every later worker and program reads it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.support.successor import make_config
from zswapd.core.block.device import lost_bytes
from zswapd.errors import ClientError, HandoverError
from zswapd.handover.geometry import check_geometry, describe_geometry
from zswapd.handover.roster import Roster, made_files
from zswapd.handover.state import LAYOUT_WITH_FILES, LAYOUT_WITH_ZSTD, SharedState

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def state() -> Iterator[SharedState]:
    geometry = {"files": {"swap": 8 * MIB, "more": 4 * MIB}, "arena": {"kind": "tmpfs"}}
    sizes = {name: lost_bytes(size, PAGE) for name, size in geometry["files"].items()}
    made = SharedState.new(geometry, lost=sizes, max_io=PAGE)
    yield made
    made.close()


def again(state: SharedState) -> SharedState:
    return SharedState(os.dup(state.fd))


def roster(state: SharedState, *, is_growable: bool = True) -> Roster:
    return Roster(state, page_size=PAGE, is_growable=is_growable)


def test_first_files_have_the_numbers_that_every_program_gives_them(state: SharedState) -> None:
    found = roster(state)
    assert [(one.name, one.swap_type, one.inode) for one in found.members.values()] == [
        ("swap", 0, 2),
        ("more", 1, 3),
    ]
    assert not found.is_changed
    assert state.layout < LAYOUT_WITH_FILES


def test_later_program_reads_what_has_come_and_gone(state: SharedState) -> None:
    one = roster(state)
    member = one.add("guest", 64 * MIB)
    lost, copy = one.bitmaps_of(member)
    lost[0], copy[1] = 5, 6
    one.remove("more", is_configured=True)
    other_state = again(state)
    other = roster(other_state)
    assert {name: one.swap_type for name, one in other.members.items()} == {"swap": 0, "guest": 2}
    assert other.removed == {"more"}
    first, second = other.bitmaps()
    assert (first["guest"][0], second["guest"][1]) == (5, 6)
    assert other_state.layout == LAYOUT_WITH_FILES
    assert made_files(other_state.geometry) == {"swap": 8 * MIB, "more": 4 * MIB}
    # The number of a file that has gone is free; its inode is not used again.
    third = other.add("third", MIB)
    assert (third.swap_type, third.inode) == (1, 5)
    other_state.close()


def test_process_with_an_older_copy_takes_the_new_one_and_does_not_undo_it(
    state: SharedState,
) -> None:
    other = again(state)  # as the spare has it
    roster(state).add("guest", MIB)
    other.refresh()
    assert "guest" in roster(other).members
    assert "guest" in roster(again(state)).members
    other.close()


def test_layout_that_says_zstd_is_not_lowered_nor_the_other_way(state: SharedState) -> None:
    state.note_codecs(["zstd"])
    assert state.layout == LAYOUT_WITH_ZSTD
    roster(state).add("guest", MIB)
    state.note_codecs(["zstd"])
    assert again(state).layout == LAYOUT_WITH_FILES


def test_death_between_the_copies_leaves_the_roster_as_it_was_or_as_it_is(
    state: SharedState,
) -> None:
    before = dict(state.geometry["files"])
    copies = state._copies_of_geometry()
    kept = bytes(copies[0])
    roster(state).add("guest", MIB)
    copies[0][:] = kept  # the first copy was not written
    assert "guest" in again(state).geometry["files"]
    copies[0][:] = kept  # which `again` has mended
    copies[1][100] ^= 0xFF  # and the second one was cut short
    assert again(state).geometry["files"] == before


def test_memory_of_files_that_have_gone_is_used_again(state: SharedState) -> None:
    found = roster(state)
    found.add("kept", 64 * MIB)
    length = os.fstat(state.fd).st_size
    blocks = os.fstat(state.fd).st_blocks
    for number in range(300):
        member = found.add("guest", (1 + number % 9) * 64 * MIB)
        lost, _copy = found.bitmaps_of(member)
        assert lost[0] == 0, "the bits of a file that had this memory before"
        lost[:] = b"\xff" * len(lost)
        found.remove("guest", is_configured=False)
    assert os.fstat(state.fd).st_blocks == blocks
    assert os.fstat(state.fd).st_size <= length + 2 * 9 * 64 * MIB // PAGE // 8 + 4 * PAGE


def test_marks_of_recompression_keep_their_memory(state: SharedState) -> None:
    marks = state.extend(100_000)
    marks[:] = b"\7" * len(marks)
    found = roster(state)
    for bitmap in found.bitmaps_of(found.add("guest", 64 * MIB)):
        assert bitmap[0] == 0
        bitmap[:] = b"\1" * len(bitmap)
    assert bytes(marks) == b"\7" * len(marks)


def test_number_of_files_has_a_limit_and_a_memfd_does_not_grow(state: SharedState) -> None:
    found = roster(state)
    for number in range(30):
        found.add(f"guest{number}", MIB)
    with pytest.raises(ClientError, match="32 swap files"):
        found.add("one-more", MIB)
    with pytest.raises(ClientError, match="memfd"):
        roster(state, is_growable=False).add("guest", MIB)


def geometry(*settings: str) -> dict[str, object]:
    return {**describe_geometry(make_config(*settings)), "arena": {"kind": "tmpfs"}}


def test_settings_may_have_more_files_and_lack_those_that_came(state: SharedState) -> None:
    running = geometry("swap.files.more=4M")
    state.geometry = {**state.geometry, **running}
    check_geometry(make_config("swap.files.more=4M", "swap.files.guest=1M"), state.geometry)
    with pytest.raises(HandoverError, match=r"swap\.files\.more"):
        check_geometry(make_config(), state.geometry)
    with pytest.raises(HandoverError, match=r"swap\.files\.more"):
        check_geometry(make_config("swap.files.more=8M"), state.geometry)
    found = roster(state)
    found.add("guest", MIB)
    check_geometry(make_config("swap.files.more=4M"), state.geometry)
    check_geometry(make_config("swap.files.guest=1M", "swap.files.more=4M"), state.geometry)
    with pytest.raises(HandoverError, match=r"swap\.files\.guest"):
        check_geometry(make_config("swap.files.guest=2M", "swap.files.more=4M"), state.geometry)
    with pytest.raises(HandoverError, match=r"swap\.files\.more"):
        check_geometry(make_config(), state.geometry)
    found.remove("more", is_configured=True)
    check_geometry(make_config(), state.geometry)


def test_memfd_cannot_get_a_file_from_the_settings() -> None:
    running = {**geometry(), "arena": {"kind": "memfd"}}
    with pytest.raises(HandoverError, match="guest"):
        check_geometry(make_config("swap.files.guest=1M"), running)
