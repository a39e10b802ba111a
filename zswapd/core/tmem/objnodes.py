# SPDX-License-Identifier: GPL-2.0-or-later
"""objnodes: the memory of the index, nodes of 64 machine words with a populated reserve.

One anonymous mapping holds all nodes side by side. So a node has no Python object, a page needs no
allocation, and a node's address is its number. The mapping is in the process and not in the arena,
since a successor rebuilds the index from the headers of the stored pages.

The populated nodes are [1, populated). The ones never used begin at `fresh`. Free nodes are chained
through their first word. `refill` populates more. It may block, so it runs off the page path, in
any thread: it only asks the kernel for memory. `commit` then adds the nodes to the reserve.

Invariants: a free node holds zeros except for its chain. A node that is handed out holds zeros.
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
    """Return the largest number of nodes for `pages` pages spread evenly over `objects`."""
    slots = -(-pages // objects)
    nodes = 0
    while slots > 1:
        slots = -(-slots // NODE_SLOTS)
        nodes += slots
    return (nodes + 1) * objects


@dataclass(frozen=True, slots=True)
class ObjnodeStatistics:
    """Nodes in use and in reserve.

    Attributes:
        curr_objnode_count: nodes in use (zcache's name).
        curr_objnode_count_max: the largest value of curr_objnode_count.
        reserve: nodes that are populated and free.
        populated_bytes: memory of all populated nodes.
        failed_objnode_alloc: puts refused because the reserve was too small.
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
    """Index nodes by number; 0 means none.

    Args:
        capacity: nodes at most.
        reserve: nodes to keep populated and free.
        lenient: start even if there is no memory for the whole first reserve; it is refilled later.

    Attributes:
        words: the slots of all nodes. Slot s of node n is `words[n * 64 + s]`.
        used_slots: number of non-zero slots of each node. The writer of a slot keeps it up to date.
        when_low: called once on the page path when the reserve falls below its target. It may only
            set a flag or wake a task. It is called again only after a refill or `rearm`.

    Raises:
        ArenaError: the kernel has no address space, or no memory for the first reserve.
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
        self.when_low: Callable[[], None] = lambda: None
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
        """Return the number of a node full of zeros, or 0 if the reserve is empty."""
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
        """Free a node; all its slots must be zero."""
        self.words[node << NODE_SHIFT] = self._free
        self._free = node
        self._free_count += 1
        self._in_use -= 1

    def count_refusal(self) -> None:
        """Count a put that was refused because the reserve is too small for its path."""
        self._failed += 1

    @property
    def in_use(self) -> int:
        """The number of nodes handed out."""
        return self._in_use

    def available(self) -> int:
        """Return the number of nodes that `alloc` can return before it fails."""
        return self._free_count + self._populated - self._fresh

    def wants_refill(self) -> bool:
        """Return whether the reserve is below its target and more nodes may be populated."""
        return self.available() < self._reserve_target and self._populated <= self.capacity

    def can_grow(self) -> bool:
        """Return whether more nodes may be populated."""
        return self._populated <= self.capacity

    @property
    def populated(self) -> int:
        """The number of populated nodes."""
        return self._populated - 1

    def rearm(self) -> None:
        """Have `when_low` called again at the next fall below the target.

        For a caller that was woken and found the reserve full again with freed nodes.
        """
        self._low_called = self.available() < self._reserve_target

    def begin_refill(self) -> tuple[int, int]:
        """Return the range [first, end) of nodes to populate next."""
        step = max(_STEP_BYTES // NODE_BYTES, 1)
        return self._populated, min(self._populated + step, self.capacity + 1)

    def refill(self, nodes: tuple[int, int]) -> int:
        """Populate the nodes [first, end), in any thread; return `end` for `commit`.

        Raises:
            ArenaError: there is no memory.
        """
        first, end = nodes
        self._populate(first * NODE_BYTES, end * NODE_BYTES)
        self._populate(self._counts_offset + first, self._counts_offset + end)
        return end

    def commit(self, end: int) -> None:
        """Add the nodes below `end`, which `refill` has populated, to the reserve."""
        self._populated = end
        self._low_called = False

    def refill_now(self) -> None:
        """Populate one more step of nodes. It blocks: only for the start.

        Raises:
            ArenaError: there is no memory, or all nodes are populated.
        """
        nodes = self.begin_refill()
        if nodes[0] >= nodes[1]:
            raise ArenaError(f"all {self.capacity} nodes of the index are populated")
        self.commit(self.refill(nodes))

    def _populate(self, start: int, end: int) -> None:
        start -= start % mmap.PAGESIZE
        length = round_up(end, mmap.PAGESIZE) - start
        if _libc.madvise(self._address + start, length, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        # Linux before 5.14 lacks this advice. Nodes then get their memory at their first use.
        if code != errno.EINVAL:
            raise ArenaError(
                f"no memory for the index: {os.strerror(code)}",
                hint="stores are refused until the system has free memory",
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
