# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc: dense storage of compressed pages of any size up to a page.

Objects of one size class share zspages of 1 to N adjacent frames. So an object that crosses a frame
boundary needs no copy. `alloc` takes room from the fullest zspage that has room, so the sparse ones
drain. A zspage goes back to pageframes as soon as its last object is freed. The price of density:
one object can keep N frames in use, and only compaction, which moves objects, frees them.

All data about a zspage is in the frame table's words of its first frame, and no Python object holds
any:

    word 0   state and seal (4 bits) | class number (10) | half (2) | objects in use (16)
    word 1   frames (8 bits) | 1 + number of the first object on the free list, 0 if none (16) |
             the seal's mark (8)
    word 2,3 next and previous zspage in the same fullness group (a full one is on no list).
             For a body, word 2 is 1 when the body was adopted and claimed.

The class of a whole page is that of bodies alone (base.py). Its zspage has one object in one frame,
and neither its live word nor its free list is ever read.

A successor after a death at any instruction relies on this. A zspage counts from its seal until its
frames are freed. `_new_zspage` writes the seal when all live words are DEAD, and freeing the frames
unseals the zspage first. Within a zspage the live words are the truth, and each changes by one
store. `adopt` rebuilds use, free list and groups from them. Compaction writes the live word of a
copy last. So there are two whole objects for a moment, and never half an object.

An object is counted before it becomes live, and is dead before it is counted out. So a death leaves
at most one zspage that counts one object more than it has live objects. A second such zspage is
memory that has changed, and so is a zspage that counts fewer.

Free objects are chained through themselves. The first eight bytes are DEAD (the live word,
base.py). The next eight hold the number of the next free object plus 1, as word 1 does. While the
free list is empty, the objects never used begin at number "objects in use". So a new zspage needs
no free list.

Invariants (`check` verifies them):

- objects in use + free list + never used = objects of the class;
- a zspage with room is in the group for its use, and a full one is in none;
- the counts of objects, zspages and frames agree with the table.

Source of the ideas: zsmalloc (Nitin Gupta, 2012) and its later compaction by fullness group
(Minchan Kim).
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
    LOW_SHIFT,
    MAX_RUN,
    NO_CHAIN,
    PERSISTENT,
    STATE_MASK,
    USED,
    seal_words,
)
from zswapd.core.allocators.sizeclasses import FULLNESS_GROUPS, SizeClass, build_classes
from zswapd.core.crashpoints import reach
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.core.allocators.lru import Lru
    from zswapd.core.allocators.pageframes import PageFrames

ONE_OBJECT: Final = 1 << 16
"""The amount of one object in use in word 0."""
ONE_OBJECT_IN_PAIR: Final = ONE_OBJECT << LOW_SHIFT
"""The amount of one object in use in the 64-bit word that overlays words 0 and 1."""


@dataclass(frozen=True, slots=True)
class ClassStatistics:
    """One line of the class table, with the columns of the kernel's zsmalloc debugfs file.

    Attributes:
        size: bytes of an object.
        by_group: zspages by fullness group, emptiest first, full ones last.
        objects: room for objects in all zspages.
        used_objects: objects in use.
        used_frames: frames held.
        frames_per_zspage: frames of a zspage.
        freeable_frames: frames that compaction would free.
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
    """Counts of the whole pool.

    Attributes:
        objects: objects in use.
        zspages: zspages that exist.
        used_frames: frames of these zspages.
        object_bytes: bytes of the objects in use, at the size of their class.
        failed_alloc: requests refused because pageframes had no run (zcache's name).
        pages_compacted: frames that compaction freed since the start (zram's name).
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


counters.declare(ZsStatistics, cumulative="failed_alloc pages_compacted objects_moved")


class Groups:
    """The zspages of one class: heads and lengths of the fullness groups' lists, and counts."""

    __slots__ = ("heads", "lengths", "mask", "objects", "zspages")

    def __init__(self) -> None:
        self.heads = [0] * FULLNESS_GROUPS
        self.lengths = [0] * FULLNESS_GROUPS
        self.mask = 0
        self.objects = 0
        self.zspages = 0


class ZsPool(Allocator):
    """The zsmalloc allocator, for objects of 1 byte to a page.

    Args:
        frames, half, lru: see Allocator.
        max_zspage_frames: longest zspage in frames, 1 to 16. Longer zspages waste less and are
            harder to empty.

    Attributes:
        classes: the size classes, smallest first. The last one is that of bodies.
    """

    def __init__(
        self,
        frames: PageFrames,
        half: int = PERSISTENT,
        lru: Lru | None = None,
        *,
        max_zspage_frames: int = 8,
    ) -> None:
        if not 1 <= max_zspage_frames <= MAX_RUN:
            raise ValueError(f"max_zspage_frames must be 1 to {MAX_RUN}, not {max_zspage_frames}")
        super().__init__(frames, half, lru)
        self._step = frames.page_size // 256
        self.classes, self._class_of = build_classes(frames.page_size, max_zspage_frames)
        self.max_shared = self.classes[-2].size
        self.longest_run = max(size_class.frames for size_class in self.classes)
        self._groups = [Groups() for _ in self.classes]
        self._seals = [seal_words(self._sealed | c.number << 4, c.frames) for c in self.classes]
        self._isolated = 0

    # The page path.

    def alloc(self, size: int) -> int:
        """Return the handle of a new object in the fullest zspage with room (see Allocator)."""
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
        if self._lru is not None and size_class.objects > 1:
            self._lru.touch(first)
        word = first * 4
        used = words[word] >> 16
        chain = words[word + 1]
        number = chain >> CHAIN_SHIFT & CHAIN_MASK
        if number:
            handle = first * self._page_size + (number - 1) * size_class.size
            words[word + 1] = (
                chain & NO_CHAIN | (self._live_words[(handle >> 3) + 1] & CHAIN_MASK) << CHAIN_SHIFT
            )
            reach(crashpoints.OBJECT_OFF_CHAIN)
        else:
            handle = first * self._page_size + used * size_class.size
        words[word] += ONE_OBJECT
        reach(crashpoints.OBJECT_ALLOCATED)
        groups.objects += 1
        new_group = size_class.group_of[used + 1]
        if new_group != group:
            self._unlink(groups, group, first)
            if new_group < FULLNESS_GROUPS:
                self._link(groups, new_group, first)
        return handle

    def free(self, handle: int) -> None:
        """Free an object (see Allocator); a zspage that becomes empty goes to the reserve."""
        first = self._frames.table.first_of(handle // self._page_size)
        words = self._words
        word = first * 4
        state = words[word]
        if state & 0xFFFF & ~OWN_BITS != self._sealed:
            raise InvariantError(f"handle {handle:#x} is freed but lies in no zspage")
        size_class = self.classes[state >> 4 & 0x3FF]
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
            if self._lru is not None and size_class.objects > 1:
                self._lru.remove(first)
            # The live words stay: no successor reads memory outside a zspage.
            reach(crashpoints.ZSPAGE_EMPTY)
            self._frames.free(first)
            return
        # This one store makes the object dead. Any part of the chain update may follow.
        self._live_words[handle >> 3] = DEAD
        reach(crashpoints.OBJECT_DEAD)
        chain = words[word + 1]
        self._live_words[(handle >> 3) + 1] = chain >> CHAIN_SHIFT & CHAIN_MASK
        words[word + 1] = chain & NO_CHAIN | (number + 1) << CHAIN_SHIFT
        words[word] = state - ONE_OBJECT
        reach(crashpoints.OBJECT_FREED)
        new_group = size_class.group_of[used - 1]
        if new_group != group and first != self._isolated:
            if listed:
                self._unlink(groups, group, first)
            self._link(groups, new_group, first)

    def _new_zspage(self, size_class: SizeClass, groups: Groups) -> int:
        """Make an empty zspage in the emptiest group; return its first frame, or 0."""
        first = self._frames.alloc(size_class.frames, self._half)
        if not first:
            self.failed_alloc += 1
            return 0
        reach(crashpoints.ZSPAGE_TAKEN)
        base = first * self._page_size
        # Bytes of an earlier owner may stay, but not in the live words.
        for handle in range(base, base + size_class.objects * size_class.size, size_class.size):
            self._live_words[handle >> 3] = DEAD
        reach(crashpoints.ZSPAGE_CLEARED)
        # The zspage counts from this store on.
        self._pairs[first * 2] = self._seals[size_class.number]
        reach(crashpoints.ZSPAGE_SEALED)
        if self._lru is not None and size_class.objects > 1:
            self._lru.add(first)
        groups.zspages += 1
        self._link(groups, 0, first)
        return first

    def _link(self, groups: Groups, group: int, first: int) -> None:
        words = self._words
        head = groups.heads[group]
        words[first * 4 + 2] = head
        words[first * 4 + 3] = 0
        if head:
            words[head * 4 + 3] = first
        groups.heads[group] = first
        groups.lengths[group] += 1
        groups.mask |= 1 << group

    def _unlink(self, groups: Groups, group: int, first: int) -> None:
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
        groups.lengths[group] -= 1

    # Whole runs.

    def objects_of(self, first: int) -> list[int]:
        """Return the handles of all live objects in a zspage (see Allocator)."""
        return (
            []
            if self.is_body(first)
            else list(self._live_objects(first, self.classes[self._words[first * 4] >> 4 & 0x3FF]))
        )

    def free_run(self, first: int) -> None:
        """Free a zspage with all its objects (see Allocator)."""
        state = self._own_state(first)
        size_class = self.classes[state >> 4 & 0x3FF]
        groups = self._groups[size_class.number]
        used = state >> 16
        group = size_class.group_of[used]
        if group < FULLNESS_GROUPS:
            self._unlink(groups, group, first)
        groups.objects -= used
        groups.zspages -= 1
        if self._lru is not None:
            self._lru.remove(first)
        reach(crashpoints.ZSPAGE_EMPTY)
        self._frames.free(first)

    def _live_objects(self, first: int, size_class: SizeClass) -> Iterator[int]:
        """Yield the handles of a zspage's live objects."""
        base = first * self._page_size
        for handle in range(base, base + size_class.objects * size_class.size, size_class.size):
            if self._live_words[handle >> 3] != DEAD:
                yield handle

    # Compaction.

    def compact(self, moved: Callable[[int, int], None], max_moves: int = 1 << 62) -> int:
        """Empty sparse zspages into fuller ones of their class while that frees frames.

        See Allocator.
        """
        freed = 0
        for size_class, groups in zip(self.classes, self._groups, strict=True):
            while max_moves > 0 and self._freeable(size_class, groups):
                source = groups.heads[(groups.mask & -groups.mask).bit_length() - 1]
                moves = self._empty_zspage(size_class, source, moved, max_moves)
                max_moves -= moves
                self.objects_moved += moves
                if self._words[source * 4] & STATE_MASK == USED:
                    break  # max_moves stopped it before the zspage was empty
                freed += size_class.frames
        self.pages_compacted += freed
        return freed

    def _empty_zspage(
        self, size_class: SizeClass, source: int, moved: Callable[[int, int], None], max_moves: int
    ) -> int:
        """Move the objects of one zspage to the fullest others; return the number of moves."""
        groups = self._groups[size_class.number]
        word = source * 4
        # The zspage is on no list meanwhile, so that `alloc` does not choose it.
        self._unlink(groups, size_class.group_of[self._words[word] >> 16], source)
        self._isolated = source
        moves = 0
        for old in self._live_objects(source, size_class):
            if moves == max_moves:
                break
            new = self.alloc(size_class.size)
            self.memory[new + 8 : new + size_class.size] = self.memory[
                old + 8 : old + size_class.size
            ]
            reach(crashpoints.COMPACT_COPIED)
            self._live_words[new >> 3] = self._live_words[old >> 3]
            reach(crashpoints.COMPACT_ALIVE)
            moved(old, new)
            reach(crashpoints.COMPACT_INDEXED)
            self.free(old)
            reach(crashpoints.COMPACT_FREED)
            moves += 1
        self._isolated = 0
        if self._words[word] & STATE_MASK == USED:
            self._link(groups, size_class.group_of[self._words[word] >> 16], source)
        return moves

    def _freeable(self, size_class: SizeClass, groups: Groups) -> int:
        """Return the number of zspages of a class that fit into the room of the others."""
        return groups.zspages - -(-groups.objects // size_class.objects)

    def freeable_frames(self) -> int:
        """Return the number of frames that compaction would free."""
        return sum(
            self._freeable(c, g) * c.frames for c, g in zip(self.classes, self._groups, strict=True)
        )

    # Adoption by a successor.

    def adopt(self) -> int:
        """Rebuild all state from the sealed zspages and their live words (see Allocator)."""
        words = self._words
        empty: list[int] = []
        for first in self._frames.used_runs(self._half):
            state, chain = words[first * 4], words[first * 4 + 1]
            number = state >> 4 & 0x3FF
            if number >= len(self.classes) or self.classes[number].frames != chain & 255:
                self._found_wrong()
                empty.append(first)
                continue
            size_class = self.classes[number]
            groups = self._groups[number]
            used = self._adopt_zspage(first, size_class)
            reach(crashpoints.TAKEOVER_ZSPAGE)
            if not used:
                empty.append(first)
                continue
            groups.zspages += 1
            groups.objects += used
            if used < size_class.objects:
                self._link(groups, size_class.group_of[used], first)
            if self._lru is not None and size_class.objects > 1:
                self._lru.add(first)
        self._free_empty(empty)
        return self._wrong

    def _adopt_zspage(self, first: int, size_class: SizeClass) -> int:
        """Rebuild use and free list of a zspage from its live words; return the objects in use."""
        live_words, seal = self._live_words, self._seals[size_class.number]
        if size_class.objects == 1:
            self._pairs[first * 2] = seal + ONE_OBJECT_IN_PAIR
            self._words[first * 4 + 2] = 0  # not claimed yet
            return 1
        used = chain = 0
        base, step = first * self._page_size >> 3, size_class.size >> 3
        # One slice for all live words: reading them one by one takes a third longer.
        run: list[int] = live_words[base : base + size_class.objects * step : step].tolist()
        for number in range(size_class.objects - 1, -1, -1):
            life = run[number]
            if life != DEAD if life else self._is_alive(base + number * step):
                used += 1
            elif used:
                live_words[base + number * step + 1] = chain
                chain = number + 1
        counted = self._words[first * 4] >> 16
        if counted == used + 1:
            self._found_unfinished()
        elif counted != used:
            self._found_wrong()
        # Objects behind the last one in use count as never used, so they are not on the free list.
        self._pairs[first * 2] = (
            seal + used * ONE_OBJECT_IN_PAIR + (chain << CHAIN_SHIFT + HIGH_SHIFT)
        )
        return used

    def each_span(self, found: Callable[[int, int, int], None]) -> None:
        """Call `found` with the objects of each zspage (see Allocator)."""
        for first, size_class in self._zspages():
            if size_class.objects > 1:
                found(first * self._page_size, size_class.size, size_class.objects)

    def is_body(self, first: int) -> bool:
        """Return whether a used run holds a body."""
        return self._words[first * 4] & 0xFFFF == self._sealed | self.classes[-1].number << 4

    # Totals and checks.

    def _zspages(self) -> Iterator[tuple[int, SizeClass]]:
        """Yield (first frame, class) of every zspage, from the frame table."""
        for first in self._frames.used_runs(self._half):
            yield first, self.classes[self._words[first * 4] >> 4 & 0x3FF]

    def used_frames(self) -> int:
        """Return the number of frames that zspages hold."""
        return sum(g.zspages * c.frames for c, g in zip(self.classes, self._groups, strict=True))

    def statistics(self) -> ZsStatistics:
        """Return a frozen snapshot, with the class table.

        The time does not depend on the size of the pool.
        """
        rows = []
        for size_class, groups in zip(self.classes, self._groups, strict=True):
            if groups.zspages:
                rows.append(
                    ClassStatistics(
                        size=size_class.size,
                        by_group=(*groups.lengths, groups.zspages - sum(groups.lengths)),
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
            failed_alloc=self.failed_alloc,
            pages_compacted=self.pages_compacted,
            objects_moved=self.objects_moved,
            classes=tuple(rows),
        )

    def _list(self, groups: Groups, group: int) -> Iterator[int]:
        """Yield the zspages of one fullness group, verifying the back links."""
        first, previous = groups.heads[group], 0
        while first:
            if self._words[first * 4 + 3] != previous:
                raise InvariantError(
                    f"zspage at frame {first}: wrong back link in its fullness group"
                )
            yield first
            previous, first = first, self._words[first * 4 + 2]

    def check(self) -> None:
        """Walk all lists and all zspages; verify the invariants in this file's header.

        Never on the page path.

        Raises:
            InvariantError: the message names the zspage or class.
        """
        listed: dict[int, int] = {}
        for groups in self._groups:
            for group in range(FULLNESS_GROUPS):
                if bool(groups.heads[group]) != bool(groups.mask >> group & 1):
                    raise InvariantError(f"fullness group {group}: mask and head disagree")
                zspages_in = list(self._list(groups, group))
                if len(zspages_in) != groups.lengths[group]:
                    raise InvariantError(
                        f"fullness group {group} has {len(zspages_in)} zspages, counts"
                        f" {groups.lengths[group]}"
                    )
                listed.update(dict.fromkeys(zspages_in, group))
        zspages = [0] * len(self.classes)
        objects = [0] * len(self.classes)
        for first, size_class in self._zspages():
            used = self._words[first * 4] >> 16
            group = size_class.group_of[used]
            if listed.pop(first, FULLNESS_GROUPS) != group or not used:
                raise InvariantError(
                    f"zspage at frame {first} with {used} objects is not in group {group}"
                )
            self._check_zspage(first, size_class, used)
            zspages[size_class.number] += 1
            objects[size_class.number] += used
        if listed:
            raise InvariantError(
                f"fullness groups name frames that are no zspages: {sorted(listed)[:5]}"
            )
        self.check_lru(sum(zspages) - zspages[-1])
        for groups, count, used in zip(self._groups, zspages, objects, strict=True):
            if (groups.zspages, groups.objects) != (count, used):
                raise InvariantError(
                    f"a class counts {groups.zspages} zspages, {groups.objects} objects; found"
                    f" {count}, {used}"
                )

    def _check_zspage(self, first: int, size_class: SizeClass, used: int) -> None:
        """Verify that a zspage's free list has all its dead objects, and no others, each once."""
        chain = self._words[first * 4 + 1]
        if chain & 255 != size_class.frames:
            raise InvariantError(
                f"zspage at frame {first} has {chain & 255} frames, its class {size_class.frames}"
            )
        number, free = chain >> CHAIN_SHIFT & CHAIN_MASK, set[int]()
        while number:
            if number in free or number > size_class.objects:
                raise InvariantError(
                    f"zspage at frame {first}: its free list names object {number - 1} wrongly"
                )
            place = first * self._page_size + (number - 1) * size_class.size >> 3
            following = self._live_words[place + 1]
            if self._live_words[place] != DEAD:
                raise InvariantError(
                    f"zspage at frame {first}: object {number - 1} is alive and on the free list"
                )
            free.add(number)
            number = following
        if used + len(free) > size_class.objects or any(
            number > used + len(free) for number in free
        ):
            raise InvariantError(
                f"zspage at frame {first}: {used} objects in use, {len(free)} free of"
                f" {size_class.objects}"
            )
