# SPDX-License-Identifier: GPL-2.0-or-later
"""What every allocator over page frames offers, as a protocol.

A handle is the object's byte offset in the arena: a machine word, never 0, stable until the object is freed or compaction
reports that it moved. Reading an object through a handle therefore needs no lookup and no copy.

The first eight bytes of an object are its owner's *live word*: `alloc` hands the object out with
that word DEAD (runs.py), the owner makes it another, not 0, when the object is complete, and `free`
makes it DEAD again, in a single store each. A successor process, which finds
the arena without an index, tells live objects from dead ones by it, and so does compaction.

Objects above `max_shared` are the exception. Such a *body* is all its owner's, to the first byte: it may hold a page as a
process wrote it, which could imitate anything. So it has no live word, compaction never moves it, and it outlives a takeover
only if its owner claims it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Allocator(Protocol):
    """Objects of up to a page in frames of one arena.

    Attributes:
        memory: the arena's bytes; `memory[handle : handle + size]` is the object.
        max_size: bytes of the largest object.
        max_shared: bytes of the largest object that shares its frames with others; a larger one is a body.
        longest_run: frames side by side that it takes at most.
        objects_moved: objects that compaction moved since the start.
    """

    memory: memoryview
    max_size: int
    max_shared: int
    longest_run: int
    objects_moved: int

    def alloc(self, size: int) -> int:
        """Return the handle of a new object of at least `size` bytes, or 0 when no frame is free (counted)."""

    def free(self, handle: int) -> None:
        """Give an object back."""

    def view(self, handle: int, size: int) -> memoryview:
        """Return the first `size` bytes of an object, writable, without a copy; valid until it is freed or moved."""

    def compact(self, moved: Callable[[int, int], None], max_moves: int) -> int:
        """Pack objects together so that frames become free.

        Args:
            moved: called with (old handle, new handle) after an object was copied and before the old one is freed.
            max_moves: stop after so many objects.

        Returns:
            Frames set free.
        """

    def adopt(self) -> int:
        """Rebuild everything from the arena, as a successor's first step over adopted frames.

        Every object with a live word and every body is in use afterwards. Returns the number of frames' owners that made no
        sense, which no death causes.
        """

    def each_span(self, found: Callable[[int, int, int], None]) -> None:
        """Call `found` with (handle, bytes, number) of objects in a row, dead ones among them; no bodies.

        All spans together have every object in use that is no body. `found` must not free or allocate.
        """

    def each_object(self, found: Callable[[int, int], None]) -> None:
        """Call `found` with (handle, bytes of room) of every object in use that is no body; it must not free or allocate."""

    def claim(self, body: int) -> bool:
        """Say that an adopted body is in use; return False if there is none, or if it has been claimed."""

    def disclaim(self, body: int) -> None:
        """Take a claim back."""

    def free_unclaimed(self) -> int:
        """Give back every adopted body that nobody has claimed; return how many there were."""

    def touch(self, handle: int) -> None:
        """Say that an object has been used, where the order of use is kept."""

    def oldest_run(self) -> int:
        """Return the first frame of the run not used for longest; 0 if there is none, or no order is kept."""

    def objects_of(self, first: int) -> list[int]:
        """Return the handles of all live objects in the run that begins at a frame; a body is not among them."""

    def free_run(self, first: int) -> None:
        """Give back all objects of the run that begins at a frame, and its frames; it is no body."""

    def used_frames(self) -> int:
        """Return the number of frames held."""

    def freeable_frames(self) -> int:
        """Return the number of frames that compaction would set free."""

    def check(self) -> None:
        """Prove the allocator's invariants; raises InvariantError."""
