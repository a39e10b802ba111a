# SPDX-License-Identifier: GPL-2.0-or-later
"""The frame table: what every frame of the arena is, and the free runs among them.

Allocators want n frames side by side (a zspage is read and written without copies). Free runs carry boundary tags in the table
(Knuth's, 1973), so freeing coalesces in constant time; a list for every length gives best fit. Runs never cross a chunk: a
chunk is what one refill populates, and its part of the table is populated with it, so that the neighbour a free looks at is
always backed by memory.

The table has four 32-bit words a frame (its counterpart in the kernel is struct page):

    word 0   low 3 bits: state; bit 3: sealed; bits 14 and 15: the half that a used run belongs to; the rest is its owner's
    word 1   first frame of a run: its length, in the low 8 bits if used (the rest is the owner's);
             last frame of a free run: its length; other frames of a used run: the first frame
    word 2,3 first frame of a free run: next and previous free run of its list; of a used run: the owner's

An all-zero table, which is what a fresh file holds, says "holes", so nothing has to be initialised.

A successor that finds the table after a death between any two of these words believes one thing in it, the *seal*: a run is
used if and only if word 0 of its first frame says so with the bit SEALED. For that to hold at every instruction:

- `take` gives runs out unsealed. The owner prepares the run (words of life) and then writes word 0 whole, seal and all, once;
- the length stands in word 1 before the seal does, and its bits never change while it is there;
- `put` begins with the one write that takes the seal away; what it does to neighbours comes after. So no frame inside a free
  run, and none behind the first of a used one, has ever a seal left over.

The half is part of the seal: persistent runs outlive a process, ephemeral ones are free frames to its successor. Two bits that
are always equal, so that one that changes by itself is noticed and does not turn pages that must be kept into ones that need
not.

All other words are rebuilt by `adopt_run` from the seals and from what the kernel says is populated; it only ever writes
unsealed words, so that dying in the middle of it changes nothing.

Limits: a run has at most MAX_RUN frames when it is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zswapd import crashpoints
from zswapd.crashpoints import reach
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable

HOLE: Final = 0
FREE: Final = 1
FREE_TAIL: Final = 2
USED: Final = 3
USED_TAIL: Final = 4
BUSY: Final = 5
"""States in the low three bits of word 0. BUSY frames belong to a job under way."""

STATE_MASK: Final = 7
SEALED: Final = 8
"""In word 0 of the first frame of a used run whose owner has made it good for a successor to find."""
LENGTH_MASK: Final = 255
PERSISTENT: Final = 0
EPHEMERAL: Final = 3 << 14
"""The two halves, as bits of word 0: none of HALF_MASK, and all of it."""
HALF_MASK: Final = 3 << 14
MAX_RUN: Final = 16
"""Free runs of this length and more share one list; it is also the longest run that can be taken."""


class FrameTable:
    """Free and used runs of frames over a table of 32-bit words.

    Args:
        words: the table, four words a frame.
        chunk_frames: runs do not cross a multiple of this.
        end_frame: the first frame number that does not exist.

    Attributes:
        free_frames: frames in free runs.
        long_frames: those of them in runs of MAX_RUN frames and more, which serve any request.
    """

    def __init__(self, words: memoryview, *, chunk_frames: int, end_frame: int) -> None:
        self.words = words
        self.free_frames = 0
        self.long_frames = 0
        self._chunk_frames = chunk_frames
        self._end_frame = end_frame
        self._heads = [0] * (MAX_RUN + 1)
        self._mask = 0

    def take(self, count: int) -> int:
        """Turn `count` (1 to MAX_RUN) free frames side by side into a used run; return the first, or 0 when there is none."""
        candidates = self._mask >> count
        if not candidates:
            return 0
        bucket = (candidates & -candidates).bit_length() - 1 + count
        first = self._heads[bucket]
        words = self.words
        length = words[first * 4 + 1]
        self.remove(first, length)
        reach(crashpoints.FRAMES_OFF_LIST)
        if length > count:
            self._link(first + count, length - count)
            reach(crashpoints.FRAMES_SPLIT)
        word = first * 4
        words[word] = USED
        words[word + 1] = count
        reach(crashpoints.FRAMES_HEADED)
        for tail in range(word + 4, word + count * 4, 4):
            words[tail] = USED_TAIL
            words[tail + 1] = first
        return first

    def put(self, first: int, count: int) -> None:
        """Make frames free, joined with free neighbours in the same chunk."""
        words = self.words
        end = first + count
        # The end of the seal, in one write before all others (file header). Joined to the run before it, it keeps this tag.
        words[first * 4] = FREE_TAIL
        reach(crashpoints.FRAMES_UNSEALED)
        if first % self._chunk_frames:
            tag = words[(first - 1) * 4] & STATE_MASK
            if tag in (FREE_TAIL, FREE):
                length = words[(first - 1) * 4 + 1]
                first -= length
                self.remove(first, length)
        if end % self._chunk_frames and end < self._end_frame and words[end * 4] & STATE_MASK == FREE:
            length = words[end * 4 + 1]
            self.remove(end, length)
            end += length
        reach(crashpoints.FRAMES_JOINED)
        self._link(first, end - first)

    def free_around(self, first: int) -> tuple[int, int]:
        """Return (begin, end) of the free run that the used run at `first` is going to be in when it is put."""
        words = self.words
        begin, end = first, first + (words[first * 4 + 1] & LENGTH_MASK)
        if begin % self._chunk_frames and words[(begin - 1) * 4] & STATE_MASK in (FREE_TAIL, FREE):
            begin -= words[(begin - 1) * 4 + 1]
        if end % self._chunk_frames and end < self._end_frame and words[end * 4] & STATE_MASK == FREE:
            end += words[end * 4 + 1]
        return begin, end

    def ephemeral_beside(self, begin: int, end: int) -> int:
        """Return the first frame of an ephemeral run next to a free run, in the same chunk; 0 if there is none."""
        if end % self._chunk_frames and end < self._end_frame and self._is_ephemeral(end):
            return end
        if begin % self._chunk_frames:
            before = self.first_of(begin - 1)
            if self._is_ephemeral(before):
                return before
        return 0

    def _is_ephemeral(self, frame: int) -> bool:
        """Say whether a used and sealed run of the ephemeral half begins at a frame."""
        return self.words[frame * 4] & (STATE_MASK | SEALED | HALF_MASK) == USED | SEALED | EPHEMERAL

    def _link(self, first: int, length: int) -> None:
        """Tag a maximal free run and put it at the head of its list."""
        words = self.words
        bucket = length if length < MAX_RUN else MAX_RUN
        word = first * 4
        head = self._heads[bucket]
        words[word] = FREE
        words[word + 1] = length
        words[word + 2] = head
        words[word + 3] = 0
        if length > 1:
            tail = word + length * 4 - 4
            words[tail] = FREE_TAIL
            words[tail + 1] = length
        if head:
            words[head * 4 + 3] = first
        self._heads[bucket] = first
        self._mask |= 1 << bucket
        self.free_frames += length
        if bucket == MAX_RUN:
            self.long_frames += length

    def remove(self, first: int, length: int) -> None:
        """Take a free run off its list; its tags stay until the caller writes others."""
        words = self.words
        bucket = length if length < MAX_RUN else MAX_RUN
        following, previous = words[first * 4 + 2], words[first * 4 + 3]
        if previous:
            words[previous * 4 + 2] = following
        else:
            self._heads[bucket] = following
            if not following:
                self._mask &= ~(1 << bucket)
        if following:
            words[following * 4 + 3] = previous
        self.free_frames -= length
        if bucket == MAX_RUN:
            self.long_frames -= length

    def remove_longest(self, max_frames: int, max_runs: int, shortest: int = 1) -> list[tuple[int, int]]:
        """Take free runs, together at most `max_frames`, off the lists, long ones first, and mark them BUSY.

        Args:
            max_frames: see above.
            max_runs: likewise.
            shortest: frames that a run has at least, up to MAX_RUN.
        """
        taken: list[tuple[int, int]] = []
        for bucket in range(MAX_RUN, shortest - 1, -1):
            first = self._heads[bucket]
            while max_frames > 0 and first and len(taken) < max_runs:
                following, length = self.words[first * 4 + 2], self.words[first * 4 + 1]
                if length <= max_frames:
                    self.remove(first, length)
                    # Both ends, or a neighbour that is freed meanwhile would join the run.
                    self.words[first * 4] = self.words[(first + length - 1) * 4] = BUSY
                    taken.append((first, length))
                    reach(crashpoints.TRIM_TAKEN)
                    max_frames -= length
                first = following
        return taken

    def adopt_run(self, first: int, end: int, found_wrong: Callable[[], None]) -> tuple[int, int]:
        """Rebuild the words of a stretch of populated frames, within a chunk and with holes around it, from the seals in it.

        Args:
            first: first frame of the stretch.
            end: the frame behind it.
            found_wrong: called before a seal that is wrong is taken away.

        Returns:
            Frames in used runs, and the number of seals that were wrong: their runs would have no frame or reach beyond the
            stretch or belong to no half, which no death causes; such frames become free, as those of ephemeral runs do.
        """
        words = self.words
        used = wrong = 0
        frame = free_from = first
        while frame < end:
            word = frame * 4
            if words[word] & (STATE_MASK | SEALED) != USED | SEALED:
                frame += 1
                continue
            count = words[word + 1] & LENGTH_MASK
            half = words[word] & HALF_MASK
            if half == EPHEMERAL:
                words[word] = FREE_TAIL
                frame += 1
                continue
            if half != PERSISTENT or not 0 < count <= min(end - frame, MAX_RUN):
                wrong += 1
                found_wrong()
                words[word] = FREE_TAIL
                frame += 1
                continue
            if free_from < frame:
                self._link(free_from, frame - free_from)
            for tail in range(word + 4, word + count * 4, 4):
                words[tail] = USED_TAIL
                words[tail + 1] = frame
            reach(crashpoints.TAKEOVER_RUN)
            used += count
            frame += count
            free_from = frame
        if free_from < end:
            self._link(free_from, end - free_from)
        return used, wrong

    def erase(self, first: int, count: int) -> None:
        """Say that frames are holes."""
        for word in range(first * 4, (first + count) * 4, 4):
            self.words[word] = HOLE

    def first_of(self, frame: int) -> int:
        """Return the first frame of the used run that holds `frame`."""
        return self.words[frame * 4 + 1] if self.words[frame * 4] & STATE_MASK == USED_TAIL else frame

    def run_at(self, frame: int, end: int) -> tuple[int, int]:
        """Return (length, state) of the run that begins at `frame`; holes are joined, up to `end`.

        Raises:
            InvariantError: no run begins there.
        """
        words = self.words
        state = words[frame * 4] & STATE_MASK
        if state in (FREE, BUSY):
            return words[frame * 4 + 1], state
        if state == USED:
            return words[frame * 4 + 1] & LENGTH_MASK, state
        if state != HOLE:
            raise InvariantError(f"frame {frame} is inside a run, where one should begin")
        length = 1
        while frame + length < end and not words[(frame + length) * 4] & STATE_MASK:
            length += 1
        return length, state

    def check_free_run(self, frame: int, length: int) -> None:
        """Prove that the tags at both ends of a free run agree, and that its neighbour behind is not free as well.

        Raises:
            InvariantError: they do not.
        """
        tail = (frame + length - 1) * 4
        if length > 1 and (self.words[tail] & STATE_MASK != FREE_TAIL or self.words[tail + 1] != length):
            raise InvariantError(f"the free run at frame {frame} has no matching tail tag")
        end = frame + length
        if end % self._chunk_frames and end < self._end_frame and self.words[end * 4] & STATE_MASK == FREE:
            raise InvariantError(f"the free runs at frames {frame} and {end} should be one")

    def check_lists(self) -> set[int]:
        """Prove that the free lists are well linked and counted; return the first frames they name.

        Raises:
            InvariantError: naming the list and frame.
        """
        seen: set[int] = set()
        lengths = [0, 0]
        for bucket, head in enumerate(self._heads):
            if bool(head) != bool(self._mask >> bucket & 1):
                raise InvariantError(f"free list {bucket}: mask and head disagree")
            frame, previous = head, 0
            while frame:
                length = self.words[frame * 4 + 1]
                if self.words[frame * 4] & STATE_MASK != FREE or min(length, MAX_RUN) != bucket or frame in seen:
                    raise InvariantError(f"free list {bucket} names frame {frame}, which is no free run of that length")
                if self.words[frame * 4 + 3] != previous:
                    raise InvariantError(f"free list {bucket}: wrong back link at frame {frame}")
                lengths[bucket == MAX_RUN] += length
                seen.add(frame)
                previous, frame = frame, self.words[frame * 4 + 2]
        if lengths[1] != self.long_frames or sum(lengths) != self.free_frames:
            raise InvariantError(f"{lengths} frames in short and long runs; books: {self.free_frames}, long {self.long_frames}")
        return seen
