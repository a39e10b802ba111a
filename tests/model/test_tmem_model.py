# SPDX-License-Identifier: GPL-2.0-or-later
"""tmem against a dict of (pool, oid, index) → page.

Several clients and pools, refusals, moves, and an index short of nodes.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from tests.support.fakes import FakePam
from zswapd.core.pam.base import MAX_INDEX, MAX_OID, RejectReason
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem

SIZE = 32
Key = tuple[int, int, int]


def oids() -> st.SearchStrategy[int]:
    """Draw few oids, the extreme ones among them."""
    return st.sampled_from((0, 1, 2, 255, MAX_OID))


def indexes() -> st.SearchStrategy[int]:
    """Draw indexes that meet often, and those at which a tree changes its height."""
    return st.one_of(st.integers(0, 9), st.sampled_from((63, 64, 4095, 4096, 1 << 18, MAX_INDEX)))


class TmemMachine(RuleBasedStateMachine):
    """Every page that was put and not let go is there, under its own key only.

    The back end keeps nothing else.
    """

    pools = Bundle("pools")
    tmem: Tmem

    @initialize(nodes=st.sampled_from((60, 400)))
    def build(self, nodes: int) -> None:
        self.pam = FakePam(SIZE)
        self.tmem = Tmem(Objnodes(nodes, reserve=nodes))
        self.clients = [self.tmem.new_client(), self.tmem.new_client()]
        self.owner: dict[int, int] = {}
        self.model: dict[Key, bytes] = {}
        self.flushed: list[Key] = []
        self.tmem.when_flushing = lambda *key: self.flushed.append(key)
        self.serial = 0
        self.peak = 0

    @rule(target=pools, client=st.integers(0, 1), persistent=st.booleans())
    def new_pool(self, client: int, persistent: bool) -> int:
        pool = self.tmem.new_pool(self.clients[client], self.pam, persistent=persistent)
        assert pool not in self.owner
        self.owner[pool] = client
        return pool

    @rule(pool=consumes(pools))
    def destroy_pool(self, pool: int) -> None:
        if pool not in self.owner:  # its client went first
            return
        held = [key for key in self.model if key[0] == pool]
        assert self.tmem.destroy_pool(pool) == len(held)
        self._forget(held)
        del self.owner[pool]

    @rule(client=st.integers(0, 1))
    def destroy_client(self, client: int) -> None:
        gone = {pool for pool, owner in self.owner.items() if owner == client}
        held = [key for key in self.model if key[0] in gone]
        assert self.tmem.destroy_client(self.clients[client]) == len(held)
        self._forget(held)
        for pool in gone:
            del self.owner[pool]
        self.clients[client] = self.tmem.new_client()

    def _forget(self, keys: list[Key]) -> None:
        for key in keys:
            del self.model[key]

    @rule(pool=pools, oid=oids(), index=indexes(), count=st.integers(1, 5))
    def put(self, pool: int, oid: int, index: int, count: int) -> None:
        if pool not in self.owner:
            return
        for at in range(index, min(index + count, MAX_INDEX + 1)):
            key = (pool, oid, at)
            self.serial += 1
            data = self.serial.to_bytes(4, "little") * (SIZE // 4)
            self.flushed.clear()
            reason = self.tmem.put(*key, memoryview(data))
            if reason is None:
                assert self.flushed == []
                self.model[key] = data
            elif reason is RejectReason.FAILED_OBJNODE:
                assert key not in self.model, "a replacement needs no node"
                assert self.flushed == []
            else:
                assert reason is self.pam.refuse
                assert self.flushed == ([key] if key in self.model else [])
                self.model.pop(key, None)

    @rule(pool=pools, oid=oids(), index=indexes())
    def get(self, pool: int, oid: int, index: int) -> None:
        if pool not in self.owner:
            return
        out = bytearray(b"\xee" * SIZE)
        expected = self.model.get((pool, oid, index))
        assert self.tmem.get(pool, oid, index, memoryview(out)) == (expected is not None)
        assert out == (expected or b"\xee" * SIZE)

    @rule(pool=pools, oid=oids(), index=indexes())
    def flush_page(self, pool: int, oid: int, index: int) -> None:
        if pool in self.owner:
            assert self.tmem.flush_page(pool, oid, index) == (
                self.model.pop((pool, oid, index), None) is not None
            )

    @rule(pool=pools, oid=oids(), first=indexes(), last=indexes())
    def flush_range(self, pool: int, oid: int, first: int, last: int) -> None:
        if pool in self.owner:
            held = [key for key in self.model if key[:2] == (pool, oid) and first <= key[2] <= last]
            assert self.tmem.flush_range(pool, oid, first, last) == len(held)
            self._forget(held)

    @rule(pool=pools, oid=oids())
    def flush_object(self, pool: int, oid: int) -> None:
        if pool in self.owner:
            held = [key for key in self.model if key[:2] == (pool, oid)]
            assert self.tmem.flush_object(pool, oid) == len(held)
            self._forget(held)

    @rule(pool=pools, oid=oids(), index=indexes(), right=st.booleans())
    def replace(self, pool: int, oid: int, index: int, right: bool) -> None:
        if pool not in self.owner:
            return
        held = {key[:3]: pampd for pampd, key in self.pam.pages.items()}
        current = held.get((pool, oid, index), 0)
        expected = current if right and current else 3  # no pampd is 3
        self.serial += 1
        data = self.serial.to_bytes(4, "little") * (SIZE // 4)
        fresh = self.pam._next = self.pam._next + 8
        self.pam.pages[fresh] = (pool, oid, index, data)
        if self.tmem.replace(pool, oid, index, expected, fresh):
            assert right
            self.pam.free(expected)
            self.model[pool, oid, index] = data
        else:
            assert not (right and current)
            self.pam.free(fresh)

    @rule(bound=st.sampled_from((1, 3, 1000)))
    def compact(self, bound: int) -> None:
        self.tmem.compact(self.pam, bound)

    @rule(
        reason=st.sampled_from([None, None, RejectReason.FAILED_ALLOC, RejectReason.COMPRESS_POOR])
    )
    def set_refusal(self, reason: RejectReason | None) -> None:
        self.pam.refuse = reason

    @invariant()
    def index_back_end_and_model_agree(self) -> None:
        if not hasattr(self, "tmem"):
            return
        self.tmem.check()
        assert {key[:3]: key[3] for key in self.pam.pages.values()} == self.model
        assert len(self.pam.pages) == len(self.model), "two copies of a page are kept"
        assert sorted(self.tmem.pampds(self.pam)) == sorted(self.pam.pages)
        objects = {key[:2] for key in self.model}
        assert self.tmem.statistics().curr_obj_count == len(objects)
        for pool in self.owner:
            assert self.tmem.pool_pages(pool) == sum(key[0] == pool for key in self.model)


TestTmem = TmemMachine.TestCase
