# SPDX-License-Identifier: GPL-2.0-or-later
"""objnodes: the memory of the index, nodes of 64 machine words.

With a populated reserve as pageframes has one.

One anonymous mapping holds all nodes side by side: no Python object a node, no allocation a page,
and a node's address is its number. In the process and not in the arena, since a successor rebuilds
the index from the headers of the stored pages.

Nodes populated so far are [1, populated); those of them never used begin at `fresh`, the free ones
are chained through their first word. `refill` populates more and may block, hence runs off the page
path, in any thread: it only moves the kernel to back memory; `commit` then says that it did.

Invariants: a free node holds zeros but for its chain; a node handed out holds zeros.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from zswapd import counters
from zswapd.errors import ArenaError
from zswapd.pages import ADDRESS_SPACE, round_up

if TYPE_CHECKING:
    from collections.abc import Callable

NODE_SHIFT: Final = 6
NODE_SLOTS: Final = 1 << NODE_SHIFT
NODE_BYTES: Final = NODE_SLOTS * 8
_STEP_BYTES: Final = 1 << 20
_MADV_POPULATE_WRITE: Final = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def nodes_for(pages: int, objects: int) -> int:
    """Return how many nodes the trees of `objects` objects need at most for `pages` pages spread evenly over them."""
    slots = -(-pages // objects)
    nodes = 0
    while slots > 1:
        slots = -(-slots // NODE_SLOTS)
        nodes += slots
    return (nodes + 1) * objects


def _ignore() -> None:
    """Do nothing about a low reserve."""


@dataclass(frozen=True, slots=True)
class ObjnodeStatistics:
    """Nodes in use and in reserve.

    Attributes:
        curr_objnode_count: nodes in use (zcache's name).
        curr_objnode_count_max: the most there ever were.
        reserve: nodes populated and free.
        populated_bytes: memory taken.
        failed_objnode_alloc: requests refused because the reserve was empty.
    """

    curr_objnode_count: int
    curr_objnode_count_max: int
    reserve: int
    populated_bytes: int
    failed_objnode_alloc: int


counters.declare(
    ObjnodeStatistics, cumulative="failed_objnode_alloc", high_water="curr_objnode_count_max"
)


class Objnodes:
    """Nodes by number, 0 meaning none.

    Args:
        capacity: nodes at most.
        reserve: nodes to keep populated and free.
        lenient: come up without the whole first reserve if there is no memory for it; it is
            refilled later.

    Attributes:
        words: all nodes' slots: slot s of node n is `words[n * 64 + s]`.
        used_slots: number of non-zero slots of each node; kept by whoever writes the slots.
        when_low: called once when the reserve falls below its target, from the page path: it may
            set a flag or wake a task, no more. Called again only after a refill, or `rearm`.

    Raises:
        ArenaError: the kernel gives no address space or no memory for the first reserve.
    """

    def __init__(self, capacity: int, *, reserve: int, lenient: bool = False) -> None:
        self.capacity = capacity
        self._reserve_target = min(reserve, capacity)
        length = round_up((capacity + 1) * NODE_BYTES, mmap.PAGESIZE)
        counts = round_up(capacity + 1, mmap.PAGESIZE)
        try:
            self._map = mmap.mmap(-1, length + counts, ADDRESS_SPACE)
        except (OSError, ValueError) as error:
            raise ArenaError(
                f"no address space for {capacity} index nodes: {error}", hint="lower swap.size"
            ) from error
        view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._counts_offset = length
        self.words = view[:length].cast("Q")
        self.used_slots = view[length:]
        self.when_low: Callable[[], None] = _ignore
        self._low_called = False
        self._free = 0
        self._free_count = 0
        self._fresh = 1
        self._populated = 1
        self._in_use = 0
        self._in_use_max = 0
        self._failed = 0
        try:
            while self.wants_refill():
                self.refill_now()
        except ArenaError:
            if not lenient:
                raise

    def alloc(self) -> int:
        """Return the number of a node full of zeros, or 0 when the reserve is empty."""
        node = self._free
        if node:
            self._free = self.words[node << NODE_SHIFT]
            self.words[node << NODE_SHIFT] = 0
            self._free_count -= 1
        elif self._fresh < self._populated:
            node = self._fresh
            self._fresh = node + 1
        else:
            return 0
        if not self._low_called and self.wants_refill():
            self._low_called = True
            self.when_low()
        self._in_use += 1
        if self._in_use > self._in_use_max:
            self._in_use_max = self._in_use
        return node

    def free(self, node: int) -> None:
        """Take back a node whose slots are all zero."""
        self.words[node << NODE_SHIFT] = self._free
        self._free = node
        self._free_count += 1
        self._in_use -= 1

    def count_refusal(self) -> None:
        """Count a put that was turned away because the reserve is too small for the path it may need."""
        self._failed += 1

    @property
    def in_use(self) -> int:
        """Nodes handed out."""
        return self._in_use

    def available(self) -> int:
        """Return how many nodes `alloc` can give before it refuses."""
        return self._free_count + self._populated - self._fresh

    def wants_refill(self) -> bool:
        """Say whether the reserve has fallen below its target and more nodes may be populated."""
        return self.available() < self._reserve_target and self._populated <= self.capacity

    def rearm(self) -> None:
        """Have `when_low` called at the next fall.

        For who was called, and found the reserve full again of freed nodes.
        """
        self._low_called = self.available() < self._reserve_target

    def begin_refill(self) -> tuple[int, int]:
        """Return the nodes to populate next, [first, end)."""
        step = max(_STEP_BYTES // NODE_BYTES, 1)
        return self._populated, min(self._populated + step, self.capacity + 1)

    def refill(self, nodes: tuple[int, int]) -> int:
        """Have the kernel back nodes [first, end) with memory, in any thread.

        Return `end` for `commit`.

        Raises:
            ArenaError: there is no memory.
        """
        first, end = nodes
        self._populate(first * NODE_BYTES, end * NODE_BYTES)
        self._populate(self._counts_offset + first, self._counts_offset + end)
        return end

    def commit(self, end: int) -> None:
        """Put the nodes below `end`, populated by `refill`, into the reserve."""
        self._populated = end
        self._low_called = False

    def refill_now(self) -> None:
        """Populate one step more, blocking: at start.

        Raises:
            ArenaError: there is no memory, or every node there may be is populated.
        """
        nodes = self.begin_refill()
        if nodes[0] >= nodes[1]:
            raise ArenaError(f"the index has no more than {self.capacity} nodes")
        self.commit(self.refill(nodes))

    def _populate(self, start: int, end: int) -> None:
        start -= start % mmap.PAGESIZE
        length = round_up(end, mmap.PAGESIZE) - start
        if _libc.madvise(self._address + start, length, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        # Before Linux 5.14 there is no such advice; nodes then get their memory when they are first
        # used.
        if code != errno.EINVAL:
            raise ArenaError(
                f"no memory for the index: {os.strerror(code)}",
                hint="stores are refused until there is some",
            )

    def statistics(self) -> ObjnodeStatistics:
        """Return a frozen snapshot."""
        return ObjnodeStatistics(
            curr_objnode_count=self._in_use,
            curr_objnode_count_max=self._in_use_max,
            reserve=self.available(),
            populated_bytes=self._populated * (NODE_BYTES + 1),
            failed_objnode_alloc=self._failed,
        )
