# SPDX-License-Identifier: GPL-2.0-or-later
"""pageframes: the owner of all page memory, with a populated reserve.

The reserve is there so that no store asks the kernel for memory. A frame is *used* (an allocator
holds it), *free* (populated and ready: the reserve) or a *hole* (address space without memory). The
page path moves frames between used and free by table writes alone.

Jobs ask the kernel for memory and give it back. A job has three steps, so that the part that blocks
can run in another thread and no step takes a lock:

    job = frames.begin_refill(n)     main thread: removes the frames from all counts and lists
    job.work(arena)                  any thread: populates or punches; uses nothing of this object
    frames.take_finished()           main thread: enters what a refill has populated so far
    frames.commit(job)               main thread: enters the result

A successor begins with `adopt`. The kernel says which frames are populated. The seals in the frame
table say which of these are used (frametable.py says why they can be trusted). Frames of a job are
what the job made of them. Frames of the ephemeral half are free.

Invariants (`check` verifies them):

- used + free + busy + holes = all frames;
- free runs are maximal within their chunk, and each is on the list of its length;
- the counts agree with the frame table.

Limits: one refill at a time. Runs have at most 16 frames. The layers above enforce `limit_frames`;
a store that replaces a page may exceed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.allocators.frametable import (
    BUSY,
    EPHEMERAL,
    FREE,
    HOLE,
    MAX_RUN,
    PERSISTENT,
    STATE_MASK,
    TAKEN,
    USED,
    FrameTable,
    is_persistent,
)
from zswapd.core.allocators.jobs import Job
from zswapd.core.crashpoints import reach
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.core.allocators.arena import Arena

_ZEROS_BYTES: Final = 1 << 20
"""The most bytes of the table of holes that are cleared at a time."""
_TRIM_RUNS: Final = 1024
"""The most runs of one trim: their table entries take 1 ms, in which no page is served."""
CHUNK_BYTES: Final = 2 << 20
"""Bytes of a chunk. One page of page tables maps it, so populating it costs one more page."""


@dataclass(frozen=True, slots=True)
class PageFramesStatistics:
    """Counts of frames by state, and totals since the start.

    Attributes:
        page_size: bytes of a frame.
        total_frames: frames that exist, most of them holes.
        used_frames: frames that allocators hold.
        ephemeral_frames: those of them that belong to the ephemeral half.
        used_frames_max: the largest value of used_frames.
        free_frames: populated frames that are ready.
        reserve_frames: those of them in runs long enough for any allocation. Refills keep this
            number up.
        reserve_target_frames: the number that refills aim at.
        limit_frames: frames that may be used at once.
        failed_get_free_pages: requests refused because no populated run was long enough (zcache's
            name).
        refilled_frames: frames populated since the start.
        trimmed_frames: frames given back to the system since the start.
    """

    page_size: int
    total_frames: int
    used_frames: int
    ephemeral_frames: int
    used_frames_max: int
    free_frames: int
    reserve_frames: int
    reserve_target_frames: int
    limit_frames: int
    failed_get_free_pages: int
    refilled_frames: int
    trimmed_frames: int


counters.declare(
    PageFramesStatistics,
    cumulative="failed_get_free_pages refilled_frames trimmed_frames",
    high_water="used_frames_max",
)


class PageFrames:
    """The frames of one arena.

    Args:
        arena: the shared memory.
        reserve_frames: populated frames to keep ready.
        limit_frames: frames that allocators may hold at once; all frames by default.

    Attributes:
        table: the frame table, which also has the allocators' words of a used run.
        used_frames: frames that allocators hold; for the limits of the layers above.
        ephemeral_frames: those of them that belong to the ephemeral half; for the same limits.
        limit_frames: the limit of used frames. It can be set at any time, also below the current
            use.
        reserve_target: frames that refills keep ready. It can be set at any time. urgent_mark is a
            quarter of it.
        when_low: called on the page path when the reserve falls below three quarters of its target,
            and again below urgent_mark. It may only set a flag or wake a task. Each call comes once
            until a refill or `rearm`.
        is_awaited: a store waits for the next refill. The refill clears it when it begins.
        alive: called repeatedly in the long steps of a takeover, so that the watchdog sees
            progress.
        renewed: frames in which a takeover has found poisoned memory, also one that was cut short.
            The lost bytes are zeros. The owners of the frames must drop the pages there.
        renewed_pages: pages of the system that this takeover has found poisoned, with those of the
            frame table.
    """

    def __init__(
        self, arena: Arena, *, reserve_frames: int, limit_frames: int | None = None
    ) -> None:
        self.arena = arena
        self.page_size = arena.page_size
        self.chunk_frames = max(MAX_RUN, CHUNK_BYTES // arena.page_size)
        self.first_frame, self.end_frame = arena.first_frame, arena.total_frames
        self.table = FrameTable(
            arena.table, arena.table_pairs, chunk_frames=self.chunk_frames, end_frame=self.end_frame
        )
        self.limit_frames = (
            limit_frames if limit_frames is not None else self.end_frame - self.first_frame
        )
        self._call_mark = 0
        self.reserve_target = reserve_frames
        self.when_low: Callable[[], None] = lambda: None
        self.alive: Callable[[], None] = lambda: None
        self.is_awaited = False
        self.used_frames = self.ephemeral_frames = self.used_frames_max = 0
        self.renewed: set[int] = set()
        self.renewed_pages = 0
        self._companions: list[Callable[[int, int], None]] = []
        self._refill: Job | None = None
        self._busy_frames = self._failed = self._refilled = self._trimmed = 0
        self._holes = [
            end - begin
            for begin, end in (
                self._bounds(c) for c in range(-(-self.end_frame // self.chunk_frames))
            )
        ]
        self._hole_frames = sum(self._holes)

    def _bounds(self, chunk: int) -> tuple[int, int]:
        """Return the first frame of a chunk that can be handed out, and the chunk's end."""
        begin = chunk * self.chunk_frames
        end = min(begin + self.chunk_frames, self.end_frame)
        # The frame table may fill the first chunks.
        return min(max(begin, self.first_frame), end), end

    # The page path.

    def alloc(self, count: int, half: int = PERSISTENT) -> int:
        """Take `count` (1 to 16) adjacent populated frames for one of the two halves.

        Never asks the kernel for memory.

        Returns:
            The number of the first frame, or 0 if no populated run is long enough (counted).
        """
        table = self.table
        first = table.take(count)
        if table.long_frames < self._call_mark:
            self._call_mark = self.urgent_mark if self._call_mark == self._low_mark else 0
            self.when_low()
        if not first:
            self._failed += 1
            return 0
        self.used_frames += count
        if self.used_frames > self.used_frames_max:
            self.used_frames_max = self.used_frames
        if half:
            table.words[first * 4] = TAKEN | half
            self.ephemeral_frames += count
        return first

    def free(self, first: int) -> None:
        """Return the used run that begins at frame `first` to the reserve.

        Raises:
            InvariantError: no used run begins there.
        """
        words = self.table.words
        state = words[first * 4]
        if state & STATE_MASK not in (USED, TAKEN):
            raise InvariantError(f"frame {first} is freed but does not begin a used run")
        count = words[first * 4 + 1] & 255
        self.used_frames -= count
        if state & EPHEMERAL:
            self.ephemeral_frames -= count
        self.table.put(first, count)

    # Off the page path: refill and trim.

    @property
    def reserve_target(self) -> int:
        """The number of frames that refills keep ready."""
        return self._reserve_target

    @reserve_target.setter
    def reserve_target(self, frames: int) -> None:
        self._reserve_target = frames
        self._low_mark: int = frames - frames // 4
        self.urgent_mark: int = frames // 4
        self._call_mark = self._low_mark

    def wants_refill(self) -> bool:
        """Return whether the reserve is below three quarters of its target and holes are left."""
        return (
            self.table.long_frames < self._low_mark
            and self._hole_frames > 0
            and self._refill is None
        )

    def can_grow(self) -> bool:
        """Return whether a refill is under way, or could begin."""
        return self._refill is not None or self._hole_frames > 0

    @property
    def refilled_frames(self) -> int:
        """Frames populated since the start."""
        return self._refilled

    def await_refill(self) -> None:
        """Note that a store waits: wake the refill, or have it give no more way to other tasks."""
        self.is_awaited = True
        self.when_low()

    def hurry(self) -> None:
        """Have the refill under way give no more way to other tasks."""
        if self._refill is not None:
            self._refill.is_hurried = True

    def rearm(self) -> None:
        """Have `when_low` called again at the next fall below the mark.

        For a caller that was woken and found the reserve full again with freed frames.
        """
        if self.table.long_frames >= self._low_mark:
            self._call_mark = self._low_mark

    def wants_trim(self) -> bool:
        """Return whether the free frames exceed the target by half of it and two chunks."""
        return (
            self.table.free_frames
            > self.reserve_target + self.reserve_target // 2 + 2 * self.chunk_frames
        )

    def begin_refill(self, max_frames: int) -> Job:
        """Take up to `max_frames` holes for a job that populates them, lowest first.

        The lowest ones keep the file dense. The job is empty if the reserve is full, if no holes
        are left, or while another refill is under way.
        """
        job = Job(True, self.page_size, self.chunk_frames, companions=self._companions)  # noqa: FBT003 - its own first field
        if self._refill is not None:
            return job
        wanted = min(max_frames, self.reserve_target - self.table.long_frames)
        chunk = 0
        while wanted > 0 and chunk < len(self._holes):
            for first, count in self._hole_runs(chunk) if self._holes[chunk] else ():
                take = min(count, wanted)
                if take > 0:
                    job.runs.append((first, take))
                    wanted -= take
            chunk += 1
        for first, count in job.runs:
            self._add_holes(first, -count)
            self._busy_frames += count
        if job.runs:
            self._refill = job
        return job

    def _add_holes(self, first: int, count: int) -> None:
        self._holes[first // self.chunk_frames] += count
        self._hole_frames += count

    def _hole_runs(self, chunk: int) -> list[tuple[int, int]]:
        """Return (first, length) of each run of holes in a chunk.

        The table of a chunk that is all holes is not read: it may have no memory.
        """
        begin, end = self._bounds(chunk)
        if self._holes[chunk] == end - begin:
            return [(begin, end - begin)]
        runs: list[tuple[int, int]] = []
        frame = begin
        while frame < end:
            length, state = self.table.run_at(frame, end)
            if state == HOLE:
                runs.append((frame, length))
            frame += length
        return runs

    def begin_trim(
        self, max_frames: int, *, all_of_it: bool = False, long_only: bool = False
    ) -> Job:
        """Take free frames above the target for a job that punches them.

        Args:
            max_frames: frames to take at most.
            all_of_it: take all above the target; otherwise a quarter of the target stays on top of
                it.
            long_only: take only runs of at least MAX_RUN frames.
        """
        job = Job(False, self.page_size, self.chunk_frames)  # noqa: FBT003 - its own first field
        surplus = (
            self.table.free_frames
            - self.reserve_target
            - (0 if all_of_it else self.reserve_target // 4)
        )
        job.runs = self.table.remove_longest(
            min(max_frames, surplus), _TRIM_RUNS, MAX_RUN if long_only else 1
        )
        self._busy_frames += sum(count for _, count in job.runs)
        return job

    def commit(self, job: Job) -> None:
        """Enter the result of a job.

        Populated frames become free, punched frames become holes, and the rest is as before.
        """
        self._enter(job, len(job.runs))
        if job.runs:
            # After a trim too: it made holes, and an earlier refill may have found none.
            self._call_mark = self._low_mark
            if job.populate:
                self._refill = None
        job.runs = []

    def take_finished(self) -> None:
        """Enter the frames that the refill under way has populated so far."""
        if self._refill is not None:
            # The thread changes runs at or after `done` only, so this part stays as it is.
            self._enter(self._refill, self._refill.done)

    def _enter(self, job: Job, end: int) -> None:
        """Enter the results of a job's runs up to run `end`, which is exclusive."""
        while job.committed < end:
            number = job.committed
            first, count = job.runs[number]
            job.committed = number + 1
            finished = number < job.done
            self._busy_frames -= count
            if job.populate == finished:
                self.table.put(first, count)
            else:
                if not job.populate:
                    self.table.erase(first, count)
                self._add_holes(first, count)
            if finished and job.populate:
                self._refilled += count
            elif finished:
                self._trimmed += count
            reach(crashpoints.JOB_COMMITTED)

    def refill_now(self) -> None:
        """Fill the reserve to its target. It blocks: only for the start and for tests.

        Raises:
            ArenaError: the system has no memory. What was populated until then stays.
        """
        while (job := self.begin_refill(4 * self.chunk_frames)).runs:
            self._run(job)

    def accompany(self, populate: Callable[[int, int], None]) -> None:
        """Have memory beside the frame table populated wherever frames are populated.

        The memory is populated before the frames are handed out.

        Args:
            populate: called with (first frame, frames) of a chunk, also in a job's thread. It is
                called now for the chunks that are populated already.

        Raises:
            ArenaError: no memory for it.
        """
        self._companions.append(populate)
        for chunk, holes in enumerate(self._holes):
            if holes < self.chunk_frames and holes < self._chunk_size(chunk):
                populate(chunk * self.chunk_frames, self.chunk_frames)

    def trim_now(self) -> int:
        """Punch all frames above the target plus a quarter; return their number. It blocks."""
        before = self._trimmed
        while (job := self.begin_trim(4 * self.chunk_frames)).runs:
            self._run(job)
        return self._trimmed - before

    def _run(self, job: Job) -> None:
        try:
            job.work(self.arena)
        finally:
            self.commit(job)

    # A successor's beginning.

    def adopt(self) -> int:
        """Rebuild all state from an arena that another process has left.

        The first call after the constructor, once. It touches only populated memory, and takes no
        memory except page tables. It punches frames that the dead process had populated but not yet
        entered. The used runs are those with a seal.

        Returns:
            The number of frames with damaged words, which no death causes. Their contents are lost.

        Raises:
            ArenaError: populated frames have no table, and there is no memory for it.
        """
        arena, size = self.arena, self.page_size
        arena.begin_rewriting()
        self.renewed = set(arena.renewed_frames())
        self._renew_table()
        wrong, hole = 0, self.first_frame
        for begin, end in arena.data_runs(self.first_frame * size, self.end_frame * size):
            # Frames may be larger than the system's pages. A frame that is populated in part is a
            # hole.
            first, last = -(-begin // size), end // size
            if first * size > begin:
                arena.punch(begin, min(first * size, end) - begin)
            if last * size < end and first <= last:
                arena.punch(last * size, end - last * size)
            if first >= last:
                continue
            wrong += self._forget(hole, first)
            hole = last
            while first < last:
                stop = min(last, first - first % self.chunk_frames + self.chunk_frames)
                self._renew(arena.map_in(first * size, (stop - first) * size))
                wrong += self._adopt_run(first, stop)
                self.alive()
                first = stop
        wrong += self._forget(hole, self.end_frame)
        self.used_frames_max = self.used_frames
        self._give_back_untouched()
        return wrong

    def _renew_table(self) -> None:
        """Replace poisoned pages of the frame table.

        The frames that these pages described begin no run then.
        """
        arena = self.arena
        for begin, end in arena.data_runs(self.page_size, self.first_frame * self.page_size):
            for start in range(begin, end, CHUNK_BYTES):
                poisoned = arena.map_in(start, min(CHUNK_BYTES, end - start))
                if poisoned:
                    self._renew(poisoned)
                self.alive()

    def _renew(self, poisoned: list[int]) -> None:
        """Replace poisoned pages, and note their frames.

        A poisoned page cannot be read, so its contents are lost and nothing says which pages they
        were. So the arena is marked as distrusted first. Runs keep their frames, so that all pages
        beside the lost memory stay.
        """
        for offset in poisoned:
            self.distrust()
            self.arena.note_renewed(offset // self.page_size)
            self.arena.renew(offset)
            self.renewed_pages += 1
            self.renewed.add(offset // self.page_size)

    def _adopt_run(self, first: int, end: int) -> int:
        """Enter the populated frames of one chunk; return the number of wrong seals."""
        chunk = first - first % self.chunk_frames
        if self._holes[chunk // self.chunk_frames] == self._chunk_size(chunk // self.chunk_frames):
            for populate in (self.arena.populate_table, *self._companions):
                populate(chunk, self.chunk_frames)
        used, wrong = self.table.adopt_run(first, end, self.distrust, is_older=self.arena.is_older)
        self.used_frames += used
        self._add_holes(first, first - end)
        return wrong

    def distrust(self) -> None:
        """Mark the arena as distrusted: memory in it has changed by itself.

        This comes before the evidence is overwritten.
        """
        self.arena.distrusted = True

    def _chunk_size(self, chunk: int) -> int:
        begin, end = self._bounds(chunk)
        return end - begin

    def _forget(self, first: int, end: int) -> int:
        """Make frames holes in the table, where the table is backed.

        A trim that was cut short has left other words.

        Returns:
            The number of seals of persistent runs among them. A run is unsealed before its memory
            is punched, so a death leaves none. A seal means that the kernel has removed the memory
            from the file, as Linux before 5.16 does with poisoned pages.
        """
        arena, wrong = self.arena, 0
        for begin, stop in arena.data_runs(arena.table_offset(first), arena.table_offset(end)):
            for start in range(begin, stop, _ZEROS_BYTES):
                length = min(_ZEROS_BYTES, stop - start)
                with arena.view[start : start + length].cast("I") as words:
                    seals = [word for word in words[::4].tolist() if word and is_persistent(word)]
                if seals:
                    self.distrust()
                    wrong += len(seals)
                arena.view[start : start + length] = bytes(length)
                self.alive()
        return wrong

    def _give_back_untouched(self) -> None:
        """Punch the holes if the file has more memory than was found.

        A refill that died between its two steps took that memory.
        """
        arena, size = self.arena, self.page_size
        data = 0
        for begin, end in arena.data_runs(0, self.end_frame * size):
            data += end - begin
            self.alive()
        if arena.backed_bytes() <= data:
            return
        hole = self.first_frame * size
        for begin, end in [
            *arena.data_runs(hole, self.end_frame * size),
            (self.end_frame * size, 0),
        ]:
            if hole < begin:
                arena.punch(hole, begin - hole)
            hole = end
            self.alive()

    def used_runs(self, half: int) -> Iterator[int]:
        """Yield the first frame of every used run of a half, by ascending number.

        Walks the table: never on the page path.
        """
        for chunk, holes_left in enumerate(self._holes):
            self.alive()
            if holes_left == self.chunk_frames:  # the common case in an arena that is not full
                continue
            (frame, end), holes = self._bounds(chunk), holes_left
            while frame < end and holes < end - frame:
                length, state = self.table.run_at(frame, end)
                if state == USED and self.table.words[frame * 4] & EPHEMERAL == half:
                    yield frame
                elif state == HOLE:
                    holes -= length  # the remaining holes decide whether a used run can follow
                frame += length

    def statistics(self) -> PageFramesStatistics:
        """Return a frozen snapshot."""
        return PageFramesStatistics(
            page_size=self.page_size,
            total_frames=self.end_frame - self.first_frame,
            used_frames=self.used_frames,
            ephemeral_frames=self.ephemeral_frames,
            used_frames_max=self.used_frames_max,
            free_frames=self.table.free_frames,
            reserve_frames=self.table.long_frames,
            reserve_target_frames=self.reserve_target,
            limit_frames=self.limit_frames,
            failed_get_free_pages=self._failed,
            refilled_frames=self._refilled,
            trimmed_frames=self._trimmed,
        )

    def check(self) -> None:
        """Walk the whole table and verify the invariants in this file's header.

        Takes seconds for a large arena: never on the page path.

        Raises:
            InvariantError: the message names the frame or count.
        """
        counts = dict.fromkeys((HOLE, FREE, USED, BUSY), 0)
        listed = self.table.check_lists()
        for chunk, holes in enumerate(self._holes):
            frame, end = self._bounds(chunk)
            if holes == end - frame:
                counts[HOLE] += holes
                continue
            holes_seen = 0
            while frame < end:
                length, state = self.table.run_at(frame, end)
                if state == FREE:
                    self.table.check_free_run(frame, length)
                    listed.discard(frame)
                holes_seen += length if state == HOLE else 0
                counts[state] += length
                frame += length
            # The holes of a refill under way look like holes in the table until it is committed.
            if frame > end or not 0 <= holes_seen - holes <= self._busy_frames:
                raise InvariantError(
                    f"chunk {chunk}: {holes_seen} holes in the table, {holes} counted, ends at"
                    f" {frame}"
                )
        if listed:
            raise InvariantError(
                f"free lists name runs that the table does not have: {sorted(listed)[:5]}"
            )
        ephemeral = sum(
            self.table.run_at(first, self.end_frame)[0] for first in self.used_runs(EPHEMERAL)
        )
        found = (counts[USED], ephemeral, counts[FREE])
        books = (self.used_frames, self.ephemeral_frames, self.table.free_frames)
        if found != books:
            raise InvariantError(
                f"used, ephemeral and free frames: {found} in the table, {books} counted"
            )
        accounted = (
            self.used_frames + self.table.free_frames + self._busy_frames + self._hole_frames
        )
        if accounted != self.end_frame - self.first_frame:
            raise InvariantError(
                f"{accounted} frames in all states, but {self.end_frame - self.first_frame} exist"
            )
        if self._hole_frames != sum(self._holes):
            raise InvariantError(
                f"{self._hole_frames} holes counted in total, {sum(self._holes)} by chunk"
            )
