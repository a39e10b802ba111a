# SPDX-License-Identifier: GPL-2.0-or-later
"""The frame table: the state of every frame of the arena, and the free runs among them.

Allocators ask for n adjacent frames, since a zspage is read and written without copies. Free runs
carry boundary tags in the table (Knuth, 1973), so a free coalesces in constant time. A list for
every length gives best fit. A run never crosses a chunk. A chunk is what one refill populates, and
its part of the table is populated with it. So the neighbour that a free reads always has memory.

The table has four 32-bit words a frame (the kernel's counterpart is struct page):

    word 0   bits 0 to 2: state; bit 3: sealed; bits 14 and 15: the half of a used run;
             the other bits belong to the run's owner
    word 1   first frame of a free run: its length
             last frame of a free run: its length
             first frame of a used run: its length (bits 0 to 7), the owner's number (bits 8 to
             23), the seal's mark (bits 24 to 31)
             other frames of a used run: the first frame
    word 2,3 first frame of a free run: next and previous free run of its list
             first frame of a used run: the owner's

An all-zero table, as in a new file, means "holes". So nothing has to be initialised.

A successor that finds the table after a death between any two writes trusts one thing in it, the
*seal*. A run is used if and only if words 0 and 1 of its first frame both say so. Word 0 has USED
and SEALED. Word 1 has a *mark*, a checksum of the length and of the lower half of word 0. These
rules make that true at every instruction:

- `take` returns runs unsealed (TAKEN). The owner prepares the run (live words), then writes both
  words by one 64-bit store.
- The length, the mark and the lower half of word 0 do not change while the seal is there.
- `put` begins with the one 64-bit store that removes seal and mark, and changes neighbours after
  it. So no frame inside a free run, and none behind the first of a used run, has a seal or half of
  one.

So memory that changes by itself is detected. A used and sealed word 0 differs in at least two bits
from every other state. A flipped bit in state, seal, half, class or length makes the mark wrong. If
word 0 is lost, word 1 keeps a mark without a seal. If word 1 is lost, word 0 keeps a seal without a
mark. `adopt_run` counts all of these as wrong. It also counts each word 0 of an unused frame with a
value that no code writes.

Layouts before 5 have no mark, and return runs as USED, unsealed. That run has only state and half
in word 0. A run that has lost its seal has a class or chunks there too, since its owner writes them
together with the seal.

The half is part of the seal. Persistent runs outlive a process, ephemeral runs are free frames to
its successor. The half has two equal bits, so that a flip is detected without the mark too.

`adopt_run` rebuilds all other words from the seals and from the frames that the kernel says are
populated. It writes unsealed words only, so a death in the middle changes nothing.

Limits: `take` takes at most MAX_RUN frames.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from zswapd.core import crashpoints
from zswapd.core.crashpoints import reach
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable

HOLE: Final = 0
FREE: Final = 1
FREE_TAIL: Final = 2
USED: Final = 3
USED_TAIL: Final = 4
BUSY: Final = 5
TAKEN: Final = 6
"""States in bits 0 to 2 of word 0.

BUSY frames belong to a job under way. TAKEN runs are used and not yet sealed.
"""

STATE_MASK: Final = 7
SEALED: Final = 8
"""Bit of word 0 in the first frame of a used run: its owner has completed it for a successor."""
_SEAL_BITS: Final = STATE_MASK | SEALED
LENGTH_MASK: Final = 255
MARKED: Final = 1 << 31
"""The highest bit of a seal's mark. No frame number and no length has it."""
CHAIN_MASK: Final = 0xFFFF
"""Mask of the owner's number in word 1 of a used run's first frame, after a shift by CHAIN_SHIFT.
"""
CHAIN_SHIFT: Final = 8
NO_CHAIN: Final = 0xFF0000FF
"""Mask of word 1 without the owner's number."""
LOW_SHIFT: Final = 0 if sys.byteorder == "little" else 32
HIGH_SHIFT: Final = 32 - LOW_SHIFT
"""Shifts of the first and the second 32-bit word in the 64-bit word that overlays both."""
PERSISTENT: Final = 0
EPHEMERAL: Final = 3 << 14
"""The two halves as bits of word 0: no bit of HALF_MASK, and both."""
HALF_MASK: Final = 3 << 14
MAX_RUN: Final = 16
"""The longest run that `take` can take. Free runs of this length and more share one list."""
_FREED: Final = FREE_TAIL << LOW_SHIFT
"""Words 0 and 1 of the first frame of a run that has just lost its seal."""
_UNSEALED: Final = frozenset({HOLE, FREE, FREE_TAIL, USED_TAIL, BUSY, TAKEN, TAKEN | EPHEMERAL})
"""All values that code writes to word 0 without a seal."""
_UNSEALED_BEFORE: Final = frozenset({*_UNSEALED, USED, USED | EPHEMERAL})
"""The same for layouts before 5."""
_POLYNOMIAL: Final = 0x89
"""x^7 + x^3 + 1. It detects any two wrong bits in 24 bits and the checksum."""


def _remainders(shift: int) -> list[int]:
    """Return the checksum of each value of a byte that lies `shift` bits above the end."""
    table = []
    for value in range(256):
        rest = value << shift + 7
        for bit in range(shift + 14, 6, -1):
            if rest >> bit & 1:
                rest ^= _POLYNOMIAL << bit - 7
        table.append(rest)
    return table


_OF_LENGTH: Final = _remainders(0)
_OF_LOW_BYTE: Final = _remainders(8)
_OF_HIGH_BYTE: Final = _remainders(16)


def mark(state: int, length: int) -> int:
    """Return the mark for word 1 of a run.

    It is a checksum of the run's length and of the lower half of its word 0 with the seal.
    """
    return (
        MARKED
        | (_OF_HIGH_BYTE[state >> 8 & 255] ^ _OF_LOW_BYTE[state & 255] ^ _OF_LENGTH[length]) << 24
    )


def seal_words(state: int, length: int) -> int:
    """Return words 0 and 1 of a run's first frame, for one 64-bit store."""
    return state << LOW_SHIFT | (mark(state, length) | length) << HIGH_SHIFT


def is_persistent(word: int) -> bool:
    """Return whether a word 0 is the seal of a run of the persistent half."""
    return word & (STATE_MASK | SEALED) == USED | SEALED and word & HALF_MASK == PERSISTENT


class FrameTable:
    """Free and used runs of frames in a table of 32-bit words.

    Args:
        words: the table, four words a frame.
        pairs: the same table, two 64-bit words a frame.
        chunk_frames: frames of a chunk; no run crosses a multiple of this number.
        end_frame: the first frame number that does not exist.

    Attributes:
        free_frames: frames in free runs.
        long_frames: those of them in runs of at least MAX_RUN frames, which serve any request.
    """

    def __init__(
        self, words: memoryview, pairs: memoryview, *, chunk_frames: int, end_frame: int
    ) -> None:
        self.words = words
        self.pairs = pairs
        self.free_frames = 0
        self.long_frames = 0
        self._chunk_frames = chunk_frames
        self._end_frame = end_frame
        self._heads = [0] * (MAX_RUN + 1)
        self._mask = 0

    def take(self, count: int) -> int:
        """Turn `count` (1 to MAX_RUN) adjacent free frames into a used run.

        Returns:
            The first frame, or 0 if no free run is long enough.
        """
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
        words[word] = TAKEN
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
        # This one write removes the seal before all others (file header). If the run joins the one
        # before it, the frame keeps this tag.
        self.pairs[first * 2] = _FREED
        reach(crashpoints.FRAMES_UNSEALED)
        if first % self._chunk_frames:
            tag = words[(first - 1) * 4] & STATE_MASK
            if tag in (FREE_TAIL, FREE):
                length = words[(first - 1) * 4 + 1]
                first -= length
                self.remove(first, length)
        if (
            end % self._chunk_frames
            and end < self._end_frame
            and words[end * 4] & STATE_MASK == FREE
        ):
            length = words[end * 4 + 1]
            self.remove(end, length)
            end += length
        reach(crashpoints.FRAMES_JOINED)
        self._link(first, end - first)

    def free_around(self, first: int) -> tuple[int, int]:
        """Return (begin, end) of the free run that `put` would make of the used run at `first`."""
        words = self.words
        begin, end = first, first + (words[first * 4 + 1] & LENGTH_MASK)
        if begin % self._chunk_frames and words[(begin - 1) * 4] & STATE_MASK in (FREE_TAIL, FREE):
            begin -= words[(begin - 1) * 4 + 1]
        if (
            end % self._chunk_frames
            and end < self._end_frame
            and words[end * 4] & STATE_MASK == FREE
        ):
            end += words[end * 4 + 1]
        return begin, end

    def ephemeral_beside(self, begin: int, end: int) -> int:
        """Return the first frame of an ephemeral run next to a free run, in the same chunk.

        The result is 0 if there is none.
        """
        if end % self._chunk_frames and end < self._end_frame and self._is_ephemeral(end):
            return end
        if begin % self._chunk_frames:
            before = self.first_of(begin - 1)
            if self._is_ephemeral(before):
                return before
        return 0

    def _is_ephemeral(self, frame: int) -> bool:
        """Return whether a used and sealed run of the ephemeral half begins at a frame."""
        return (
            self.words[frame * 4] & (STATE_MASK | SEALED | HALF_MASK) == USED | SEALED | EPHEMERAL
        )

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
        """Remove a free run from its list; its tags stay until the caller writes others."""
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

    def remove_longest(
        self, max_frames: int, max_runs: int, shortest: int = 1
    ) -> list[tuple[int, int]]:
        """Remove free runs from the lists, long ones first, and mark them BUSY.

        Args:
            max_frames: frames to remove at most, together.
            max_runs: runs to remove at most.
            shortest: length of the shortest run to remove, 1 to MAX_RUN.

        Returns:
            The first frame and length of each run.
        """
        taken: list[tuple[int, int]] = []
        for bucket in range(MAX_RUN, shortest - 1, -1):
            first = self._heads[bucket]
            while max_frames > 0 and first and len(taken) < max_runs:
                following, length = self.words[first * 4 + 2], self.words[first * 4 + 1]
                if length <= max_frames:
                    self.remove(first, length)
                    # Both ends. Otherwise a neighbour that is freed meanwhile would join the run.
                    self.words[first * 4] = self.words[(first + length - 1) * 4] = BUSY
                    taken.append((first, length))
                    reach(crashpoints.TRIM_TAKEN)
                    max_frames -= length
                first = following
        return taken

    def adopt_run(
        self, first: int, end: int, found_wrong: Callable[[], None], *, is_older: bool = False
    ) -> tuple[int, int]:
        """Rebuild the words of a stretch of populated frames from its seals.

        The stretch is inside one chunk and has holes around it.

        Args:
            first: first frame of the stretch.
            end: the frame behind it.
            found_wrong: called before wrong words are overwritten.
            is_older: the arena has a layout before 5 or is being changed from one. Seals without a
                mark are right too.

        Returns:
            The number of frames in used runs, and the number of frames with wrong words, which no
            death causes (file header). Such frames become free, as those of ephemeral runs do.
        """
        words, pairs = self.words, self.pairs
        unsealed = _UNSEALED_BEFORE if is_older else _UNSEALED
        used = wrong = 0
        frame = free_from = first
        while frame < end:
            word = frame * 4
            state, length = words[word], words[word + 1]
            if length < MARKED and state in unsealed:
                frame += 1
                continue
            count = length & LENGTH_MASK
            if not self._is_sealed(state, length, is_older) or not 0 < count <= min(
                end - frame, MAX_RUN
            ):
                wrong += 1
                found_wrong()
                pairs[frame * 2] = _FREED
                frame += 1
                continue
            if state & HALF_MASK == EPHEMERAL:
                pairs[frame * 2] = _FREED
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

    def _is_sealed(self, state: int, length: int, is_older: bool) -> bool:  # noqa: FBT001 - one caller
        """Return whether words 0 and 1 of a frame are those of a sealed run."""
        if state & _SEAL_BITS != USED | SEALED or state & HALF_MASK not in (PERSISTENT, EPHEMERAL):
            return False
        if length < MARKED:
            return is_older
        return length & 0xFF000000 == mark(state, length & LENGTH_MASK)

    def erase(self, first: int, count: int) -> None:
        """Make frames holes."""
        for word in range(first * 4, (first + count) * 4, 4):
            self.words[word] = HOLE

    def first_of(self, frame: int) -> int:
        """Return the first frame of the used run that holds `frame`."""
        return (
            self.words[frame * 4 + 1] if self.words[frame * 4] & STATE_MASK == USED_TAIL else frame
        )

    def run_at(self, frame: int, end: int) -> tuple[int, int]:
        """Return (length, state) of the run that begins at `frame`; holes are joined, up to `end`.

        Raises:
            InvariantError: no run begins there.
        """
        words = self.words
        state = words[frame * 4] & STATE_MASK
        if state in (FREE, BUSY):
            return words[frame * 4 + 1], state
        if state in (USED, TAKEN):
            return words[frame * 4 + 1] & LENGTH_MASK, USED
        if state != HOLE:
            raise InvariantError(f"frame {frame} is inside a run, where one should begin")
        length = 1
        while frame + length < end and not words[(frame + length) * 4] & STATE_MASK:
            length += 1
        return length, state

    def check_free_run(self, frame: int, length: int) -> None:
        """Verify that the tags of a free run agree and that the next run is not free.

        Raises:
            InvariantError: they do not agree, or it is free.
        """
        tail = (frame + length - 1) * 4
        if length > 1 and (
            self.words[tail] & STATE_MASK != FREE_TAIL or self.words[tail + 1] != length
        ):
            raise InvariantError(f"the free run at frame {frame} has no matching tail tag")
        end = frame + length
        if (
            end % self._chunk_frames
            and end < self._end_frame
            and self.words[end * 4] & STATE_MASK == FREE
        ):
            raise InvariantError(f"the free runs at frames {frame} and {end} should be one")

    def check_lists(self) -> set[int]:
        """Verify links and counts of the free lists; return the first frames on them.

        Raises:
            InvariantError: the message names the list and frame.
        """
        seen: set[int] = set()
        lengths = [0, 0]
        for bucket, head in enumerate(self._heads):
            if bool(head) != bool(self._mask >> bucket & 1):
                raise InvariantError(f"free list {bucket}: mask and head disagree")
            frame, previous = head, 0
            while frame:
                length = self.words[frame * 4 + 1]
                if (
                    self.words[frame * 4] & STATE_MASK != FREE
                    or min(length, MAX_RUN) != bucket
                    or frame in seen
                ):
                    raise InvariantError(
                        f"free list {bucket} names frame {frame}, which is no free run of that"
                        " length"
                    )
                if self.words[frame * 4 + 3] != previous:
                    raise InvariantError(f"free list {bucket}: wrong back link at frame {frame}")
                lengths[bucket == MAX_RUN] += length
                seen.add(frame)
                previous, frame = frame, self.words[frame * 4 + 2]
        if lengths[1] != self.long_frames or sum(lengths) != self.free_frames:
            raise InvariantError(
                f"{lengths} frames in short and long runs; counted: {self.free_frames}, long"
                f" {self.long_frames}"
            )
        return seen
