# SPDX-License-Identifier: GPL-2.0-or-later
"""zsmalloc: dense storage of compressed pages of any size up to a page.

Objects of one size class share zspages of 1 to N frames that lie side by side, so an object that crosses a frame needs no
copy. Room is taken from the fullest zspage that has some, which leaves the sparse ones to drain. A zspage whose last object
goes is given back to pageframes at once. Density comes at a price: one object can keep N frames alive, and only compaction,
which moves objects, gets them back.

The words that describe a zspage, and what a successor process makes of them, are zspages.py's business. The order in which they
are written here is what that relies on.

Source of the ideas: zsmalloc (Nitin Gupta, 2012) and its later compaction by fullness group (Minchan Kim).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zswapd.core import crashpoints
from zswapd.core.allocators.frametable import CHAIN_MASK, CHAIN_SHIFT, NO_CHAIN, STATE_MASK, USED
from zswapd.core.allocators.runs import DEAD, OWN_BITS
from zswapd.core.allocators.sizeclasses import FULLNESS_GROUPS, SizeClass
from zswapd.core.allocators.zspages import ONE_OBJECT, Groups, Zspages
from zswapd.core.crashpoints import reach
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable


class ZsPool(Zspages):
    """A pool of objects of 1 byte to a page (see Runs and Zspages for arguments and attributes)."""

    # The page path.

    def alloc(self, size: int) -> int:
        """Return the handle of a new object of at least `size` bytes, its first eight DEAD.

        0 when no frame is free (counted).

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
        if self._lru is not None and size_class.objects > 1:
            self._lru.touch(first)
        word = first * 4
        used = words[word] >> 16
        chain = words[word + 1]
        number = chain >> CHAIN_SHIFT & CHAIN_MASK
        if number:
            handle = first * self._page_size + (number - 1) * size_class.size
            words[word + 1] = chain & NO_CHAIN | (self._live_words[(handle >> 3) + 1] & CHAIN_MASK) << CHAIN_SHIFT
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
        """Give an object back; frames that become empty go to the reserve.

        Raises:
            InvariantError: the handle is not that of an object of this pool.
        """
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
            # Its live words stay as they are: what is not in a zspage is not looked at.
            reach(crashpoints.ZSPAGE_EMPTY)
            self._frames.free(first)
            return
        # Dead by this one store; what the chain takes of it later does not matter any more.
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
        """Make an empty zspage and put it into the emptiest group; return its first frame, or 0."""
        first = self._frames.alloc(size_class.frames, self._half)
        if not first:
            self.failed_alloc += 1
            return 0
        reach(crashpoints.ZSPAGE_TAKEN)
        base = first * self._page_size
        # The frames may hold what an earlier owner left; only the live words must not.
        for handle in range(base, base + size_class.objects * size_class.size, size_class.size):
            self._live_words[handle >> 3] = DEAD
        reach(crashpoints.ZSPAGE_CLEARED)
        # From here on it counts.
        self._pairs[first * 2] = self._seals[size_class.number]
        reach(crashpoints.ZSPAGE_SEALED)
        if self._lru is not None and size_class.objects > 1:
            self._lru.add(first)
        groups.zspages += 1
        self._link(groups, 0, first)
        return first

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
        self.pages_compacted += freed
        return freed

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
            self.memory[new + 8 : new + size_class.size] = self.memory[old + 8 : old + size_class.size]
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
