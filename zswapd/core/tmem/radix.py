# SPDX-License-Identifier: GPL-2.0-or-later
"""The radix tree of one object: page index to pampd, in nodes of 64 machine words.

A tree of height h covers indexes below 64**h. It grows at the root when an index does not fit. It
shrinks when the root uses only its first slot. Empty nodes are freed at once, so a tree without
pages has no nodes. Values are non-zero words; zero means no value.

Source of the idea: tmem's objnode trees (Dan Magenheimer, 2011), the kernel's radix tree before the
xarray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zswapd.core import crashpoints
from zswapd.core.crashpoints import reach
from zswapd.core.tmem.objnodes import NODE_SHIFT
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.core.tmem.objnodes import Objnodes

_MASK: Final = (1 << NODE_SHIFT) - 1
MAX_NEW_NODES: Final = 12
"""Nodes that one `set` needs at most.

They are six levels of growth for a 32-bit index, and a path down.
"""


class Radix:
    """The tree of one object, over nodes that all objects share.

    Attributes:
        pages: values in the tree.
    """

    __slots__ = ("_height", "_nodes", "_root", "pages")

    def __init__(self, nodes: Objnodes) -> None:
        self._nodes = nodes
        self._root = 0
        self._height = 0
        self.pages = 0

    def get(self, index: int) -> int:
        """Return the value at `index`, or 0."""
        shift = self._height * NODE_SHIFT
        if index >> shift:
            return 0
        words = self._nodes.words
        node = self._root
        while shift:
            shift -= NODE_SHIFT
            node = words[node << NODE_SHIFT | index >> shift & _MASK]
            if not node:
                return 0
        return node

    def set(self, index: int, value: int) -> int:
        """Set the value at an index; return the old one, or 0.

        Raises:
            InvariantError: no node was free. The caller must ensure MAX_NEW_NODES before.
        """
        nodes = self._nodes
        words = nodes.words
        if not self._root:
            self._root = self._new_node()
            self._height = max(1, -(-index.bit_length() // NODE_SHIFT))
        while index >> self._height * NODE_SHIFT:
            self._grow()
        shift = (self._height - 1) * NODE_SHIFT
        node = self._root
        while shift:
            slot = node << NODE_SHIFT | index >> shift & _MASK
            child = words[slot]
            if not child:
                child = self._new_node()
                words[slot] = child
                nodes.used_slots[node] += 1
            node = child
            shift -= NODE_SHIFT
        slot = node << NODE_SHIFT | index & _MASK
        old = words[slot]
        words[slot] = value
        if not old:
            nodes.used_slots[node] += 1
            self.pages += 1
        return old

    def _new_node(self) -> int:
        node = self._nodes.alloc()
        if not node:
            raise InvariantError("no index node is free, although one was reserved")
        return node

    def _grow(self) -> None:
        """Put a new root above the tree."""
        root = self._new_node()
        self._nodes.words[root << NODE_SHIFT] = self._root
        self._nodes.used_slots[root] = 1
        self._root = root
        self._height += 1

    def remove(self, index: int) -> int:
        """Remove the value at an index and return it, or 0 if there is none."""
        old = self.get(index)
        if old:
            self.remove_range(index, index, _ignore)
        return old

    def take(self, index: int, value: int) -> bool:
        """Remove the value at `index` if it is `value`; return whether it was.

        This takes one walk unless a node becomes empty.
        """
        shift = self._height * NODE_SHIFT
        if index >> shift:
            return False
        nodes = self._nodes
        words = nodes.words
        slot = leaf = 0
        node = self._root
        while shift:
            shift -= NODE_SHIFT
            leaf = node
            slot = node << NODE_SHIFT | index >> shift & _MASK
            node = words[slot]
            if not node:
                return False
        if node != value:
            return False
        used = nodes.used_slots[leaf]
        if used == 1:
            self.remove_range(index, index, _ignore)
        else:
            words[slot] = 0
            nodes.used_slots[leaf] = used - 1
            self.pages -= 1
        return True

    def remove_range(self, first: int, last: int, removed: Callable[[int], None]) -> int:
        """Remove every value from index `first` to `last`; return the number removed.

        The cost depends on the nodes with values in the range, not on the length of the range.

        Args:
            first: first index of the range.
            last: last index of the range.
            removed: called with each value.
        """
        last = min(last, (1 << self._height * NODE_SHIFT) - 1)
        if not self._root or first > last:
            return 0
        before = self.pages
        if self._clear(self._root, (self._height - 1) * NODE_SHIFT, first, last, removed):
            self._nodes.free(self._root)
            self._root = self._height = 0
        else:
            self._shrink()
        return before - self.pages

    def _clear(
        self, node: int, shift: int, first: int, last: int, removed: Callable[[int], None]
    ) -> bool:
        """Clear indexes first to last, relative to this node's first.

        Returns:
            Whether the node is empty now.
        """
        nodes = self._nodes
        words = nodes.words
        base = node << NODE_SHIFT
        for slot in range(first >> shift, (last >> shift) + 1):
            child = words[base | slot]
            if not child:
                continue
            if not shift:
                self.pages -= 1
                words[base | slot] = 0
                nodes.used_slots[node] -= 1
                removed(child)
                reach(crashpoints.DISCARD_PAGE)
                continue
            start = slot << shift
            low, high = max(first - start, 0), min(last - start, (1 << shift) - 1)
            if self._clear(child, shift - NODE_SHIFT, low, high, removed):
                nodes.free(child)
                words[base | slot] = 0
                nodes.used_slots[node] -= 1
        return not nodes.used_slots[node]

    def _shrink(self) -> None:
        """Drop roots that use only their first slot."""
        nodes = self._nodes
        while (
            self._height > 1
            and nodes.used_slots[self._root] == 1
            and nodes.words[self._root << NODE_SHIFT]
        ):
            root = self._root
            self._root = nodes.words[root << NODE_SHIFT]
            self._height -= 1
            nodes.words[root << NODE_SHIFT] = 0
            nodes.used_slots[root] = 0
            nodes.free(root)

    def items(self) -> Iterator[tuple[int, int]]:
        """Yield (index, value) by ascending index; the tree must not change meanwhile."""
        if self._root:
            yield from self._walk(self._root, (self._height - 1) * NODE_SHIFT, 0)

    def last_of(self, count: int) -> int:
        """Return the index of value number `count` in ascending order, at most that of the last.

        The result is 0 if the tree is empty.
        """
        last = 0
        for item in self.items():
            last = item[0]
            count -= 1
            if count <= 0:
                break
        return last

    def _walk(self, node: int, shift: int, base: int) -> Iterator[tuple[int, int]]:
        words = self._nodes.words
        for slot in range(1 << NODE_SHIFT):
            child = words[node << NODE_SHIFT | slot]
            if child and shift:
                yield from self._walk(child, shift - NODE_SHIFT, base | slot << shift)
            elif child:
                yield base | slot, child

    def check(self) -> int:
        """Verify that counts match slots and no node is empty; return the number of nodes.

        Raises:
            InvariantError: a count is wrong or a node is empty.
        """
        nodes = values = 0
        stack = [(self._root, self._height)] if self._root else []
        while stack:
            node, height = stack.pop()
            nodes += 1
            children = [
                word
                for word in self._nodes.words[node << NODE_SHIFT : (node + 1) << NODE_SHIFT]
                if word
            ]
            if len(children) != self._nodes.used_slots[node] or not children:
                raise InvariantError(
                    f"node {node}: {len(children)} slots in use, {self._nodes.used_slots[node]}"
                    " counted"
                )
            if height > 1:
                stack.extend((child, height - 1) for child in children)
            else:
                values += len(children)
        if values != self.pages:
            raise InvariantError(f"a tree holds {values} pages and counts {self.pages}")
        return nodes


def _ignore(_value: int) -> None:
    """Do nothing with a removed value."""
