# SPDX-License-Identifier: GPL-2.0-or-later
"""tmem, transcendent memory: the index from (pool, oid, index) to pages of a back end.

These rules keep readers safe. docs/coherency.md numbers them, and tests hold every back end to
them:

- put, put, get returns the second page or none, never the first. The new copy is made before the
  old one is freed, so at every moment there is at least one. If the put is refused, the old copy is
  flushed, since it is stale from then on.
- After flush_page and flush_object, gets miss.
- After a failed get, gets of that page fail until a put.

A pampd is opaque to tmem. Destroying a pool frees its pages at once. Nothing has to be waited for,
since the core runs in one thread and completes each operation before the next.

Limits: 256 pools, oids of 64 bits, indexes of 32 bits. Larger ones are refused, never truncated.
The kernel's oids have 192 bits for file handles of exported file systems. Oids here are swap types
and inode numbers.

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
    """Do nothing about a page that is flushed."""


@dataclass(frozen=True, slots=True)
class TmemStatistics:
    """Counts of the index and of its operations, with zcache's names.

    Attributes:
        curr_obj_count, curr_obj_count_max: objects with pages, now and at most.
        curr_objnode_count, curr_objnode_count_max: index nodes in use, now and at most. The latter
            adds the largest values of both halves.
        objnode_bytes: memory of the nodes, reserve included.
        objnode_reserve: nodes that are populated and free.
        failed_objnode_alloc: puts refused because that reserve was empty.
        flush_total, flush_found: flushes of pages or ranges, and pages that were flushed by them. A
            range counts as one in flush_total.
        flobj_total, flobj_found: flushes of objects, and those that found pages.
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
    """All pools, over one or two sets of index nodes.

    Args:
        nodes: memory of the trees.
        ephemeral_nodes: memory of the trees in ephemeral pools; `nodes` by default. A cache with
            its own nodes cannot take the last node from swap.

    Attributes:
        when_flushing: called with (pool, oid, index) just before a refused or failed put flushes
            the older copy of its page. The callee can note that zeros would be wrong there. So a
            death between the two leaves the old copy or the note.
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
        """Destroy the pools of a client and forget it; return the number of pages flushed."""
        flushed = 0
        for pool in list(self._pools):
            if pool is not None and pool.client == client:
                flushed += self.destroy_pool(pool.number)
        self._clients.discard(client)
        return flushed

    def new_pool(self, client: int, pam: Pam, *, persistent: bool) -> int:
        """Return the number of a new, empty pool.

        Raises:
            ValueError: there is no such client, or all pool numbers are in use.
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
        """Free all pages of a pool and forget it; return the number of pages."""
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
            None, or the reason for refusing it. After a refusal neither an old nor a new copy of
            the page is left.

        Raises:
            ValueError: there is no such pool.
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
            # The writer learns of a refusal or failure, so the older copy is stale.
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
        """Write the page under (oid, index) into `out`; the page stays.

        Returns:
            False if there is no page. `out` is unchanged then.

        Raises:
            CorruptedPageError: the page is damaged.
            ValueError: there is no such pool.
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
        """Free the pages of an object from index `first` to `last`; return their number."""
        self._flush_total += 1
        flushed = self._flush(self._pool(number), oid, first, last)
        self._flush_found += flushed
        return flushed

    def flush_object(self, number: int, oid: int) -> int:
        """Free all pages of an object; return their number."""
        self._flobj_total += 1
        flushed = self._flush(self._pool(number), oid, 0, MAX_INDEX)
        self._flobj_found += flushed > 0
        return flushed

    def flush_some(self, number: int, count: int) -> int:
        """Free up to `count` pages of a pool, the first ones found; return their number.

        The cost depends on the pages found, not on their indexes.
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

    # Adoption by a successor.

    def adopt_page(self, number: int, oid: int, index: int, pampd: int) -> int:
        """Enter a page that its back end already keeps, if its place is empty.

        Returns:
            0, or the pampd that has the place and stays.

        Raises:
            ArenaError: no memory for the index.
            ValueError: there is no such pool.
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
        """Remove a page from the index if it has this pampd; return whether it had.

        A back end evicts this way, and frees the page afterwards. The result is False if the pool,
        object or page does not exist. The page is not counted as flushed.
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
        """Replace `expected` by `pampd` for a page; return False if the page has another pampd.

        Compaction moves a page this way, and recompression changes its form. No reader sees stale
        data. The caller frees the copy that the index does not name.
        """
        tree = self._pool(number).objects.get(oid)
        if tree is None or tree.get(index) != expected:
            return False
        tree.set(index, pampd)
        return True

    def compact(self, pam: Pam, max_moves: int = 1 << 62) -> int:
        """Have a back end pack its pages together, and update the index; return the frames freed.

        Raises:
            InvariantError: a page moved that the index does not name.
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
        """Return the number of pages of an object; 0 if there is no object."""
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
        """Verify all pools, and that every index node in use belongs to a tree.

        Never on the page path.

        Raises:
            InvariantError: the message names the fault.
        """
        pools = [pool for pool in self._pools if pool is not None]
        for nodes in self._both_nodes():
            held = sum(pool.check() for pool in pools if pool.nodes is nodes)
            if held != nodes.in_use:
                raise InvariantError(f"trees hold {held} nodes, {nodes.in_use} are handed out")
        if sum(len(pool.objects) for pool in pools) != self._objects:
            raise InvariantError(f"{self._objects} objects are counted, but another number exists")
