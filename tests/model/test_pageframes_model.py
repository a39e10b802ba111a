# SPDX-License-Identifier: GPL-2.0-or-later
"""pageframes against a plain dict, with refill and trim under way in the middle of everything."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.fakes import FailingArena
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.frametable import MAX_RUN
from zswapd.core.allocators.jobs import Job
from zswapd.core.allocators.pageframes import PageFrames
from zswapd.errors import ArenaError


class PageFramesMachine(RuleBasedStateMachine):
    """Every used run keeps a mark in its first and last byte.

    A run handed out twice, or punched, shows.
    """

    frames: PageFrames

    @initialize(
        page_size=st.sampled_from((4096, 16384, 65536)),
        chunks=st.integers(1, 3),
        odd=st.integers(-9, 9),
    )
    def build(self, page_size: int, chunks: int, odd: int) -> None:
        total = chunks * (2 << 20) // page_size + odd
        self.frames = PageFrames(Arena(total, page_size, kind="memfd"), reserve_frames=total // 2)
        self.frames.refill_now()
        self.total = total
        self.used: dict[int, tuple[int, int]] = {}
        self.jobs: list[Job] = []
        self.mark = 0
        self.refused = 0

    def teardown(self) -> None:
        if hasattr(self, "frames"):
            self.frames.arena.close()

    def _ends(self, first: int, length: int) -> tuple[int, int]:
        return first * self.frames.page_size, (first + length) * self.frames.page_size - 1

    @rule(length=st.integers(1, MAX_RUN), times=st.integers(1, 12))
    def alloc(self, length: int, times: int) -> None:
        for _ in range(times):
            first = self.frames.alloc(length)
            if not first:
                self.refused += 1
                return
            self.mark = self.mark % 250 + 1
            taken = set(range(first, first + length))
            for other, (count, _) in self.used.items():
                assert not taken & set(range(other, other + count)), "handed out twice"
            assert first >= self.frames.first_frame
            assert first + length <= self.frames.end_frame
            self.used[first] = (length, self.mark)
            for end in self._ends(first, length):
                self.frames.arena.view[end] = self.mark

    @precondition(lambda self: self.used)
    @rule(data=st.data(), share=st.sampled_from((1, 3, 1000)))
    def free(self, data: st.DataObject, share: int) -> None:
        for first in data.draw(st.permutations(sorted(self.used)))[:share]:
            length, mark = self.used.pop(first)
            assert {
                self.frames.table.first_of(frame) for frame in range(first, first + length)
            } == {first}
            for end in self._ends(first, length):
                assert self.frames.arena.view[end] == mark
            self.frames.free(first)

    @rule(reserve=st.integers(0, 1200))
    def set_target(self, reserve: int) -> None:
        self.frames.reserve_target = reserve

    @rule(limit=st.integers(1, 700))
    def begin_refill(self, limit: int) -> None:
        self._begin(self.frames.begin_refill(limit), limit)

    @rule(limit=st.integers(1, 700))
    def begin_trim(self, limit: int) -> None:
        self._begin(self.frames.begin_trim(limit), limit)

    def _begin(self, job: Job, limit: int) -> None:
        assert sum(count for _, count in job.runs) <= limit
        self.jobs.append(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), script=st.sampled_from(("", "", "E", "RE", "RRRE")))
    def end_job(self, data: st.DataObject, script: str) -> None:
        job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        try:
            job.work(FailingArena(self.frames.arena, script))
        except ArenaError:
            assert "E" in script
        self.frames.commit(job)

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "frames"):
            return
        self.frames.check()
        seen = self.frames.statistics()
        assert seen.used_frames == sum(length for length, _ in self.used.values())
        assert seen.failed_get_free_pages == self.refused
        assert seen.total_frames == self.total
        assert seen.free_frames + seen.used_frames <= self.total
        for first, (length, mark) in self.used.items():
            for end in self._ends(first, length):
                assert self.frames.arena.view[end] == mark, "a used run was written to or punched"


TestPageFrames = PageFramesMachine.TestCase


def test_all_frames_come_back_when_all_is_freed() -> None:
    """The end that a random run seldom reaches: full, then empty, then all given back."""
    frames = PageFrames(Arena(3000, 4096, kind="memfd"), reserve_frames=3000)
    frames.refill_now()
    held = []
    length = 0
    while first := frames.alloc(length % MAX_RUN + 1) or frames.alloc(1):
        held.append(first)
        length += 7
    assert frames.statistics().used_frames == 3000
    for first in held[::2] + held[1::2]:
        frames.free(first)
    frames.check()
    frames.reserve_target = 0
    assert frames.trim_now() == 3000
    frames.arena.close()
