# SPDX-License-Identifier: GPL-2.0-or-later
"""pageframes: runs, the reserve, and memory that really goes back to the system."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import pytest

from tests.support.fakes import FailingArena
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.frametable import (
    EPHEMERAL,
    HALF_MASK,
    LENGTH_MASK,
    MAX_RUN,
    PERSISTENT,
    SEALED,
    TAKEN,
    USED,
    seal_words,
)
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.errors import ArenaError, InvariantError

MakeFrames = Callable[..., PageFrames]


def chunk_of(page_size: int) -> int:
    """Return how many frames make a chunk."""
    return (2 << 20) // page_size


@pytest.fixture
def make(page_size: int) -> Iterator[MakeFrames]:
    """Make page frames over an arena of the given number; each is checked and closed at the end."""
    made: list[PageFrames] = []

    def make_frames(total: int, *, reserve: int, refill: bool = True) -> PageFrames:
        frames = PageFrames(Arena(total, page_size, kind="memfd"), reserve_frames=reserve)
        made.append(frames)
        if refill:
            frames.refill_now()
        return frames

    yield make_frames
    for frames in made:
        frames.check()
        frames.arena.close()


def test_new_pool_is_all_holes(make: MakeFrames) -> None:
    frames = make(100, reserve=50, refill=False)
    seen = frames.statistics()
    assert (seen.total_frames, seen.used_frames, seen.free_frames) == (100, 0, 0)
    assert frames.wants_refill()


def test_empty_reserve_refuses_at_once_and_counts(make: MakeFrames) -> None:
    frames = make(100, reserve=50, refill=False)
    backed = frames.arena.backed_bytes()
    assert [frames.alloc(1), frames.alloc(MAX_RUN)] == [0, 0]
    assert frames.statistics().failed_get_free_pages == 2
    assert frames.arena.backed_bytes() == backed, "a refusal must not touch memory"


@pytest.mark.parametrize("total", [1, 2, 3, 10, 33, 600])
def test_refill_fills_to_the_target_or_the_end(make: MakeFrames, total: int) -> None:
    frames = make(total, reserve=total)
    seen = frames.statistics()
    assert seen.free_frames == seen.refilled_frames == total
    # What is on the books is really there: every frame can be had and written.
    got = []
    while first := frames.alloc(1):
        frames.arena.view[first * frames.page_size] = 1
        got.append(first)
    assert len(got) == len(set(got)) == total
    assert min(got) >= frames.first_frame


def test_refill_stops_at_the_target(make: MakeFrames) -> None:
    frames = make(2000, reserve=100)
    assert 100 <= frames.statistics().free_frames <= 100 + frames.chunk_frames
    assert not frames.wants_refill()
    assert frames.begin_refill(1000).runs == []


def test_reserve_is_wanted_again_below_three_quarters(make: MakeFrames) -> None:
    frames = make(2000, reserve=400)
    taken = 0
    while not frames.wants_refill():
        assert frames.alloc(1)
        taken += 1
    assert taken == 101
    frames.refill_now()
    assert not frames.wants_refill()


def test_used_frames_are_populated_memory(make: MakeFrames) -> None:
    frames = make(300, reserve=300)
    backed = frames.arena.backed_bytes()
    for length in (1, 2, 5, 16):
        first = frames.alloc(length)
        start = first * frames.page_size
        frames.arena.view[start : start + length * frames.page_size] = b"\xa5" * (
            length * frames.page_size
        )
    assert frames.arena.backed_bytes() == backed


@pytest.mark.parametrize("length", range(1, MAX_RUN + 1))
def test_freed_neighbours_join(make: MakeFrames, length: int) -> None:
    frames = make(32, reserve=32)
    runs = []
    while first := frames.alloc(length):
        runs.append(first)
    before = frames.statistics()
    assert before.used_frames == len(runs) * length
    for first in runs[1::2] + runs[::2]:
        frames.free(first)
        frames.check()
    after = frames.statistics()
    assert (after.used_frames, after.free_frames) == (0, 32)
    # All of one piece again, as far as the bounds of a chunk allow.
    bounds = range(0, frames.end_frame, frames.chunk_frames)
    pieces = [
        len(range(max(b, frames.first_frame), min(b + frames.chunk_frames, frames.end_frame)))
        for b in bounds
    ]
    assert after.reserve_frames == sum(piece for piece in pieces if piece >= MAX_RUN)


def test_alloc_prefers_the_run_that_fits_best(make: MakeFrames) -> None:
    frames = make(32, reserve=32)
    blocks = [frames.alloc(2) for _ in range(16)]
    frames.free(blocks[3])
    frames.free(blocks[8])
    frames.free(blocks[9])
    assert frames.alloc(2) == blocks[3], "took from the longer run"
    assert frames.alloc(4) == blocks[8]


def test_first_of_names_the_run(make: MakeFrames) -> None:
    frames = make(64, reserve=64)
    for length in (1, 3, 16):
        first = frames.alloc(length)
        assert {frames.table.first_of(frame) for frame in range(first, first + length)} == {first}


def test_double_free_is_an_invariant_error(make: MakeFrames) -> None:
    frames = make(32, reserve=32)
    first = frames.alloc(4)
    with pytest.raises(InvariantError, match=str(first + 1)):
        frames.free(first + 1)
    frames.free(first)
    with pytest.raises(InvariantError, match=str(first)):
        frames.free(first)


def test_double_free_is_noticed_after_the_run_was_joined(make: MakeFrames) -> None:
    # The run's own tags are then in the middle of a longer free run.
    frames = make(32, reserve=32)
    runs = [frames.alloc(2) for _ in range(6)]
    frames.free(runs[1])
    frames.free(runs[2])
    frames.check()
    with pytest.raises(InvariantError, match=str(runs[2])):
        frames.free(runs[2])


def test_trim_gives_the_memory_back_to_the_system(make: MakeFrames, page_size: int) -> None:
    frames = make(7 * chunk_of(page_size), reserve=5 * chunk_of(page_size))
    free = frames.statistics().free_frames
    before = frames.arena.backed_bytes()
    assert before >= free * page_size
    frames.reserve_target = 0
    assert frames.trim_now() == frames.statistics().trimmed_frames == free
    assert frames.statistics().free_frames == 0
    assert before - frames.arena.backed_bytes() == free * page_size


def test_trim_keeps_used_data_and_the_reserve(make: MakeFrames, page_size: int) -> None:
    chunk = chunk_of(page_size)
    frames = make(16 * chunk, reserve=12 * chunk)
    kept = {}
    for number in range(20):
        first = frames.alloc(number % MAX_RUN + 1)
        frames.arena.view[first * frames.page_size] = number
        kept[first] = number
    frames.reserve_target = 2 * chunk
    assert frames.wants_trim()
    frames.trim_now()
    assert not frames.wants_trim()
    assert frames.statistics().free_frames >= 2 * chunk
    assert {first: frames.arena.view[first * frames.page_size] for first in kept} == kept


def test_trimmed_frames_can_be_refilled(make: MakeFrames) -> None:
    frames = make(1200, reserve=1200)
    frames.reserve_target = 0
    frames.trim_now()
    assert frames.alloc(1) == 0
    frames.reserve_target = 1200
    frames.refill_now()
    assert frames.statistics().free_frames == 1200


@pytest.mark.parametrize("script", ["E", "RE", "RRE"])
def test_refill_that_runs_out_of_memory_keeps_what_it_got(
    make: MakeFrames, page_size: int, script: str
) -> None:
    total = 5 * chunk_of(page_size)
    frames = make(total, reserve=total, refill=False)
    job = frames.begin_refill(total)
    assert len(job.runs) > 3
    lengths = [count for _, count in job.runs]
    with pytest.raises(ArenaError):
        job.work(FailingArena(frames.arena, script))
    frames.commit(job)
    frames.check()
    assert frames.statistics().free_frames == sum(lengths[: len(script) - 1])
    frames.refill_now()  # the next one gets the rest
    assert frames.statistics().free_frames == total


def test_refill_now_without_memory_says_so_and_leaves_the_books_right(
    make: MakeFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make(600, reserve=600, refill=False)

    def refuse(self: Arena, offset: int, length: int, *, floor: int = 0) -> int:
        raise ArenaError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(Arena, "populate", refuse)
        with pytest.raises(ArenaError):
            frames.refill_now()
    frames.check()
    assert frames.statistics().free_frames == 0
    frames.refill_now()
    assert frames.statistics().free_frames == 600


def test_refill_that_stops_at_the_watermarks_keeps_what_it_got(
    make: MakeFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make(600, reserve=600, refill=False)
    job = frames.begin_refill(600)
    populate = Arena.populate

    def half(
        self: Arena, offset: int, length: int, *, floor: int = 0, is_idle: bool = False
    ) -> int:
        assert (floor, is_idle) == (77, True)
        return populate(self, offset, length // 2)

    (first, count) = job.runs[0]
    with monkeypatch.context() as patched:
        # The table of the chunk is populated whatever the floor.
        patched.setattr(Arena, "populate_table", lambda *_: None)
        frames.arena.populate_table(first, frames.chunk_frames)
        patched.setattr(Arena, "populate", half)
        with pytest.raises(ArenaError, match="watermarks"):
            job.work(frames.arena, 77)
    frames.commit(job)
    frames.check()
    assert frames.statistics().free_frames == count // 2
    frames.refill_now()
    assert frames.statistics().free_frames == 600


def test_trim_that_fails_keeps_the_frames(make: MakeFrames) -> None:
    frames = make(300, reserve=300)
    frames.reserve_target = 0
    job = frames.begin_trim(300)
    with pytest.raises(ArenaError):
        job.work(FailingArena(frames.arena, "E"))
    frames.commit(job)
    frames.check()
    assert frames.statistics().free_frames == 300
    assert frames.statistics().trimmed_frames == 0


def test_trim_takes_a_bounded_number_of_runs_at_a_time(
    make: MakeFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make(6000, reserve=6000)
    held = [frames.alloc(1) for _ in range(5000)]
    for first in held[::2]:
        frames.free(first)
    frames.reserve_target = 0
    job = frames.begin_trim(6000, all_of_it=True, long_only=True)
    assert job.runs
    assert all(count >= MAX_RUN for _, count in job.runs)
    assert not frames.begin_trim(6000, all_of_it=True, long_only=True).runs
    frames.commit(job)  # not done
    jobs = []
    while (job := frames.begin_trim(6000, all_of_it=True)).runs:
        jobs.append(len(job.runs))
        job.work(frames.arena)
        frames.commit(job)
        frames.check()
    assert jobs[0] == 1024
    assert max(jobs) == 1024
    assert sum(jobs) >= 2500
    assert frames.statistics().free_frames == 0


def test_trim_that_fails_on_the_way_keeps_the_rest(make: MakeFrames) -> None:
    frames = make(400, reserve=400)
    held = [frames.alloc(1) for _ in range(300)]
    for first in held[:10:2]:
        frames.free(first)
    frames.reserve_target = 0
    before = frames.statistics().free_frames
    job = frames.begin_trim(3)
    assert [count for _, count in job.runs] == [1, 1, 1]
    with pytest.raises(ArenaError):
        job.work(FailingArena(frames.arena, "RE"))
    frames.commit(job)
    frames.check()
    assert (frames.statistics().free_frames, frames.statistics().trimmed_frames) == (before - 1, 1)


def test_second_refill_waits_for_the_first(make: MakeFrames) -> None:
    frames = make(400, reserve=400, refill=False)
    first = frames.begin_refill(100)
    second = frames.begin_refill(100)
    assert not {frame for run in first.runs for frame in run[:1]} & {
        frame for run in second.runs for frame in run[:1]
    }
    first.work(frames.arena)
    second.work(frames.arena)
    frames.commit(first)
    frames.commit(second)
    frames.check()
    frames.refill_now()
    assert frames.statistics().free_frames == 400


@pytest.mark.parametrize("side", ["before", "behind"])
def test_free_beside_a_run_that_is_being_trimmed_does_not_join_it(
    make: MakeFrames, side: str
) -> None:
    # The race: trim has taken a run and punches it in a thread, while the page path frees its
    # neighbour.
    frames = make(40, reserve=40)
    blocks = [frames.alloc(4) for _ in range(10)]
    frames.free(blocks[5])
    frames.reserve_target = 0
    job = frames.begin_trim(4)
    assert job.runs == [(blocks[5], 4)]
    neighbour = blocks[4] if side == "before" else blocks[6]
    frames.free(neighbour)
    frames.check()
    assert frames.alloc(4) == neighbour
    frames.arena.view[neighbour * frames.page_size] = 7
    job.work(frames.arena)
    frames.commit(job)
    frames.check()
    assert frames.arena.view[neighbour * frames.page_size] == 7


def test_peak_use_is_remembered(make: MakeFrames) -> None:
    frames = make(32, reserve=32)
    held = [frames.alloc(3) for _ in range(5)]
    for first in held:
        frames.free(first)
    assert (frames.statistics().used_frames, frames.statistics().used_frames_max) == (0, 15)


def test_page_path_asks_for_no_memory(make: MakeFrames) -> None:
    frames = make(1500, reserve=1200)
    backed = frames.arena.backed_bytes()
    held: list[int] = []
    for number in range(3000):
        if number % 3 == 2:
            frames.free(held.pop(number % len(held)))
        elif first := frames.alloc(number % MAX_RUN + 1):
            held.append(first)
    assert held
    # Also the table: the neighbours that a free looks at are in memory already.
    assert frames.arena.backed_bytes() - backed < mmap.PAGESIZE


def test_low_reserve_is_announced_once_until_it_is_refilled(make: MakeFrames) -> None:
    frames = make(2000, reserve=400)
    calls: list[int] = []
    frames.when_low = lambda: calls.append(frames.statistics().reserve_frames)
    while not calls:
        assert frames.alloc(1)
    assert 280 < calls[0] < 300  # where a chunk ends, a run may be too short to count
    assert frames.wants_refill()
    for _ in range(100):
        frames.alloc(1)
    assert len(calls) == 1
    frames.refill_now()
    for _ in range(200):
        frames.alloc(1)
    assert len(calls) == 2


def test_low_reserve_is_announced_before_it_refuses(make: MakeFrames) -> None:
    frames = make(600, reserve=64)
    calls: list[int] = []

    def refill() -> None:
        # Not what a daemon may do from here, but the quickest one there could be.
        calls.append(frames.statistics().failed_get_free_pages)
        frames.refill_now()

    frames.when_low = refill
    while frames.alloc(1):
        pass
    assert frames.statistics().used_frames == 600
    assert set(calls) <= {0, 1}, "frames were refused while there were holes to refill from"


def test_low_reserve_is_announced_again_after_a_time_without_holes(
    make: MakeFrames, page_size: int
) -> None:
    # All frames are populated and in use, so a refill finds nothing to do. Then most go back to the
    # system, and the pool grows again. Without a new call of `when_low` it would refuse for ever.
    chunk = chunk_of(page_size)
    frames = make(6 * chunk, reserve=chunk)
    wakes: list[int] = []
    frames.when_low = lambda: wakes.append(1)
    held: list[int] = []

    def grow() -> None:
        while (first := frames.alloc(1)) or wakes:
            if wakes:
                wakes.clear()
                if frames.wants_refill():
                    frames.refill_now()
            if first:
                held.append(first)

    grow()
    assert len(held) == 6 * chunk
    for first in held:
        frames.free(first)
    held.clear()
    assert frames.trim_now() > 2 * chunk
    grow()
    assert len(held) == 6 * chunk


def test_refill_that_failed_is_asked_for_again(make: MakeFrames) -> None:
    frames = make(600, reserve=200, refill=False)
    calls: list[int] = []
    frames.when_low = lambda: calls.append(1)
    frames.alloc(1)
    job = frames.begin_refill(100)
    with pytest.raises(ArenaError):
        job.work(FailingArena(frames.arena, "E"))
    frames.commit(job)
    frames.alloc(1)
    assert len(calls) == 2


def test_no_refill_is_wanted_where_there_are_no_holes(make: MakeFrames) -> None:
    frames = make(100, reserve=100)
    for _ in range(90):
        frames.alloc(1)
    assert not frames.wants_refill(), "who refills would go round in circles"


def test_new_frames_count_nothing(make: MakeFrames) -> None:
    seen = make(100, reserve=0, refill=False).statistics()
    assert (seen.used_frames, seen.used_frames_max, seen.free_frames, seen.reserve_frames) == (
        0,
        0,
        0,
        0,
    )
    assert (seen.failed_get_free_pages, seen.refilled_frames, seen.trimmed_frames) == (0, 0, 0)
    assert (seen.total_frames, seen.limit_frames, seen.reserve_target_frames) == (100, 100, 0)


def test_job_populates_the_table_of_all_frames_around(make: MakeFrames) -> None:
    # Off the page path, because a free looks at the neighbours of what it frees.
    frames = make(4 * 512, reserve=100, refill=False)
    job = frames.begin_refill(100)
    job.work(frames.arena)
    backed = frames.arena.backed_bytes()
    for first, _ in job.runs:
        begin = first - first % frames.chunk_frames
        for frame in range(begin, begin + frames.chunk_frames):
            frames.table.words[frame * 4] += 0
    assert frames.arena.backed_bytes() == backed
    frames.commit(job)


def test_used_runs_are_listed_wherever_the_holes_are(make: MakeFrames) -> None:
    frames = make(1300, reserve=1300)
    held = [frames.alloc(number % 5 + 1) for number in range(60)]
    for first in held[:20] + held[30:40]:
        frames.free(first)
    frames.reserve_target = 0
    frames.trim_now()
    assert list(frames.used_runs(PERSISTENT)) == sorted(held[20:30] + held[40:])


def test_check_finds_a_damaged_table(make: MakeFrames) -> None:
    frames = make(64, reserve=64)
    first = frames.alloc(4)
    frames.alloc(3)
    frames.free(first)
    words = frames.table.words
    # Each end's state and length, both links.
    for word in (*range(first * 4, first * 4 + 4), (first + 3) * 4, (first + 3) * 4 + 1):
        good = words[word]
        words[word] = good ^ 1
        with pytest.raises(InvariantError):
            frames.check()
        words[word] = good
    frames.check()


@pytest.mark.parametrize(
    "damage",
    [
        lambda frames: setattr(frames, "used_frames", frames.used_frames + 1),
        lambda frames: setattr(frames, "_hole_frames", frames._hole_frames + 1),
        lambda frames: frames._holes.__setitem__(0, frames._holes[0] + 1),
        lambda frames: frames._holes.__setitem__(0, frames._holes[0] - 1),
        lambda frames: setattr(frames.table, "free_frames", frames.table.free_frames - 1),
        lambda frames: setattr(frames.table, "long_frames", frames.table.long_frames + 1),
        lambda frames: setattr(frames.table, "_mask", frames.table._mask ^ 2),
        lambda frames: setattr(frames.table, "_mask", 0),
    ],
    ids=["used", "holes", "chunk holes +", "chunk holes -", "free", "long", "mask", "no mask"],
)
def test_check_finds_wrong_books(damage: Callable[[PageFrames], None]) -> None:
    frames = PageFrames(Arena(300, 4096, kind="memfd"), reserve_frames=100)
    frames.refill_now()
    frames.alloc(5)
    frames.check()
    damage(frames)
    with pytest.raises(InvariantError):
        frames.check()
    frames.arena.close()


def test_check_finds_free_runs_that_should_be_one() -> None:
    frames = PageFrames(Arena(64, 4096, kind="memfd"), reserve_frames=64)
    frames.refill_now()
    first, second = frames.alloc(2), frames.alloc(2)
    assert second == first + 2
    frames.alloc(1)
    frames.free(first)
    # As a put that forgot its neighbour would leave it.
    frames.used_frames -= 2
    frames.table._link(second, 2)
    with pytest.raises(InvariantError, match="should be one"):
        frames.check()
    frames.arena.close()


def test_check_finds_a_list_that_names_what_is_no_run(make: MakeFrames) -> None:
    frames = make(64, reserve=64)
    first = frames.alloc(8)
    frames.alloc(1)
    frames.free(first)
    # The run's own middle, dressed up as a run of three.
    table = frames.table
    table._link(first + 2, 3)
    with pytest.raises(InvariantError):
        frames.check()
    table.remove(first + 2, 3)


# The two halves.


def _seal(frames: PageFrames, first: int) -> None:
    """Seal a run as its owner does, as one of no class."""
    word = first * 4
    state, length = (
        frames.table.words[word] & HALF_MASK | USED | SEALED,
        frames.table.words[word + 1],
    )
    frames.table.pairs[first * 2] = seal_words(state, length & LENGTH_MASK)


def test_ephemeral_frames_are_counted_apart(make: MakeFrames) -> None:
    frames = make(64, reserve=64)
    swap, cache = frames.alloc(3), frames.alloc(5, EPHEMERAL)
    frames.check()
    assert (frames.used_frames, frames.ephemeral_frames) == (8, 5)
    assert list(frames.used_runs(PERSISTENT)) == [swap]
    assert list(frames.used_runs(EPHEMERAL)) == [cache]
    frames.free(swap)
    assert (frames.used_frames, frames.ephemeral_frames) == (5, 5)
    frames.free(cache)
    assert (frames.used_frames, frames.ephemeral_frames) == (0, 0)


def test_ephemeral_runs_are_free_frames_to_a_successor(page_size: int) -> None:
    frames = PageFrames(Arena(64, page_size, kind="memfd"), reserve_frames=64)
    frames.refill_now()
    runs = [
        frames.alloc(count, EPHEMERAL if count % 2 else PERSISTENT) for count in (1, 2, 3, 4, 5)
    ]
    for first in runs:
        _seal(frames, first)
    successor = PageFrames(frames.arena, reserve_frames=64)
    assert successor.adopt() == 0
    successor.check()
    assert (successor.used_frames, successor.ephemeral_frames) == (6, 0)
    assert list(successor.used_runs(PERSISTENT)) == [runs[1], runs[3]]
    assert successor.table.free_frames == 64 - 6
    frames.arena.close()


@pytest.mark.parametrize("bit", [1 << 14, 1 << 15])
def test_seal_of_no_half_is_damage(page_size: int, bit: int) -> None:
    # One bit that changes by itself must not make pages vanish that have to be kept.
    frames = PageFrames(Arena(64, page_size, kind="memfd"), reserve_frames=64)
    frames.refill_now()
    frames.table.pairs[frames.alloc(2) * 2] = seal_words(USED | SEALED | bit, 2)
    successor = PageFrames(frames.arena, reserve_frames=64)
    assert successor.adopt() == 1
    assert successor.arena.distrusted
    successor.check()
    frames.arena.close()


def test_ephemeral_neighbours_of_a_free_run_are_found_on_both_sides(make: MakeFrames) -> None:
    frames = make(28, reserve=28)  # one chunk
    table = frames.table
    left, middle, right, other = (
        frames.alloc(n, half) for n, half in ((3, EPHEMERAL), (2, 0), (5, EPHEMERAL), (1, 0))
    )
    assert [left + 3, left + 5, left + 10] == [middle, right, other]
    for first in (left, right):
        assert table.ephemeral_beside(middle, right) == 0, "not sealed, so nobody has it yet"
        _seal(frames, first)
        assert table.ephemeral_beside(middle, right) == first
        table.words[first * 4] = TAKEN | EPHEMERAL
    _seal(frames, left)
    _seal(frames, right)
    frames.free(middle)
    assert table.free_around(right) == (middle, other)
    assert table.free_around(left) == (left, right)
    frames.free(right)
    assert table.ephemeral_beside(middle, other) == left
    assert table.free_around(other) == (middle, frames.end_frame)
    frames.free(left)
    assert table.ephemeral_beside(left, other) == 0


def test_companions_are_populated_before_frames_are_handed_out(make: MakeFrames) -> None:
    frames = make(3000, reserve=700)
    seen: list[int] = []
    frames.accompany(lambda first, count: seen.extend(range(first, first + count)))

    def backed() -> set[int]:
        size = frames.page_size
        runs = frames.arena.data_runs(frames.first_frame * size, frames.end_frame * size)
        return {frame for begin, end in runs for frame in range(begin // size, end // size)}

    assert backed() <= set(seen)
    frames.reserve_target = 2000
    frames.refill_now()
    assert len(backed()) >= 2000
    assert backed() <= set(seen)
    successor = PageFrames(frames.arena, reserve_frames=64)
    mine: list[int] = []
    successor.accompany(lambda first, count: mine.extend(range(first, first + count)))
    successor.adopt()
    assert backed() <= set(mine)


def test_frames_of_a_refill_are_usable_as_they_come_along(make: MakeFrames) -> None:
    frames = make(2000, reserve=1200, refill=False)
    job = frames.begin_refill(1200)
    assert len(job.runs) > 1
    frames.take_finished()
    assert frames.statistics().free_frames == 0, "nothing is done yet"
    first, count = job.runs[0]
    frames.arena.populate_table(first, frames.chunk_frames)
    frames.arena.populate(first * frames.page_size, count * frames.page_size)
    job.done = 1
    frames.take_finished()
    assert frames.statistics().free_frames == count
    taken = frames.alloc(1)
    assert taken == first
    frames.take_finished()  # once is enough
    frames.check()
    frames.commit(job)  # the rest failed
    frames.check()
    assert frames.statistics().free_frames == count - 1
    assert frames.statistics().refilled_frames == count
    frames.free(taken)
    frames.refill_now()
    frames.check()
    assert frames.statistics().free_frames == 1200


def test_only_a_job_without_hurry_is_an_idle_task_and_not_for_longer_than_a_while(
    make: MakeFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = make(3000, reserve=3000, refill=False)
    job = frames.begin_refill(3000)
    seen: list[bool] = []
    now = [0.0]
    populate = Arena.populate

    def look(
        self: Arena, offset: int, length: int, *, floor: int = 0, is_idle: bool = False
    ) -> int:
        if floor:
            seen.append(is_idle)
            now[0] += 0.04  # each run by itself is short
            if len(seen) == hurried_at:
                frames.hurry()
        return populate(self, offset, length)

    monkeypatch.setattr(Arena, "populate", look)
    monkeypatch.setattr("zswapd.core.allocators.jobs.time.monotonic", lambda: now[0])
    hurried_at = 0
    job.work(frames.arena, 1)
    assert len(job.runs) >= 4
    assert seen == [True, True] + [False] * (len(job.runs) - 2), "50 ms for the whole job"
    frames.commit(job)

    frames = make(3000, reserve=3000, refill=False)
    job = frames.begin_refill(3000)
    seen.clear()
    hurried_at = 1
    job.work(frames.arena, 1)
    assert seen == [True] + [False] * (len(job.runs) - 1), "hurry counts for the whole job"
    frames.commit(job)


def test_a_store_that_waits_wakes_the_refill(make: MakeFrames) -> None:
    frames = make(100, reserve=50)
    calls: list[bool] = []
    frames.when_low = lambda: calls.append(frames.is_awaited)
    frames.await_refill()
    assert calls == [True]
