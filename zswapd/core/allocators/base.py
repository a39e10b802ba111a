# SPDX-License-Identifier: GPL-2.0-or-later
"""The base class of the allocators: objects of up to a page, in runs of page frames of one arena.

A handle is the object's byte offset in the arena: a machine word, never 0, stable until the object
is freed or compaction reports that it moved. Reading an object through a handle therefore needs no
lookup and no copy.

The first eight bytes of an object are its *live word*, which belongs to the object's owner. `alloc`
returns the object with DEAD in that word. The owner writes another value, not 0, when the object is
complete, and `free` writes DEAD again, in one store each. A successor process, which finds the
arena without an index, tells live objects from dead ones by that word, and so does compaction. The
live word of a dead object is DEAD and not 0: memory that has lost its contents reads as 0, and is
neither a dead object nor a live one.

An object above `max_shared` bytes is a *body*. A body holds a page as a process wrote it, which
could imitate anything. So it has no live word, it shares its run with no other object, compaction
never moves it, and it outlives a takeover only if its owner claims it. Word 0 of the run's first
frame tells that a run holds a body; word 2 is 1 when the body was adopted and claimed.

The order of use is kept only for an allocator that is given an Lru, since it costs a few writes at
each use: the ephemeral half needs it to evict the oldest run first. Bodies are not in the order:
nothing in a body names its page. To a successor, runs were used in the order of their frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from zswapd.core.allocators.frametable import LOW_SHIFT, PERSISTENT, SEALED, USED
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.allocators.lru import Lru
    from zswapd.core.allocators.pageframes import PageFrames

_MAX_PAGE: Final = 64 << 10
DEAD_CHECK: Final = 0x5DEAD5A3
DEAD: Final = DEAD_CHECK << LOW_SHIFT
"""The live word of an object that is not in use. Read as a header, it has this checksum and no
generation, which no store writes."""
_SOME: Final = 0xFF
"""Runs that are given back between two calls of `PageFrames.alive`, less one."""
OWN_BITS: Final = 0x3FF0
"""Bits of the lower half of word 0 that are the allocator's own."""


class Allocator(ABC):
    """Objects of up to a page in runs of frames of one arena.

    Args:
        frames: where runs come from and go to.
        half: the half that the runs belong to, frametable.PERSISTENT or EPHEMERAL.
        lru: keeps the order in which runs were used; None to keep no order.

    Attributes:
        memory: the arena's bytes; `memory[handle : handle + size]` is the object.
        max_size: bytes of the largest object.
        max_shared: bytes of the largest object that shares its frames with others; a larger one is
            a body.
        longest_run: frames of the longest run.
        failed_alloc: runs that pageframes did not have.
        pages_compacted, objects_moved: frames that compaction set free, and objects that it moved,
            since the start.
    """

    max_shared: int

    def __init__(self, frames: PageFrames, half: int = PERSISTENT, lru: Lru | None = None) -> None:
        if not 4096 <= frames.page_size <= _MAX_PAGE:
            raise ValueError(f"pages of {frames.page_size} bytes do not fit the words of a run")
        self.memory = frames.arena.view
        self.max_size = frames.page_size
        self.longest_run = 1
        self._live_words = frames.arena.words64
        self._frames = frames
        self._words = frames.table.words
        self._pairs = frames.table.pairs
        self._page_size = frames.page_size
        self._half = half
        self._sealed = USED | SEALED | half
        self._lru = lru
        self._unfinished = self._wrong = 0
        self.failed_alloc = 0
        self.pages_compacted = 0
        self.objects_moved = 0

    # The page path.

    @abstractmethod
    def alloc(self, size: int) -> int:
        """Return the handle of a new object of at least `size` bytes, or 0 if no frame is free.

        The live word is DEAD. A refusal is counted (`failed_alloc`).

        Raises:
            ValueError: `size` is not between 1 byte and a page.
        """

    @abstractmethod
    def free(self, handle: int) -> None:
        """Free an object; frames that become empty go to the reserve.

        Raises:
            InvariantError: the handle is not that of an object of this pool.
        """

    def view(self, handle: int, size: int) -> memoryview:
        """Return the first `size` bytes of an object, writable, without a copy.

        The view is valid until the object is freed or moved.
        """
        return self.memory[handle : handle + size]

    # The order of use.

    def touch(self, handle: int) -> None:
        """Note that an object's run was used, if an order is kept."""
        if self._lru is not None:
            self._lru.touch(self._frames.table.first_of(handle // self._page_size))

    def oldest_run(self) -> int:
        """Return the first frame of the run not used for longest; 0 if there is no run or no order."""
        return self._lru.oldest() if self._lru is not None else 0

    def check_lru(self, runs: int) -> None:
        """Prove the order of use, and that it has the `runs` runs that hold no body, and no others.

        Raises:
            InvariantError: it does not.
        """
        if self._lru is None:
            return
        self._lru.check()
        ours = sum(
            self._words[first * 4] & 0xFFFF & ~OWN_BITS == self._sealed and not self.is_body(first)
            for first in self._lru
        )
        if not ours == runs == self._lru.entries:
            raise InvariantError(
                f"{runs} runs; the order of use has {self._lru.entries} entries, {ours} of them"
                " runs"
            )

    # Whole runs.

    @abstractmethod
    def objects_of(self, first: int) -> list[int]:
        """Return the handles of the live objects in the run that begins at a frame; none of a body."""

    @abstractmethod
    def free_run(self, first: int) -> None:
        """Free all objects of the run that begins at a frame, and its frames.

        Raises:
            InvariantError: it is no run of this pool, or that of a body.
        """

    def _own_state(self, first: int) -> int:
        """Return word 0 of the run that begins at a frame.

        Raises:
            InvariantError: it is no run of this pool, or that of a body.
        """
        state = self._words[first * 4]
        if state & 0xFFFF & ~OWN_BITS != self._sealed or self.is_body(first):
            raise InvariantError(f"frame {first} begins no run of this pool that has objects")
        return state

    # Compaction.

    @abstractmethod
    def compact(self, moved: Callable[[int, int], None], max_moves: int = 1 << 62) -> int:
        """Pack objects together so that frames become free; return the frames set free.

        Args:
            moved: called with (old handle, new handle) after an object was copied and before the
                old one is freed.
            max_moves: objects that are moved at most, which bounds the time.
        """

    @abstractmethod
    def freeable_frames(self) -> int:
        """Return the number of frames that compaction would set free."""

    # Adoption by a successor.

    @abstractmethod
    def adopt(self) -> int:
        """Rebuild all books from the arena, after `PageFrames.adopt`.

        Every object with a live word and every body is in use afterwards.

        Returns:
            The number of runs and objects that no death leaves: memory has changed by itself there.
        """

    def _found_wrong(self) -> None:
        """Count a run or object that no death leaves.

        And note it in the arena before its traces go.
        """
        self._frames.distrust()
        self._wrong += 1

    def _found_unfinished(self) -> None:
        """Count an object that is dead and counted as live.

        A death in `alloc` or `free` leaves one.
        """
        self._unfinished += 1
        if self._unfinished > 1:
            self._found_wrong()

    def _is_alive(self, place: int) -> bool:
        """Say whether an object is live, whose live word is the arena's 64-bit word at `place`.

        In an arena of an older layout, a dead object has 0 there, and DEAD is written. In others,
        0 is memory that has lost its contents.
        """
        word = self._live_words[place]
        if word:
            return word != DEAD
        if not self._frames.arena.is_older:
            self._found_wrong()
        self._live_words[place] = DEAD
        return False

    def _free_empty(self, empty: list[int]) -> None:
        """Give back runs in which no live object was found."""
        for number, first in enumerate(empty):
            self._frames.free(first)
            if not number & _SOME:
                self._frames.alive()

    @abstractmethod
    def each_span(self, found: Callable[[int, int, int], None]) -> None:
        """Call `found` with (handle, bytes, number) of objects in a row, dead ones among them.

        All spans together have every object in use that is no body. `found` must not free or
        allocate.
        """

    def each_object(self, found: Callable[[int, int], None]) -> None:
        """Call `found` with (handle, bytes of room) of every object in use that is no body.

        `found` must not free or allocate.
        """

        def found_span(handle: int, size: int, count: int) -> None:
            for place in range(handle, handle + size * count, size):
                if self._live_words[place >> 3] != DEAD:
                    found(place, size)

        self.each_span(found_span)

    # Bodies, after a takeover.

    @abstractmethod
    def is_body(self, first: int) -> bool:
        """Say whether the used run that begins at a frame is that of a body."""

    def claim(self, body: int) -> bool:
        """Note that an adopted body is in use; return False if there is none, or if it was claimed."""
        first, remainder = divmod(body, self._page_size)
        if (
            remainder
            or not self._frames.first_frame <= first < self._frames.end_frame
            or not self.is_body(first)
        ):
            return False
        if self._words[first * 4 + 2]:
            return False
        self._words[first * 4 + 2] = 1
        return True

    def disclaim(self, body: int) -> None:
        """Take a claim back."""
        self._words[body // self._page_size * 4 + 2] = 0

    def free_unclaimed(self) -> int:
        """Free every adopted body that was not claimed; return how many there were."""
        runs = self._frames.used_runs(self._half)
        unclaimed = [
            first for first in runs if self.is_body(first) and not self._words[first * 4 + 2]
        ]
        for number, first in enumerate(unclaimed):
            self.free(first * self._page_size)
            if not number & _SOME:
                self._frames.alive()
        return len(unclaimed)

    # The books.

    @abstractmethod
    def used_frames(self) -> int:
        """Return the number of frames held."""

    @abstractmethod
    def check(self) -> None:
        """Prove the invariants that the implementation's file names; takes seconds for a full pool.

        Raises:
            InvariantError: naming the run that is wrong.
        """
