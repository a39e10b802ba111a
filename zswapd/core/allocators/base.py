# SPDX-License-Identifier: GPL-2.0-or-later
"""The base class of the allocators: objects of up to a page, in runs of page frames of one arena.

A handle is the object's byte offset in the arena. It is a machine word, never 0, and stable until
the object is freed or compaction reports that it moved. So reading an object needs no lookup and no
copy.

The first eight bytes of an object are its *live word*, which belongs to the object's owner. `alloc`
returns the object with DEAD in that word. The owner writes another value, not 0, when the object is
complete. `free` writes DEAD again. Each write is one store. A successor finds the arena without an
index, and knows live objects from dead ones by that word. So does compaction. The live word of a
dead object is not 0, because memory that has lost its contents reads as 0: such memory is neither a
dead object nor a live one.

An object above `max_shared` bytes is a *body*. A body holds a page as a process wrote it, and its
bytes could imitate anything. So it has no live word, it shares its run with no other object, and
compaction never moves it. It outlives a takeover only if its owner claims it. Word 0 of the run's
first frame says that the run holds a body. Word 2 is 1 when the body was adopted and claimed.

An allocator keeps an order of use only if it has an Lru, since each use then costs about six word
writes. The ephemeral half needs the order to evict the oldest run first. Bodies are not in the
order: no byte of a body names its page. A successor takes the order of the frames as the order of
use.
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
"""The live word of a free object.

Read as a header, it has this checksum and the generation 0, which no store writes.
"""
_SOME: Final = 0xFF
"""Number of runs freed between two calls of `PageFrames.alive`, less one."""
OWN_BITS: Final = 0x3FF0
"""The bits of the lower half of word 0 that are the allocator's own."""


class Allocator(ABC):
    """An allocator of objects of up to a page, in runs of frames of one arena.

    Args:
        frames: the source of runs.
        half: the half of the runs, frametable.PERSISTENT or EPHEMERAL.
        lru: keeps the order in which runs were used; None to keep no order.

    Attributes:
        memory: bytes of the arena; `memory[handle : handle + size]` is the object.
        max_size: bytes of the largest object.
        max_shared: bytes of the largest object that shares its frames with others. A larger one is
            a body.
        longest_run: frames of the longest run.
        failed_alloc: requests for which pageframes had no run.
        pages_compacted, objects_moved: frames that compaction freed, and objects that it moved,
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

        The live word is DEAD. A failure is counted (`failed_alloc`).

        Raises:
            ValueError: `size` is not between 1 byte and a page.
        """

    @abstractmethod
    def free(self, handle: int) -> None:
        """Free an object; frames that become empty go to the reserve.

        Raises:
            InvariantError: no object of this allocator has the handle.
        """

    def view(self, handle: int, size: int) -> memoryview:
        """Return the first `size` bytes of an object, writable, without a copy.

        The view is valid until the object is freed or moved.
        """
        return self.memory[handle : handle + size]

    # The order of use.

    def touch(self, handle: int) -> None:
        """Mark an object's run as used, if an order is kept."""
        if self._lru is not None:
            self._lru.touch(self._frames.table.first_of(handle // self._page_size))

    def oldest_run(self) -> int:
        """Return the first frame of the least recently used run; 0 without a run or an order."""
        return self._lru.oldest() if self._lru is not None else 0

    def check_lru(self, runs: int) -> None:
        """Verify that the order of use has exactly the `runs` runs without a body.

        Raises:
            InvariantError: it has others.
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
        """Return the handles of the live objects in the run at a frame; none for a body."""

    @abstractmethod
    def free_run(self, first: int) -> None:
        """Free all objects of the run that begins at a frame, and its frames.

        Raises:
            InvariantError: it is no run of this allocator, or holds a body.
        """

    def _own_state(self, first: int) -> int:
        """Return word 0 of the run that begins at a frame.

        Raises:
            InvariantError: it is no run of this allocator, or holds a body.
        """
        state = self._words[first * 4]
        if state & 0xFFFF & ~OWN_BITS != self._sealed or self.is_body(first):
            raise InvariantError(f"frame {first} begins no run of this pool that has objects")
        return state

    # Compaction.

    @abstractmethod
    def compact(self, moved: Callable[[int, int], None], max_moves: int = 1 << 62) -> int:
        """Pack objects together so that frames become free; return the number of frames freed.

        Args:
            moved: called with (old handle, new handle) after an object was copied and before the
                old one is freed.
            max_moves: objects to move at most, which bounds the time.
        """

    @abstractmethod
    def freeable_frames(self) -> int:
        """Return the number of frames that compaction would free."""

    # Adoption by a successor.

    @abstractmethod
    def adopt(self) -> int:
        """Rebuild all state from the arena, after `PageFrames.adopt`.

        Afterwards every object with a live word and every body is in use.

        Returns:
            The number of runs and objects in a state that no death leaves. Their memory has
            changed.
        """

    def _found_wrong(self) -> None:
        """Count a run or object in a state that no death leaves.

        The arena is marked as distrusted before the evidence is overwritten.
        """
        self._frames.distrust()
        self._wrong += 1

    def _found_unfinished(self) -> None:
        """Count a dead object that its run counts as in use.

        A death in `alloc` or `free` leaves one. A second one is damage.
        """
        self._unfinished += 1
        if self._unfinished > 1:
            self._found_wrong()

    def _is_alive(self, place: int) -> bool:
        """Return whether an object is live; `place` is the number of its live word in the arena.

        In an arena of an older layout, a dead object has 0 there, and DEAD is written. In other
        arenas, 0 is memory that has lost its contents.
        """
        word = self._live_words[place]
        if word:
            return word != DEAD
        if not self._frames.arena.is_older:
            self._found_wrong()
        self._live_words[place] = DEAD
        return False

    def _free_empty(self, empty: list[int]) -> None:
        """Free runs without a live object."""
        for number, first in enumerate(empty):
            self._frames.free(first)
            if not number & _SOME:
                self._frames.alive()

    @abstractmethod
    def each_span(self, found: Callable[[int, int, int], None]) -> None:
        """Call `found` with (handle, bytes, number) of each row of adjacent objects.

        The rows together have every object in use that is no body, and may have dead objects.
        `found` must not free or allocate.
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
        """Return whether the used run that begins at a frame holds a body."""

    def claim(self, body: int) -> bool:
        """Mark an adopted body as in use; return False if it is no body or already claimed."""
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
        """Undo `claim`."""
        self._words[body // self._page_size * 4 + 2] = 0

    def free_unclaimed(self) -> int:
        """Free every adopted body that was not claimed; return the number of these bodies."""
        runs = self._frames.used_runs(self._half)
        unclaimed = [
            first for first in runs if self.is_body(first) and not self._words[first * 4 + 2]
        ]
        for number, first in enumerate(unclaimed):
            self.free(first * self._page_size)
            if not number & _SOME:
                self._frames.alive()
        return len(unclaimed)

    # Totals and checks.

    @abstractmethod
    def used_frames(self) -> int:
        """Return the number of frames held."""

    @abstractmethod
    def check(self) -> None:
        """Verify the invariants in the header of the implementation's file.

        Takes seconds for a full pool.

        Raises:
            InvariantError: an invariant does not hold; the message names the run.
        """
