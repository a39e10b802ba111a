# SPDX-License-Identifier: GPL-2.0-or-later
"""zbud: at most two compressed pages a frame, one from each end.

It is simpler than zsmalloc and less dense. A frame holds one or two pages (*buddies*). So freeing a
frame costs at most two pages, and never requires a move. Room is counted in chunks of a 64th of a
page, 64 bytes for 4 KiB pages. A frame with one buddy is on the unbuddied list for its number of
free chunks. A new object goes to the frame where it fits best. A frame with two buddies is on the
buddied list, whatever is free between them.

All data about a frame is in its words of the frame table:

    word 0   state, seal and half (bits 0 to 15) | chunks of the first buddy (bits 16 to 23) |
             chunks of the last buddy (bits 24 to 31)
    word 1   1, the run's length (bits 0 to 7) | the upper half of word 0 again (bits 8 to 23) |
             the seal's mark (bits 24 to 31)
    word 2,3 next and previous frame of its list. For a body, word 2 is as in base.py.

A body is a first buddy of all chunks. Word 0 says where a buddy begins. The first begins with the
frame. The last begins as many chunks before the frame's end as it has.

So words 0 and 1, written by one 64-bit store, say all that a successor needs. The store that adds a
buddy comes after the buddy's live word is DEAD, and before its owner makes it live. The store that
removes a buddy comes after its live word is DEAD. So a buddy with chunks and without life is a
store or a free that was cut short, and counts as free. A death leaves at most one. A second one is
memory that has changed, and so is a frame with different chunks in words 0 and 1.

zcache's zbud had no compaction. Here compaction joins two frames with one buddy each, the smallest
buddy with the largest that it fits. That frees as many frames as any pairing could.

Invariants (`check` verifies them): each frame is on the list for its chunks, and the counts agree
with the lists.

Source of the ideas: zbud in zcache (Dan Magenheimer, 2010-2012), with its list for each number of
chunks. Chunks that grow with the page are from its later form (Seth Jennings).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.allocators.base import DEAD, OWN_BITS, Allocator
from zswapd.core.allocators.frametable import (
    CHAIN_MASK,
    CHAIN_SHIFT,
    HIGH_SHIFT,
    LENGTH_MASK,
    LOW_SHIFT,
    MARKED,
    PERSISTENT,
    seal_words,
)
from zswapd.core.crashpoints import reach
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.core.allocators.lru import Lru
    from zswapd.core.allocators.pageframes import PageFrames

NCHUNKS: Final = 64
_FIRST, _LAST = 16, 24
"""The lowest bits of the first and the last buddy's chunks in word 0."""
_IN_PAIR: Final = (1 << _FIRST << LOW_SHIFT) + (1 << CHAIN_SHIFT << HIGH_SHIFT)
"""Factor from the chunks of both buddies to their bits in the pair of words 0 and 1.

The chunks of both are those of the first, plus 256 times those of the last.
"""
_BUDDIED: Final = 0
"""The list of frames with two buddies. The other lists have the number of their free chunks."""


@dataclass(frozen=True, slots=True)
class ZbudStatistics:
    """Counts of the pool, with zcache's names where zcache had them.

    Attributes:
        objects: objects in use, bodies included.
        used_frames, zbud_curr_raw_pages: frames held, under the allocators' common name and under
            zcache's.
        bodies: those of them that hold a body.
        zbud_buddied_count: frames with two objects.
        zbud_unbuddied_list_counts: frames with one object, by chunks of the object, from 1 chunk
            up.
        zbud_cumul_chunk_counts: objects ever made, by chunks. The last number is that of bodies.
        zbpg_unused_list_count: frames held without an object. Always 0: an empty frame is freed at
            once.
        failed_alloc: requests refused because pageframes had no frame.
        pages_compacted, objects_moved: frames that compaction freed, and objects that it moved,
            since the start.
    """

    objects: int
    used_frames: int
    zbud_curr_raw_pages: int
    bodies: int
    zbud_buddied_count: int
    zbud_unbuddied_list_counts: tuple[int, ...]
    zbud_cumul_chunk_counts: tuple[int, ...]
    zbpg_unused_list_count: int
    failed_alloc: int
    pages_compacted: int
    objects_moved: int


counters.declare(
    ZbudStatistics, cumulative="zbud_cumul_chunk_counts failed_alloc pages_compacted objects_moved"
)


class ZbudPool(Allocator):
    """The zbud allocator, for objects of 1 byte to a page (see Allocator for the arguments).

    The largest object that is no body is one chunk less than a page.
    """

    def __init__(self, frames: PageFrames, half: int = PERSISTENT, lru: Lru | None = None) -> None:
        super().__init__(frames, half, lru)
        self._chunk = frames.page_size // NCHUNKS
        self._seal = seal_words(self._sealed, 1)
        self.max_shared = frames.page_size - self._chunk
        self._heads = [0] * NCHUNKS
        self._counts = [0] * NCHUNKS
        self._mask = 0
        self._bodies = 0
        self._cumul = [0] * NCHUNKS

    def _link(self, number: int, frame: int) -> None:
        words = self._words
        head = self._heads[number]
        words[frame * 4 + 2] = head
        words[frame * 4 + 3] = 0
        if head:
            words[head * 4 + 3] = frame
        self._heads[number] = frame
        self._counts[number] += 1
        if number:
            self._mask |= 1 << number

    def _unlink(self, number: int, frame: int) -> None:
        words = self._words
        following, previous = words[frame * 4 + 2], words[frame * 4 + 3]
        if previous:
            words[previous * 4 + 2] = following
        else:
            self._heads[number] = following
            if not following and number:
                self._mask &= ~(1 << number)
        if following:
            words[following * 4 + 3] = previous
        self._counts[number] -= 1

    # The page path.

    def alloc(self, size: int) -> int:
        """Return the handle of a new object, in the frame where it fits best (see Allocator)."""
        if not 0 < size <= self._page_size:
            raise ValueError(f"an object of {size} bytes does not fit a page of {self._page_size}")
        chunks = (size + self._chunk - 1) // self._chunk
        fitting = self._mask >> chunks
        if fitting:
            number = (fitting & -fitting).bit_length() - 1 + chunks
            handle = self._join(number, self._heads[number], chunks)
        else:
            handle = self._begin(chunks)
        if handle:
            self._cumul[chunks - 1] += 1
        return handle

    def _begin(self, chunks: int) -> int:
        """Make the first buddy of a new frame, or a body; return its handle, or 0."""
        frame = self._frames.alloc(1, self._half)
        if not frame:
            self.failed_alloc += 1
            return 0
        reach(crashpoints.ZSPAGE_TAKEN)
        # Bytes of an earlier owner may stay, but not in the live word.
        self._live_words[frame * self._page_size >> 3] = DEAD
        reach(crashpoints.ZSPAGE_CLEARED)
        self._pairs[frame * 2] = self._seal + chunks * _IN_PAIR
        reach(crashpoints.ZSPAGE_SEALED)
        if chunks == NCHUNKS:
            self._bodies += 1
        else:
            self._link(NCHUNKS - chunks, frame)
            if self._lru is not None:
                self._lru.add(frame)
        return frame * self._page_size

    def _join(self, number: int, frame: int, chunks: int) -> int:
        """Add the second buddy to a frame of an unbuddied list; return its handle."""
        self._unlink(number, frame)
        both = self._words[frame * 4] >> _FIRST
        if both & 255:
            handle = (frame + 1) * self._page_size - chunks * self._chunk
            both |= chunks << 8
        else:
            handle = frame * self._page_size
            both |= chunks
        # DEAD comes before the chunks, so that old bytes are not taken for a live object.
        self._live_words[handle >> 3] = DEAD
        reach(crashpoints.OBJECT_OFF_CHAIN)
        self._pairs[frame * 2] = self._seal + both * _IN_PAIR
        reach(crashpoints.OBJECT_ALLOCATED)
        self._link(_BUDDIED, frame)
        if self._lru is not None:
            self._lru.touch(frame)
        return handle

    def free(self, handle: int) -> None:
        """Free an object (see Allocator); a frame that becomes empty goes to the reserve."""
        frame, offset = divmod(handle, self._page_size)
        state = self._words[frame * 4]
        if state & 0xFFFF & ~OWN_BITS != self._sealed:
            raise InvariantError(f"handle {handle:#x} is freed but lies in no frame of this pool")
        first, last = state >> _FIRST & 255, state >> _LAST
        if not offset and first:
            own, left, both = first, last, last << 8
        elif last and offset == self._page_size - last * self._chunk:
            own, left, both = last, first, first
        else:
            raise InvariantError(f"handle {handle:#x} is freed but no object begins there")
        if not left:
            if own == NCHUNKS:
                self._bodies -= 1
            else:
                self._unlink(NCHUNKS - own, frame)
                if self._lru is not None:
                    self._lru.remove(frame)
            # The live word stays: no successor reads memory outside a sealed frame.
            reach(crashpoints.ZSPAGE_EMPTY)
            self._frames.free(frame)
            return
        self._live_words[handle >> 3] = DEAD
        reach(crashpoints.OBJECT_DEAD)
        self._pairs[frame * 2] = self._seal + both * _IN_PAIR
        reach(crashpoints.OBJECT_FREED)
        self._unlink(_BUDDIED, frame)
        self._link(NCHUNKS - left, frame)

    # Off the page path.

    def objects_of(self, first: int) -> list[int]:
        """Return the handles of a frame's live buddies (see Allocator)."""
        state = self._words[first * 4]
        one, other = state >> _FIRST & 255, state >> _LAST
        base = first * self._page_size
        found: list[int] = []
        if 0 < one < NCHUNKS and self._live_words[base >> 3] != DEAD:
            found.append(base)
        if other:
            base += self._page_size - other * self._chunk
            if self._live_words[base >> 3] != DEAD:
                found.append(base)
        return found

    def free_run(self, first: int) -> None:
        """Free a frame with its buddies (see Allocator)."""
        state = self._own_state(first)
        one, other = state >> _FIRST & 255, state >> _LAST
        self._unlink(_BUDDIED if one and other else NCHUNKS - one - other, first)
        if self._lru is not None:
            self._lru.remove(first)
        reach(crashpoints.ZSPAGE_EMPTY)
        self._frames.free(first)

    def _buddies(self, frame: int) -> list[tuple[int, int]]:
        """Return (handle, bytes of room) of a frame's buddies, live or not; none for a body."""
        state = self._words[frame * 4]
        first, last = (state >> _FIRST & 255) * self._chunk, (state >> _LAST) * self._chunk
        base = frame * self._page_size
        found = [(base, first)] if 0 < first < self._page_size else []
        return [*found, (base + self._page_size - last, last)] if last else found

    def compact(self, moved: Callable[[int, int], None], max_moves: int = 1 << 62) -> int:
        """Join frames with one object in pairs while a pair fits.

        See Allocator.
        """
        freed = 0
        while freed < max_moves and self._mask:
            most = self._mask.bit_length() - 1
            source = self._heads[most]
            chunks = NCHUNKS - most
            fitting = self._mask >> chunks
            number = (fitting & -fitting).bit_length() - 1 + chunks if fitting else most
            target = self._heads[number] if number != most else self._words[source * 4 + 2]
            alive = self.objects_of(source)
            if not fitting or not target or not alive:
                break
            (old,) = alive
            new = self._join(number, target, chunks)
            self.memory[new + 8 : new + chunks * self._chunk] = self.memory[
                old + 8 : old + chunks * self._chunk
            ]
            reach(crashpoints.COMPACT_COPIED)
            self._live_words[new >> 3] = self._live_words[old >> 3]
            reach(crashpoints.COMPACT_ALIVE)
            moved(old, new)
            reach(crashpoints.COMPACT_INDEXED)
            self.free(old)
            reach(crashpoints.COMPACT_FREED)
            freed += 1
        self.objects_moved += freed
        self.pages_compacted += freed
        return freed

    # A successor's beginning.

    def adopt(self) -> int:
        """Rebuild all state from the sealed frames and their live words (see Allocator)."""
        words = self._words
        empty: list[int] = []
        for frame in self._frames.used_runs(self._half):
            if not self._makes_sense(frame):
                self._found_wrong()
                empty.append(frame)
                continue
            if words[frame * 4] >> _FIRST == NCHUNKS:
                self._pairs[frame * 2] = self._seal + NCHUNKS * _IN_PAIR
                words[frame * 4 + 2] = 0  # not claimed yet
                self._bodies += 1
                continue
            first = last = 0
            for handle, room in self._buddies(frame):
                if not self._is_alive(handle >> 3):
                    self._found_unfinished()
                elif handle % self._page_size:
                    last = room // self._chunk
                else:
                    first = room // self._chunk
            reach(crashpoints.TAKEOVER_ZSPAGE)
            if not first and not last:
                empty.append(frame)
                continue
            self._pairs[frame * 2] = self._seal + (first | last << 8) * _IN_PAIR
            self._link(_BUDDIED if first and last else NCHUNKS - first - last, frame)
            if self._lru is not None:
                self._lru.add(frame)
        self._free_empty(empty)
        return self._wrong

    def _makes_sense(self, frame: int) -> bool:
        """Return whether a death can leave the words of a sealed frame as they are."""
        state, word = self._words[frame * 4], self._words[frame * 4 + 1]
        first, last = state >> _FIRST & 255, state >> _LAST
        if (
            state & OWN_BITS
            or word & LENGTH_MASK != 1
            or not 0 < first + last <= NCHUNKS
            or last == NCHUNKS
        ):
            return False
        # In an older arena, a word 1 without a mark has no chunks.
        return word < MARKED or word >> CHAIN_SHIFT & CHAIN_MASK == state >> _FIRST

    def each_span(self, found: Callable[[int, int, int], None]) -> None:
        """Call `found` with each buddy (see Allocator)."""
        for frame in self._frames.used_runs(self._half):
            for handle, room in self._buddies(frame):
                found(handle, room, 1)

    def is_body(self, first: int) -> bool:
        """Return whether a used frame holds a body."""
        return self._words[first * 4] == self._sealed | NCHUNKS << _FIRST

    # Totals and checks.

    def used_frames(self) -> int:
        """Return the number of frames held."""
        return sum(self._counts) + self._bodies

    def freeable_frames(self) -> int:
        """Return the number of frames that compaction would free.

        It is the number of pairs, the smallest with the largest that fits.
        """
        by_chunks = [0, *self._counts[:0:-1]]
        pairs, small, large = 0, 1, NCHUNKS - 1
        while small < large:
            if small + large <= NCHUNKS:
                both = min(by_chunks[small], by_chunks[large])
                pairs += both
                by_chunks[small] -= both
                by_chunks[large] -= both
            if small + large > NCHUNKS or not by_chunks[large]:
                large -= 1
            else:
                small += 1
        return pairs + by_chunks[small] // 2 if small * 2 <= NCHUNKS else pairs

    def statistics(self) -> ZbudStatistics:
        """Return a frozen snapshot."""
        buddied, *unbuddied = self._counts
        used = self.used_frames()
        return ZbudStatistics(
            objects=2 * buddied + sum(unbuddied) + self._bodies,
            used_frames=used,
            zbud_curr_raw_pages=used,
            bodies=self._bodies,
            zbud_buddied_count=buddied,
            zbud_unbuddied_list_counts=tuple(reversed(unbuddied)),
            zbud_cumul_chunk_counts=tuple(self._cumul),
            zbpg_unused_list_count=used - sum(self._counts) - self._bodies,
            failed_alloc=self.failed_alloc,
            pages_compacted=self.pages_compacted,
            objects_moved=self.objects_moved,
        )

    def _list(self, number: int) -> Iterator[int]:
        """Yield the frames of one list, verifying the back links."""
        frame, previous = self._heads[number], 0
        while frame:
            if self._words[frame * 4 + 3] != previous:
                raise InvariantError(f"frame {frame}: wrong back link in list {number}")
            yield frame
            previous, frame = frame, self._words[frame * 4 + 2]

    def check(self) -> None:
        """Walk all lists and all frames; verify the invariants in this file's header.

        Never on the page path.

        Raises:
            InvariantError: the message names the frame or list.
        """
        listed: dict[int, int] = {}
        for number in range(NCHUNKS):
            frames = list(self._list(number))
            listed.update(dict.fromkeys(frames, number))
            if len(frames) != self._counts[number] or (
                number and bool(frames) != bool(self._mask >> number & 1)
            ):
                raise InvariantError(
                    f"list {number} has {len(frames)} frames and counts {self._counts[number]}"
                )
        bodies = 0
        for frame in self._frames.used_runs(self._half):
            if self.is_body(frame):
                bodies += 1
                continue
            state = self._words[frame * 4]
            first, last = state >> _FIRST & 255, state >> _LAST
            belongs = _BUDDIED if first and last else NCHUNKS - first - last
            if (
                state & 0xFFFF != self._sealed
                or not 0 < first + last <= NCHUNKS
                or listed.pop(frame, -1) != belongs
            ):
                raise InvariantError(
                    f"frame {frame} with {first} and {last} chunks is not in list {belongs}"
                )
        if listed or bodies != self._bodies:
            raise InvariantError(
                f"{bodies} bodies, {self._bodies} counted; lists name {sorted(listed)[:5]} that are"
                " no frames"
            )
        self.check_lru(sum(self._counts))
