# SPDX-License-Identifier: GPL-2.0-or-later
"""What all allocators have in common: runs of frames, sealed for one of the two halves, bodies, and the order of their use.

A run that holds nothing but one body (base.py) is known by word 0 of its first frame; word 2 of it is 1 when the body was
adopted and claimed.

The live word of a dead object is DEAD, not 0: memory that has lost what was in it is no dead
object, and no living one.

The order of use is kept only for an allocator that is given a Lru, since it costs a few writes each time: what is ephemeral
needs one to know what to let go of first. Bodies are not in it: nothing in them names their page. To a successor, runs were
used in the order of their frames.
"""

from __future__ import annotations

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
"""The live word of an object that is not in use. As a header, it has this checksum and no
generation, which no store writes."""
_SOME: Final = 0xFF
"""Runs that are given back between two signs of life, less one."""
OWN_BITS: Final = 0x3FF0
"""Bits of the lower half of word 0 that are the allocator's own."""


class Runs:
    """The runs of one allocator.

    Args:
        frames: where runs come from and go to.
        half: whose they are, frametable.PERSISTENT or EPHEMERAL.
        lru: keeps the order in which they were used, if somebody wants to know.

    Attributes:
        memory, max_size, longest_run: see base.Allocator.
        failed_alloc: runs that pageframes did not have.
        pages_compacted, objects_moved: by compaction, since the start.
    """

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

    def view(self, handle: int, size: int) -> memoryview:
        """Return the first `size` bytes of an object, writable, without a copy; valid until it is freed or moved."""
        return self.memory[handle : handle + size]

    # The order of use.

    def touch(self, handle: int) -> None:
        """Say that an object has been used; the allocator was given a Lru."""
        if self._lru is not None:
            self._lru.touch(self._frames.table.first_of(handle // self._page_size))

    def oldest_run(self) -> int:
        """Return the first frame of the run not used for longest; 0 if there is no run or no order."""
        return self._lru.oldest() if self._lru is not None else 0

    def objects_of(self, first: int) -> list[int]:
        """Return the handles of all live objects in the run that begins at a frame; a body is not among them."""
        raise NotImplementedError

    def free_run(self, first: int) -> None:
        """Give back all objects of the run that begins at a frame, and its frames.

        Raises:
            InvariantError: it is no run of this pool, or a body.
        """
        raise NotImplementedError

    def _own_state(self, first: int) -> int:
        """Return word 0 of the run that begins at a frame.

        Raises:
            InvariantError: it is no run of this pool, or a body.
        """
        state = self._words[first * 4]
        if state & 0xFFFF & ~OWN_BITS != self._sealed or self.is_body(first):
            raise InvariantError(f"frame {first} begins no run of this pool that has objects")
        return state

    def check_lru(self, runs: int) -> None:
        """Prove the order of use, and that it has all runs but those of bodies, of which there are `runs`.

        Raises:
            InvariantError: it does not.
        """
        if self._lru is None:
            return
        self._lru.check()
        ours = sum(
            self._words[first * 4] & 0xFFFF & ~OWN_BITS == self._sealed and not self.is_body(first) for first in self._lru
        )
        if not ours == runs == self._lru.entries:
            raise InvariantError(f"{runs} runs; the order of use has {self._lru.entries} entries, {ours} of them runs")

    # A successor's beginning.

    def _found_wrong(self) -> None:
        """Count something that no death leaves, and note it before its traces go."""
        self._frames.distrust()
        self._wrong += 1

    def _found_unfinished(self) -> None:
        """Count an object that is dead and counted as living.

        A death in `alloc` or `free` leaves one.
        """
        self._unfinished += 1
        if self._unfinished > 1:
            self._found_wrong()

    def _is_alive(self, place: int) -> bool:
        """Say whether the object whose live word is the arena's 64-bit word at `place` lives.

        0 is what a dead one has in an older arena, which is rewritten here; in others, it is memory
        that has lost its contents.
        """
        life = self._live_words[place]
        if life:
            return life != DEAD
        if not self._frames.arena.is_older:
            self._found_wrong()
        self._live_words[place] = DEAD
        return False

    def _free_empty(self, empty: list[int]) -> None:
        """Give back runs in which nothing was found."""
        for number, first in enumerate(empty):
            self._frames.free(first)
            if not number & _SOME:
                self._frames.alive()

    def each_span(self, found: Callable[[int, int, int], None]) -> None:
        """Call `found` with objects in a row (see base.Allocator)."""
        raise NotImplementedError

    def each_object(self, found: Callable[[int, int], None]) -> None:
        """Call `found` with every object in use that is no body (see base.Allocator)."""

        def found_span(handle: int, size: int, count: int) -> None:
            for place in range(handle, handle + size * count, size):
                if self._live_words[place >> 3] != DEAD:
                    found(place, size)

        self.each_span(found_span)

    # Bodies, after a takeover.

    def is_body(self, first: int) -> bool:
        """Say whether a used run is that of a body."""
        raise NotImplementedError

    def claim(self, body: int) -> bool:
        """Say that an adopted body is in use; return False if there is none, or if it has been claimed."""
        first, remainder = divmod(body, self._page_size)
        if remainder or not self._frames.first_frame <= first < self._frames.end_frame or not self.is_body(first):
            return False
        if self._words[first * 4 + 2]:
            return False
        self._words[first * 4 + 2] = 1
        return True

    def disclaim(self, body: int) -> None:
        """Take a claim back."""
        self._words[body // self._page_size * 4 + 2] = 0

    def free(self, handle: int) -> None:
        """Give an object back."""
        raise NotImplementedError

    def free_unclaimed(self) -> int:
        """Give back every adopted body that nobody has claimed; return how many there were."""
        runs = self._frames.used_runs(self._half)
        unclaimed = [first for first in runs if self.is_body(first) and not self._words[first * 4 + 2]]
        for number, first in enumerate(unclaimed):
            self.free(first * self._page_size)
            if not number & _SOME:
                self._frames.alive()
        return len(unclaimed)
