# SPDX-License-Identifier: GPL-2.0-or-later
"""tmem, transcendent memory: (pool, oid, index) to a page that a back end keeps.

And the rules that keep readers safe.

The rules (docs/coherency.md numbers them; tests hold every back end to them):

- put, put, get gives the second page or none, never the first. The new copy is made before the old
  one goes, so that at no point in time there is neither; when it is refused, the old one is
  flushed, since it is stale from then on.
- after flush_page and flush_object, gets miss;
- after a failed get, gets of that page fail until a put.

tmem does not know what a pampd is. Destroying a pool frees its pages at once; there is nothing to
wait for, since the core runs in one thread and never in the middle of another operation.

Limits: 256 pools; oids of 64 bits (the kernel's 192 carry file handles of exported file systems;
ours are swap types and inode numbers); indexes of 32 bits. Larger ones are refused, never
truncated.

Source of the ideas: tmem (Dan Magenheimer, 2008-2012), in its zcache form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from zswapd import counters
from zswapd.core import crashpoints
from zswapd.core.crashpoints import reach
from zswapd.core.pam.base import MAX_INDEX, MAX_OID, MAX_POOLS, Pam, RejectReason
from zswapd.core.tmem.pool import Pool
from zswapd.core.tmem.radix import MAX_NEW_NODES, Radix
from zswapd.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.core.tmem.objnodes import Objnodes


def _ignore(_pool: int, _oid: int, _index: int) -> None:
    """Note nothing about a page that is flushed."""


@dataclass(frozen=True, slots=True)
class TmemStatistics:
    """The index and what was asked of it, by zcache's names.

    Attributes:
        curr_obj_count, curr_obj_count_max: objects that have pages, now and at most.
        curr_objnode_count, curr_objnode_count_max: index nodes, likewise (the most of either half,
            added up).
        objnode_bytes: memory the nodes take, reserve included.
        objnode_reserve: nodes populated and free.
        failed_objnode_alloc: puts refused because that reserve was empty.
        flush_total, flush_found: pages asked to be flushed, and those that were there; a range
            counts as one.
        flobj_total, flobj_found: likewise for objects.
        failed_pers_puts, failed_eph_puts: puts refused, by kind of pool.
        put_to_flush: refused puts that flushed an older copy.
        replaced: puts that replaced an older copy (zswap's duplicate_entry).
    """

    curr_obj_count: int
    curr_obj_count_max: int
    curr_objnode_count: int
    curr_objnode_count_max: int
    objnode_bytes: int
    objnode_reserve: int
    failed_objnode_alloc: int
    flush_total: int
    flush_found: int
    flobj_total: int
    flobj_found: int
    failed_pers_puts: int
    failed_eph_puts: int
    put_to_flush: int
    replaced: int


counters.declare(
    TmemStatistics,
    cumulative=(
        "failed_objnode_alloc flush_total flush_found flobj_total flobj_found failed_pers_puts "
        "failed_eph_puts put_to_flush replaced"
    ),
    high_water="curr_obj_count_max curr_objnode_count_max",
)


class Tmem:
    """All pools over one set of index nodes.

    Args:
        nodes: memory of the trees.
        ephemeral_nodes: of those in ephemeral pools, if they are not to share it: what a cache
            indexes must not take the last node from swap.

    Attributes:
        when_flushing: called with (pool, oid, index) just before a refused or failed put flushes
            the older copy of its page, so that somebody can note that zeros would be wrong there; a
            death between the two must leave one or the other.
    """

    def __init__(self, nodes: Objnodes, ephemeral_nodes: Objnodes | None = None) -> None:
        self._nodes = nodes
        self._ephemeral_nodes = nodes if ephemeral_nodes is None else ephemeral_nodes
        self._pools: list[Pool | None] = [None] * MAX_POOLS
        self._clients: set[int] = set()
        self.when_flushing: Callable[[int, int, int], None] = _ignore
        self._objects = self._objects_max = 0
        self._flush_total = self._flush_found = self._flobj_total = self._flobj_found = 0
        self._failed_pers_puts = self._failed_eph_puts = self._put_to_flush = self._replaced = 0

    # Clients and pools.

    def new_client(self) -> int:
        """Return the number of a new client, which may own pools."""
        client = max(self._clients, default=-1) + 1
        self._clients.add(client)
        return client

    def destroy_client(self, client: int) -> int:
        """Destroy a client's pools and forget it; return the number of pages flushed."""
        flushed = 0
        for pool in list(self._pools):
            if pool is not None and pool.client == client:
                flushed += self.destroy_pool(pool.number)
        self._clients.discard(client)
        return flushed

    def new_pool(self, client: int, pam: Pam, *, persistent: bool) -> int:
        """Return the number of a new, empty pool.

        Raises:
            ValueError: no such client, or all numbers are taken.
        """
        if client not in self._clients:
            raise ValueError(f"there is no tmem client {client}")
        for number, taken in enumerate(self._pools):
            if taken is None:
                nodes = self._nodes if persistent else self._ephemeral_nodes
                self._pools[number] = Pool(number, client, pam, nodes, persistent=persistent)
                return number
        raise ValueError(f"all {MAX_POOLS} tmem pools are in use")

    def destroy_pool(self, number: int) -> int:
        """Free all pages of a pool and forget it; return how many there were."""
        pool = self._pool(number)
        flushed = sum(self._flush(pool, oid, 0, MAX_INDEX) for oid in list(pool.objects))
        self._pools[number] = None
        return flushed

    def _pool(self, number: int) -> Pool:
        pool = self._pools[number] if 0 <= number < MAX_POOLS else None
        if pool is None:
            raise ValueError(f"there is no tmem pool {number}")
        return pool

    # The page path.

    def put(self, number: int, oid: int, index: int, page: memoryview) -> RejectReason | None:
        """Keep a page under (oid, index), in place of an older copy if there is one.

        Returns:
            None, or why it was refused; then no copy of that page is left, old or new.

        Raises:
            ValueError: no such pool.
        """
        pool = self._pools[number]
        if pool is None:
            raise ValueError(f"there is no tmem pool {number}")
        if not (0 <= index <= MAX_INDEX and 0 <= oid <= MAX_OID):
            return self._refused(pool, RejectReason.INDEX_LIMIT)
        tree = pool.objects.get(oid)
        old = tree.get(index) if tree is not None else 0
        if not old and pool.nodes.available() < MAX_NEW_NODES:
            pool.nodes.count_refusal()
            return self._refused(pool, RejectReason.FAILED_OBJNODE)
        pampd = 0
        try:
            pampd = pool.pam.create(number, oid, index, page, replacing=old != 0)
        finally:
            # Refused or failed, the writer learns of it: what it wanted to replace is stale.
            if pampd <= 0:
                self._drop_stale(pool, oid, index, old)
        if pampd < 0:
            return self._refused(pool, RejectReason(-pampd))
        if tree is None:
            tree = pool.objects[oid] = Radix(pool.nodes)
            self._objects += 1
            if self._objects > self._objects_max:
                self._objects_max = self._objects
        tree.set(index, pampd)
        if old:
            self._replaced += 1
            reach(crashpoints.STORE_INDEXED)
            pool.pam.free(old)
            reach(crashpoints.STORE_REPLACED)
        else:
            pool.pages += 1
        return None

    def _drop_stale(self, pool: Pool, oid: int, index: int, old: int) -> None:
        if old:
            self._put_to_flush += 1
            self.when_flushing(pool.number, oid, index)
            reach(crashpoints.REFUSED_MARKED)
            self._flush(pool, oid, index, index)
            reach(crashpoints.REFUSED_FLUSHED)

    def _refused(self, pool: Pool, reason: RejectReason) -> RejectReason:
        if pool.persistent:
            self._failed_pers_puts += 1
        else:
            self._failed_eph_puts += 1
        return reason

    def get(self, number: int, oid: int, index: int, out: memoryview) -> bool:
        """Write the page under (oid, index) into `out`, which keeps it.

        Return False, `out` untouched, if there is none.

        Raises:
            CorruptedPageError: there is one, but damaged.
            ValueError: no such pool.
        """
        pool = self._pools[number]
        if pool is None:
            raise ValueError(f"there is no tmem pool {number}")
        tree = pool.objects.get(oid)
        pampd = tree.get(index) if tree is not None else 0
        if not pampd:
            return False
        pool.pam.get(pampd, oid, index, out)
        return True

    def flush_page(self, number: int, oid: int, index: int) -> bool:
        """Free the page under (oid, index); return whether there was one."""
        return self.flush_range(number, oid, index, index) > 0

    def flush_range(self, number: int, oid: int, first: int, last: int) -> int:
        """Free the pages of an object from index `first` to `last`; return how many there were."""
        self._flush_total += 1
        flushed = self._flush(self._pool(number), oid, first, last)
        self._flush_found += flushed
        return flushed

    def flush_object(self, number: int, oid: int) -> int:
        """Free all pages of an object; return how many there were."""
        self._flobj_total += 1
        flushed = self._flush(self._pool(number), oid, 0, MAX_INDEX)
        self._flobj_found += flushed > 0
        return flushed

    def flush_some(self, number: int, count: int) -> int:
        """Free up to `count` pages of a pool, whichever come first; return how many.

        Costs what is there, wherever it is.
        """
        pool = self._pool(number)
        flushed = 0
        for oid in list(islice(pool.objects, count)):
            if flushed >= count:
                break
            flushed += self._flush(pool, oid, 0, pool.objects[oid].last_of(count - flushed))
        self._flush_total += 1
        self._flush_found += flushed
        return flushed

    def _flush(self, pool: Pool, oid: int, first: int, last: int) -> int:
        tree = pool.objects.get(oid)
        if tree is None:
            return 0
        flushed = tree.remove_range(first, last, pool.pam.free)
        pool.pages -= flushed
        if not tree.pages:
            del pool.objects[oid]
            self._objects -= 1
        return flushed

    # A successor's beginning.

    def adopt_page(self, number: int, oid: int, index: int, pampd: int) -> int:
        """Take in a page that its back end already keeps, if nothing is there.

        Returns:
            0, or the pampd that is there and stays.

        Raises:
            ArenaError: no memory for the index.
            ValueError: no such pool.
        """
        pool = self._pool(number)
        tree = pool.objects.get(oid)
        if pool.nodes.available() < MAX_NEW_NODES:
            pool.nodes.refill_now()
        if tree is None:
            tree = pool.objects[oid] = Radix(pool.nodes)
            self._objects += 1
            self._objects_max = self._objects
        old = tree.set(index, pampd)
        if old:
            tree.set(index, old)
            return old
        pool.pages += 1
        return 0

    # Off the page path.

    def find(self, number: int, oid: int, index: int) -> int:
        """Return the pampd of a page, or 0."""
        tree = self._pool(number).objects.get(oid)
        return tree.get(index) if tree is not None else 0

    def forget(self, number: int, oid: int, index: int, pampd: int) -> bool:
        """Take a page out of the index if it is just this pampd, which the caller then frees.

        Return whether it was.

        This is how a back end evicts. A pool, object or page that does not exist is none; nothing
        is counted as flushed.
        """
        pool = self._pools[number] if 0 <= number < MAX_POOLS else None
        tree = pool.objects.get(oid) if pool is not None else None
        if pool is None or tree is None or not tree.take(index, pampd):
            return False
        pool.pages -= 1
        if not tree.pages:
            del pool.objects[oid]
            self._objects -= 1
        return True

    def replace(self, number: int, oid: int, index: int, expected: int, pampd: int) -> bool:
        """Let another pampd stand for a page, if `expected` still does.

        The caller frees whichever is left over.

        This is how a page moves (compaction) or changes its form without anybody reading stale
        data.
        """
        tree = self._pool(number).objects.get(oid)
        if tree is None or tree.get(index) != expected:
            return False
        tree.set(index, pampd)
        return True

    def compact(self, pam: Pam, max_moves: int = 1 << 62) -> int:
        """Have a back end pack its pages together, and follow it; return the frames set free.

        Raises:
            InvariantError: a page moved that no index names.
        """

        def moved(pool: int, oid: int, index: int, old: int, new: int) -> None:
            if not self.replace(pool, oid, index, old, new):
                raise InvariantError(
                    f"page {index} of object {oid:#x} in pool {pool} moved, but the index does not"
                    " name it"
                )

        return pam.compact(moved, max_moves)

    def pampds(self, pam: Pam) -> Iterator[int]:
        """Yield the pampd of every page that a back end keeps."""
        for pool in self._pools:
            if pool is not None and pool.pam is pam:
                for tree in pool.objects.values():
                    yield from (pampd for _index, pampd in tree.items())

    def pool_pages(self, number: int) -> int:
        """Return the number of pages in a pool."""
        return self._pool(number).pages

    def object_pages(self, number: int, oid: int) -> int:
        """Return the number of pages of an object; 0 if there is none."""
        tree = self._pool(number).objects.get(oid)
        return tree.pages if tree is not None else 0

    def statistics(self) -> TmemStatistics:
        """Return a frozen snapshot."""
        all_nodes = [nodes.statistics() for nodes in self._both_nodes()]
        return TmemStatistics(
            curr_obj_count=self._objects,
            curr_obj_count_max=self._objects_max,
            curr_objnode_count=sum(nodes.curr_objnode_count for nodes in all_nodes),
            curr_objnode_count_max=sum(nodes.curr_objnode_count_max for nodes in all_nodes),
            objnode_bytes=sum(nodes.populated_bytes for nodes in all_nodes),
            objnode_reserve=sum(nodes.reserve for nodes in all_nodes),
            failed_objnode_alloc=sum(nodes.failed_objnode_alloc for nodes in all_nodes),
            flush_total=self._flush_total,
            flush_found=self._flush_found,
            flobj_total=self._flobj_total,
            flobj_found=self._flobj_found,
            failed_pers_puts=self._failed_pers_puts,
            failed_eph_puts=self._failed_eph_puts,
            put_to_flush=self._put_to_flush,
            replaced=self._replaced,
        )

    def _both_nodes(self) -> tuple[Objnodes, ...]:
        return (
            (self._nodes,)
            if self._ephemeral_nodes is self._nodes
            else (self._nodes, self._ephemeral_nodes)
        )

    def check(self) -> None:
        """Prove all pools, and that every index node in use belongs to a tree.

        Never on the page path.

        Raises:
            InvariantError: naming what is wrong.
        """
        pools = [pool for pool in self._pools if pool is not None]
        for nodes in self._both_nodes():
            held = sum(pool.check() for pool in pools if pool.nodes is nodes)
            if held != nodes.in_use:
                raise InvariantError(f"trees hold {held} nodes, {nodes.in_use} are handed out")
        if sum(len(pool.objects) for pool in pools) != self._objects:
            raise InvariantError(f"{self._objects} objects counted")
