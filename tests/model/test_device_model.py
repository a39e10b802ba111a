# SPDX-License-Identifier: GPL-2.0-or-later
"""A block device over the whole core, against a bytearray.

Writes, reads and discards of any byte range; meanwhile the pool is frozen, runs out of frames,
loses its taste for poor pages, changes its codec, is compacted, and has bits flipped in it.
Whatever happens, a read gives the right bytes or an error, and never old data; and every layer's
invariants hold after every step.
"""

from __future__ import annotations

import contextlib
import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.stack import MakeAllocator, Stack, build
from tests.support.strategies import contents, page, page_sizes
from zswapd.core import compress
from zswapd.core.allocators.zbud import ZbudPool
from zswapd.core.allocators.zsmalloc import ZsPool
from zswapd.core.block.device import Device
from zswapd.core.pam.base import HEADER_BYTES
from zswapd.errors import CorruptedPageError, DiscardError, LostPageError

PAGES = 24
TYPE = 1
GOOD, LOST, DAMAGED = "good", "lost", "damaged"


def ranges() -> st.SearchStrategy[tuple[float, float]]:
    """Draw (start, length) in pages: whole pages, pieces of one, and anything."""
    whole = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 8)).map(
        lambda r: (float(r[0]), float(r[1]))
    )
    piece = st.tuples(st.floats(0, PAGES - 0.01), st.floats(0, 1))
    return st.one_of(whole, piece, st.tuples(st.floats(0, PAGES - 0.01), st.floats(0, 6)))


class DeviceMachine(RuleBasedStateMachine):
    """`model` is what the device should hold.

    `state` says of each page whether it can be read at all.
    """

    stack: Stack

    @initialize(
        page_size=page_sizes(),
        compressor=st.sampled_from(compress.names()),
        allocator=st.sampled_from((ZsPool, ZbudPool)),
        damage=st.booleans(),
    )
    def build(
        self, page_size: int, compressor: str, allocator: MakeAllocator, damage: bool
    ) -> None:
        self.damage = damage  # after damage, fewer things can be proved; hence runs without it
        self.stack = build(
            page_size, frames=60, compressor=compressor, allocator=allocator, node_reserve=200
        )
        self.stack.zv.limit_frames = 1 << 30
        self.page_size = page_size
        self.size = PAGES * page_size
        self.device = Device("swap", self.size, self.stack.frontswap, TYPE, page_size=page_size)
        self.model = bytearray(self.size)
        self.state = [GOOD] * PAGES
        self.stored: set[int] = set()
        self.taken: list[int] = []
        self.serial = 0

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with contextlib.closing(self.stack):
            self._give_back()
            self.device.invalidate()
            self.stack.check()
            # What a damaged header named is beyond reach: no more than a frame each.
            assert self.stack.frames.used_frames <= self.stack.zv.statistics().damaged_pages
            assert self.stack.tmem.statistics().curr_objnode_count == 0
            assert self.device.statistics().lost_pages == 0

    # The traffic.

    @rule(where=ranges(), content=contents())
    def write(self, where: tuple[float, float], content: tuple[str, int]) -> None:
        self._write(where, content)

    @rule(page_number=st.integers(0, PAGES - 1), kinds=st.lists(contents(), min_size=1, max_size=6))
    def write_pages(self, page_number: int, kinds: list[tuple[str, int]]) -> None:
        for number, content in enumerate(kinds, page_number):
            if number < PAGES:
                self._write((float(number), 1.0), content)

    def _write(self, where: tuple[float, float], content: tuple[str, int]) -> None:
        begin, end = self._bytes(where)
        self.serial += 1
        data = (page(*content, self.page_size) * (PAGES + 1))[begin % self.page_size :][
            : end - begin
        ]
        # Mark it, so that what was written now cannot be mistaken for what was there before; also
        # where it compresses away.
        data = bytearray(data)
        for at in range(0, len(data), self.page_size // 2):
            data[at : at + 4] = self.serial.to_bytes(4, "little")[: len(data) - at]
        before = self.model[:]
        wanted = before[:]
        wanted[begin:end] = data
        needs = [
            n
            for n in self._touched(begin, end)
            if self.state[n] != GOOD and not self._covers(begin, end, n)
        ]
        try:
            reason = self.device.write(begin, memoryview(bytes(data)))
        except LostPageError:
            assert any(self.state[n] == LOST for n in needs)
            self._settle(begin, end, before, wanted, refused=False)
        except CorruptedPageError:
            assert any(self.state[n] == DAMAGED for n in needs)
            self._settle(begin, end, before, wanted, refused=False)
        else:
            assert not (needs and reason is None), "part of a page was written that cannot be read"
            if reason is None:
                self.model = wanted
                for number in self._touched(begin, end):
                    self.state[number] = GOOD
                    self.stored.add(number)
            else:
                self._settle(begin, end, before, wanted, refused=True)

    @rule(where=ranges())
    def discard(self, where: tuple[float, float]) -> None:
        begin, end = self._bytes(where)
        before = self.model[:]
        wanted = before[:]
        wanted[begin:end] = bytes(end - begin)
        needs = [
            n
            for n in self._touched(begin, end)
            if self.state[n] != GOOD and not self._covers(begin, end, n)
        ]
        try:
            self.device.discard(begin, end - begin)
        except (LostPageError, CorruptedPageError):
            assert needs
            self._settle(begin, end, before, wanted, refused=False)
        except DiscardError:
            self._settle(begin, end, before, wanted, refused=True)
        else:
            assert not needs
            self.model = wanted
            for number in self._touched(begin, end):
                if self._covers(begin, end, number):
                    self.state[number] = GOOD
                    self.stored.discard(number)

    @rule(where=ranges())
    def read(self, where: tuple[float, float]) -> None:
        begin, end = self._bytes(where)
        out = bytearray(b"\x99") * (end - begin)
        bad = {self.state[number] for number in self._touched(begin, end)} - {GOOD}
        try:
            self.device.read_into(begin, memoryview(out))
        except LostPageError:
            assert LOST in bad
        except CorruptedPageError:
            assert DAMAGED in bad
        else:
            assert not bad
            assert out == self.model[begin:end]

    def _bytes(self, where: tuple[float, float]) -> tuple[int, int]:
        begin = int(where[0] * self.page_size)
        return begin, min(self.size, begin + max(1, int(where[1] * self.page_size)))

    def _touched(self, begin: int, end: int) -> range:
        return range(begin // self.page_size, (end - 1) // self.page_size + 1)

    def _covers(self, begin: int, end: int, number: int) -> bool:
        return begin <= number * self.page_size and (number + 1) * self.page_size <= end

    def _peek(self, number: int) -> tuple[str, bytes]:
        out = bytearray(self.page_size)
        try:
            self.device.read_into(number * self.page_size, memoryview(out))
        except LostPageError:
            return LOST, b""
        except CorruptedPageError:
            return DAMAGED, b""
        return GOOD, bytes(out)

    def _settle(
        self, begin: int, end: int, before: bytearray, wanted: bytearray, *, refused: bool
    ) -> None:
        """A request ended half-way: each page has to be as before or as wanted.

        At most one may be gone, if refused.
        """
        gone = 0
        for number in self._touched(begin, end):
            piece = slice(number * self.page_size, (number + 1) * self.page_size)
            state, data = self._peek(number)
            if state == GOOD:
                if data == wanted[piece] and data != before[piece]:
                    if self._covers(begin, end, number) and not any(wanted[piece]):
                        self.stored.discard(number)
                    else:
                        self.stored.add(number)
                else:
                    assert data == before[piece], "neither the old page nor the new one"
                    assert self.state[number] == GOOD
                self.model[piece] = data
            elif state != self.state[number]:
                assert state == LOST
                assert number in self.stored, "a page that held nothing cannot be lost"
                self.stored.discard(number)
                gone += 1
            self.state[number] = state
        assert gone <= refused
        assert self._peeked_lost() == self.device.statistics().lost_pages

    def _peeked_lost(self) -> int:
        return sum(state == LOST for state in self.state)

    # The weather.

    @rule(frozen=st.sampled_from((False, False, True)))
    def freeze_or_thaw(self, frozen: bool) -> None:
        if frozen:
            self.stack.frontswap.freeze()
        else:
            self.stack.frontswap.thaw()

    @rule(keep=st.booleans())
    def keep_poor(self, keep: bool) -> None:
        self.stack.zv.keep_poor = keep

    @rule(name=st.sampled_from(compress.names()))
    def switch_codec(self, name: str) -> None:
        self.stack.zv.compressor = compress.get(name)

    @rule(leave=st.integers(0, 6))
    def take_frames(self, leave: int) -> None:
        # Through the allocator, as another client of the pool would.
        while self.stack.frames.statistics().free_frames > leave:
            handle = self.stack.allocator.alloc(self.page_size)
            assert handle
            self.taken.append(handle)

    @rule()
    def give_frames(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for handle in self.taken:
            self.stack.allocator.free(handle)
        self.taken = []

    @rule(number=st.integers(0, PAGES - 1))
    def recompress(self, number: int) -> None:
        if self.state[number] == GOOD:
            self.device.recompress(number, compress.get("zstd"), 0)

    @rule(bound=st.sampled_from((1, 5, 1 << 30)))
    def compact(self, bound: int) -> None:
        self.stack.tmem.compact(self.stack.zv, bound)

    @precondition(
        lambda self: self.damage and any(self.state[number] == GOOD for number in self.stored)
    )
    @rule(seed=st.integers(0, 1 << 16))
    def flip_a_bit(self, seed: int) -> None:
        rng = random.Random(seed)
        number = rng.choice(sorted(n for n in self.stored if self.state[n] == GOOD))
        for pampd in self.stack.tmem.pampds(self.stack.zv):
            key = self.stack.zv.key_of(pampd)
            if key.index << 8 | key.oid & 0xFF == number:
                self.stack.arena.view[pampd + HEADER_BYTES + rng.randrange(8)] ^= (
                    1 << rng.randrange(8)
                )
                self.state[number] = DAMAGED
                return
        raise AssertionError(f"page {number} was written and is not stored")

    @invariant()
    def every_layer_holds(self) -> None:
        if not hasattr(self, "stack"):
            return
        self.stack.check()
        assert self.stack.zv.statistics().curr_pages == len(self.stored)
        assert self.device.statistics().lost_pages == self._peeked_lost()

    @invariant()
    def every_page_reads_as_it_should(self) -> None:
        if not hasattr(self, "stack"):
            return
        for number in range(PAGES):
            state, data = self._peek(number)
            assert state == self.state[number]
            if state == GOOD:
                assert data == self.model[number * self.page_size : (number + 1) * self.page_size]


TestDevice = DeviceMachine.TestCase
