# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc: dense storage of compressed pages of any size up to a page.

Objects of one size class share zspages of 1 to N frames that lie side by side, so an object that crosses a frame needs no
copy. Room is taken from the fullest zspage that has some, which leaves the sparse ones to drain. A zspage whose last object
goes is given back to pageframes at once. Density comes at a price: one object can keep N frames alive, and only compaction,
which moves objects, gets them back.

Everything about a zspage is in the frame table's words of its first frame, nothing in Python objects:

    word 0   state (4 bits) | class number (12) | objects in use (16)
    word 1   frames (8 bits) | 1 + number of the first object on the free list, 0 if none (16)
    word 2,3 next and previous zspage in the same fullness group (the full ones are on no list)

Free objects are chained through themselves: the first eight bytes are zero (the word of life, base.py), the next eight hold
the chain in the same form as word 1. While the free list is empty, the objects never used so far begin at "objects in use",
so no zspage has to be threaded when it is made.

Invariants (`check` proves them): objects in use + free list + never used = objects of the class; a zspage with room is in the
group that its use says and a full or empty one in none; the counts of objects, zspages and frames agree with the table.

Source of the ideas: zsmalloc (Nitin Gupta, 2012) and its later compaction by fullness group (Minchan Kim).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zswapd.allocators.frametable import MAX_RUN, STATE_MASK, USED
from zswapd.allocators.sizeclasses import FULLNESS_GROUPS, SizeClass, build_classes
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.allocators.pageframes import PageFrames

_QQ = struct.Struct("=QQ")
_Q = struct.Struct("=Q")
_MAX_PAGE = 64 << 10
_ONE_OBJECT = 1 << 16


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """One line of the class table, in the columns of the kernel's zsmalloc debugfs file.

    Attributes:
        size: bytes an object.
        by_group: zspages by fullness group, emptiest first; the full ones last.
        objects: room for objects in all zspages.
        used_objects: objects in use.
        used_frames: frames held.
        frames_per_zspage: frames a zspage.
        freeable_frames: frames that compaction would set free.
    """

    size: int
    by_group: tuple[int, ...]
    objects: int
    used_objects: int
    used_frames: int
    frames_per_zspage: int
    freeable_frames: int


@dataclass(frozen=True, slots=True)
class ZsStatistics:
    """The pool as a whole.

    Attributes:
        objects: objects in use.
        zspages: zspages that exist.
        used_frames: frames they hold.
        object_bytes: bytes of the objects in use, at their class's size.
        failed_alloc: requests refused because pageframes had no run (zcache's name).
        pages_compacted: frames that compaction set free since the start (zram's name).
        objects_moved: objects that compaction moved since the start.
        classes: the class table, without classes that hold nothing.
    """

    objects: int
    zspages: int
    used_frames: int
    object_bytes: int
    failed_alloc: int
    pages_compacted: int
    objects_moved: int
    classes: tuple[ClassStatistics, ...]


class _Groups:
    """The zspages of one class: heads of the fullness groups' lists, and counts."""

    __slots__ = ("heads", "mask", "objects", "zspages")

    def __init__(self) -> None:
        self.heads = [0] * FULLNESS_GROUPS
        self.mask = 0
        self.objects = 0
        self.zspages = 0


class ZsPool:
    """A pool of objects of 1 byte to a page.

    Args:
        frames: where zspages come from and go to.
        max_zspage_frames: longest zspage in frames, 1 to 16. Longer ones waste less and are harder to empty.

    Attributes:
        objects_moved: objects that compaction moved since the start.
    """

    def __init__(self, frames: PageFrames, *, max_zspage_frames: int = 8) -> None:
        if not 1 <= max_zspage_frames <= MAX_RUN:
            raise ValueError(f"max_zspage_frames must be 1 to {MAX_RUN}, not {max_zspage_frames}")
        if not 4096 <= frames.page_size <= _MAX_PAGE:
            raise ValueError(f"pages of {frames.page_size} bytes do not fit the words of a zspage")
        self.memory = frames.arena.view
        self.max_size = frames.page_size
        self._frames = frames
        self._words = frames.table.words
        self._page_size = frames.page_size
        self._step = frames.page_size // 256
        self.classes, self._class_of = build_classes(frames.page_size, max_zspage_frames)
        self._groups = [_Groups() for _ in self.classes]
        self._isolated = 0
        self._failed_alloc = 0
        self._pages_compacted = 0
        self.objects_moved = 0

    # The page path.

    def alloc(self, size: int) -> int:
        """Return the handle of a new object of at least `size` bytes, its first eight zero; 0 when no frame is free (counted).

        Raises:
            ValueError: `size` is not between 1 byte and a page.
        """
        if not 0 < size <= self._page_size:
            raise ValueError(f"an object of {size} bytes does not fit a page of {self._page_size}")
        size_class = self.classes[self._class_of[(size + self._step - 1) // self._step]]
        groups = self._groups[size_class.number]
        words = self._words
        if groups.mask:
            group = groups.mask.bit_length() - 1
            first = groups.heads[group]
        else:
            first = self._new_zspage(size_class, groups)
            if not first:
                return 0
            group = 0
        word = first * 4
        used = words[word] >> 16
        chain = words[word + 1]
        if chain > 255:
            handle = first * self._page_size + ((chain >> 8) - 1) * size_class.size
            words[word + 1] = chain & 255 | _Q.unpack_from(self.memory, handle + 8)[0] << 8
        else:
            handle = first * self._page_size + used * size_class.size
        words[word] += _ONE_OBJECT
        groups.objects += 1
        new_group = size_class.group_of[used + 1]
        if new_group != group:
            self._unlink(groups, group, first)
            if new_group < FULLNESS_GROUPS:
                self._link(groups, new_group, first)
        return handle

    def free(self, handle: int) -> None:
        """Give an object back; frames that become empty go to the reserve.

        Raises:
            InvariantError: the handle is not that of an object of this pool.
        """
        first = self._frames.table.first_of(handle // self._page_size)
        words = self._words
        word = first * 4
        state = words[word]
        if state & STATE_MASK != USED:
            raise InvariantError(f"handle {handle:#x} is freed but lies in no zspage")
        size_class = self.classes[state >> 4 & 0xFFF]
        groups = self._groups[size_class.number]
        used = state >> 16
        group = size_class.group_of[used]
        number, remainder = divmod(handle - first * self._page_size, size_class.size)
        if remainder:
            raise InvariantError(f"handle {handle:#x} is freed but no object begins there")
        groups.objects -= 1
        listed = group < FULLNESS_GROUPS and first != self._isolated
        if used == 1:
            if listed:
                self._unlink(groups, group, first)
            groups.zspages -= 1
            # Its words of life stay as they are: what is not in a zspage is not looked at.
            self._frames.free(first)
            return
        chain = words[word + 1]
        _QQ.pack_into(self.memory, handle, 0, chain >> 8)
        words[word + 1] = chain & 255 | (number + 1) << 8
        words[word] = state - _ONE_OBJECT
        new_group = size_class.group_of[used - 1]
        if new_group != group and first != self._isolated:
            if listed:
                self._unlink(groups, group, first)
            self._link(groups, new_group, first)

    def view(self, handle: int, size: int) -> memoryview:
        """Return the first `size` bytes of an object, writable, without a copy; valid until it is freed or moved."""
        return self.memory[handle : handle + size]

    def _new_zspage(self, size_class: SizeClass, groups: _Groups) -> int:
        """Make an empty zspage and put it into the emptiest group; return its first frame, or 0."""
        first = self._frames.alloc(size_class.frames)
        if not first:
            self._failed_alloc += 1
            return 0
        self._words[first * 4] |= size_class.number << 4
        base = first * self._page_size
        # The frames may hold what an earlier owner left; only the words of life must not.
        for handle in range(base, base + size_class.objects * size_class.size, size_class.size):
            _Q.pack_into(self.memory, handle, 0)
        groups.zspages += 1
        self._link(groups, 0, first)
        return first

    def _link(self, groups: _Groups, group: int, first: int) -> None:
        words = self._words
        head = groups.heads[group]
        words[first * 4 + 2] = head
        words[first * 4 + 3] = 0
        if head:
            words[head * 4 + 3] = first
        groups.heads[group] = first
        groups.mask |= 1 << group

    def _unlink(self, groups: _Groups, group: int, first: int) -> None:
        words = self._words
        following, previous = words[first * 4 + 2], words[first * 4 + 3]
        if previous:
            words[previous * 4 + 2] = following
        else:
            groups.heads[group] = following
            if not following:
                groups.mask &= ~(1 << group)
        if following:
            words[following * 4 + 3] = previous

    # Off the page path.

    def compact(self, moved: Callable[[int, int], None], max_moves: int = 1 << 62) -> int:
        """Empty sparse zspages into fuller ones of their class, as long as that sets frames free.

        Args:
            moved: called with (old handle, new handle) after an object was copied and before the old one is freed.
            max_moves: stop after so many objects, so that a caller can bound the time.

        Returns:
            Frames set free.
        """
        freed = 0
        for size_class, groups in zip(self.classes, self._groups, strict=True):
            while max_moves > 0 and self._freeable(size_class, groups):
                source = groups.heads[(groups.mask & -groups.mask).bit_length() - 1]
                moves = self._empty_zspage(size_class, source, moved, max_moves)
                max_moves -= moves
                self.objects_moved += moves
                if self._words[source * 4] & STATE_MASK == USED:
                    break  # stopped by max_moves in the middle of it
                freed += size_class.frames
        self._pages_compacted += freed
        return freed

    def _freeable(self, size_class: SizeClass, groups: _Groups) -> int:
        """Return how many zspages of a class the others have room for."""
        return groups.zspages - -(-groups.objects // size_class.objects)

    def _empty_zspage(self, size_class: SizeClass, source: int, moved: Callable[[int, int], None], max_moves: int) -> int:
        """Move the objects of one zspage to the fullest others; return how many were moved."""
        groups = self._groups[size_class.number]
        word = source * 4
        # On no list, so that its objects cannot land in itself.
        self._unlink(groups, size_class.group_of[self._words[word] >> 16], source)
        self._isolated = source
        moves = 0
        for old in self._live_objects(source, size_class):
            if moves == max_moves:
                break
            new = self.alloc(size_class.size)
            self.memory[new : new + size_class.size] = self.memory[old : old + size_class.size]
            moved(old, new)
            self.free(old)
            moves += 1
        self._isolated = 0
        if self._words[word] & STATE_MASK == USED:
            self._link(groups, size_class.group_of[self._words[word] >> 16], source)
        return moves

    def _live_objects(self, first: int, size_class: SizeClass) -> Iterator[int]:
        """Yield the handles of a zspage's objects whose word of life is not zero."""
        base = first * self._page_size
        for handle in range(base, base + size_class.objects * size_class.size, size_class.size):
            if _Q.unpack_from(self.memory, handle)[0]:
                yield handle

    def _zspages(self) -> Iterator[tuple[int, SizeClass]]:
        """Yield (first frame, class) of every zspage, from the frame table."""
        for first in self._frames.used_runs():
            yield first, self.classes[self._words[first * 4] >> 4 & 0xFFF]

    def used_frames(self) -> int:
        """Return the number of frames that zspages hold."""
        return sum(g.zspages * c.frames for c, g in zip(self.classes, self._groups, strict=True))

    def freeable_frames(self) -> int:
        """Return the number of frames that compaction would set free."""
        return sum(self._freeable(c, g) * c.frames for c, g in zip(self.classes, self._groups, strict=True))

    def statistics(self) -> ZsStatistics:
        """Return a frozen snapshot, with the class table."""
        rows = []
        for size_class, groups in zip(self.classes, self._groups, strict=True):
            if groups.zspages:
                rows.append(
                    ClassStatistics(
                        size=size_class.size,
                        by_group=self._count_groups(size_class, groups),
                        objects=groups.zspages * size_class.objects,
                        used_objects=groups.objects,
                        used_frames=groups.zspages * size_class.frames,
                        frames_per_zspage=size_class.frames,
                        freeable_frames=self._freeable(size_class, groups) * size_class.frames,
                    )
                )
        return ZsStatistics(
            objects=sum(row.used_objects for row in rows),
            zspages=sum(groups.zspages for groups in self._groups),
            used_frames=sum(row.used_frames for row in rows),
            object_bytes=sum(row.used_objects * row.size for row in rows),
            failed_alloc=self._failed_alloc,
            pages_compacted=self._pages_compacted,
            objects_moved=self.objects_moved,
            classes=tuple(rows),
        )

    def _list(self, groups: _Groups, group: int) -> Iterator[int]:
        """Yield the zspages of one fullness group, proving the back links."""
        first, previous = groups.heads[group], 0
        while first:
            if self._words[first * 4 + 3] != previous:
                raise InvariantError(f"zspage at frame {first}: wrong back link in its fullness group")
            yield first
            previous, first = first, self._words[first * 4 + 2]

    def _count_groups(self, size_class: SizeClass, groups: _Groups) -> tuple[int, ...]:
        counts = [sum(1 for _ in self._list(groups, group)) for group in range(FULLNESS_GROUPS)]
        return (*counts, groups.zspages - sum(counts))

    def check(self) -> None:
        """Walk all lists and all zspages and prove the invariants named in this file's header. Never on the page path.

        Raises:
            InvariantError: naming the zspage or class that is wrong.
        """
        listed: dict[int, int] = {}
        for groups in self._groups:
            for group in range(FULLNESS_GROUPS):
                if bool(groups.heads[group]) != bool(groups.mask >> group & 1):
                    raise InvariantError(f"fullness group {group}: mask and head disagree")
                listed.update((first, group) for first in self._list(groups, group))
        zspages = [0] * len(self.classes)
        objects = [0] * len(self.classes)
        for first, size_class in self._zspages():
            used = self._words[first * 4] >> 16
            group = size_class.group_of[used]
            if listed.pop(first, FULLNESS_GROUPS) != group or not used:
                raise InvariantError(f"zspage at frame {first} with {used} objects is not in group {group}")
            self._check_zspage(first, size_class, used)
            zspages[size_class.number] += 1
            objects[size_class.number] += used
        if listed:
            raise InvariantError(f"fullness groups name frames that are no zspages: {sorted(listed)[:5]}")
        for groups, count, used in zip(self._groups, zspages, objects, strict=True):
            if (groups.zspages, groups.objects) != (count, used):
                raise InvariantError(
                    f"a class counts {groups.zspages} zspages, {groups.objects} objects; found {count}, {used}"
                )

    def _check_zspage(self, first: int, size_class: SizeClass, used: int) -> None:
        """Prove that a zspage's free list holds dead objects only, each once, and that the counts leave none out."""
        chain = self._words[first * 4 + 1]
        if chain & 255 != size_class.frames:
            raise InvariantError(f"zspage at frame {first} has {chain & 255} frames, its class {size_class.frames}")
        number, free = chain >> 8, set[int]()
        while number:
            if number in free or number > size_class.objects:
                raise InvariantError(f"zspage at frame {first}: its free list names object {number - 1} wrongly")
            life, following = _QQ.unpack_from(self.memory, first * self._page_size + (number - 1) * size_class.size)
            if life:
                raise InvariantError(f"zspage at frame {first}: object {number - 1} is alive and on the free list")
            free.add(number)
            number = following
        if used + len(free) > size_class.objects or any(number > used + len(free) for number in free):
            raise InvariantError(f"zspage at frame {first}: {used} objects in use, {len(free)} free of {size_class.objects}")
