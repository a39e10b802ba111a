# SPDX-License-Identifier: GPL-2.0-or-later
"""Transfers between slots and buffers, with requests that end in any order, well or badly.

Held to: a slot has the last page that was written to it well; it is never read or written by two
requests at once; readers get the contents that no write was changing; buffers come back; and the
claimed slots are those that are being written.
"""

from __future__ import annotations

import errno

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.disk import Disk
from zswapd.core.backing.store import make_buffers
from zswapd.core.backing.transfers import CLAIMS, SlotRead, Transfers

SLOTS = 12
PAGE = 64
BUFFERS = 24


class TransfersMachine(RuleBasedStateMachine):
    """`wrote` has what every slot may hold once all has ended."""

    @initialize(depth=st.integers(1, 4))
    def build(self, depth: int) -> None:
        self.disk = Disk(PAGE, SLOTS)
        self.claims = memoryview(bytearray(8 * CLAIMS)).cast("Q")
        self.now = 0.0
        self.transfers = Transfers(
            self.disk,
            self.disk.submit,
            page_size=PAGE,
            buffers=make_buffers(BUFFERS * PAGE, PAGE),
            depth=depth,
            claims=self.claims,
            clock=lambda: self.now,
        )
        self.serial = 0
        self.queued: dict[int, list[bytes]] = {slot: [] for slot in range(SLOTS)}
        self.certain: dict[int, bytes | None] = dict.fromkeys(range(SLOTS))
        self.reading = 0
        self.over: list[SlotRead] = []

    @rule(first=st.integers(0, SLOTS - 1), count=st.integers(1, 5))
    def write(self, first: int, count: int) -> None:
        for slot in range(first, min(first + count, SLOTS)):
            self.serial += 1
            page = self.serial.to_bytes(4, "little") * (PAGE // 4)

            def done(code: int, slot: int = slot, page: bytes = page) -> None:
                assert self.queued[slot].pop(0) == page, "writes of a slot ended out of order"
                self.certain[slot] = None if code else page

            # No reader reads a slot that is about to be written; the daemon has none either.
            if self.transfers.write(slot, page, done):
                self.queued[slot].append(page)
        self.transfers.kick()

    @rule(slots=st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=6))
    def read(self, slots: set[int]) -> None:
        wanted = {
            slot for slot in slots if self.certain[slot] is not None and not self.queued[slot]
        }
        if not wanted:
            return
        expected = {slot: self.certain[slot] for slot in wanted}

        def done() -> None:
            for slot in wanted:
                try:
                    page = self.transfers.page(slot)
                except OSError:
                    continue
                # Written before it was this reader's turn: it has to look again.
                assert (
                    page == expected[slot]
                    or (page is None and self.certain[slot] != expected[slot])
                    or self.queued[slot]
                )
                if page is None:
                    assert self.transfers.is_writing(slot) or self.certain[slot] != expected[slot]
            self.over.append(fetch)

        fetch = self.transfers.fetch(wanted, done)
        self.reading += 1
        self.transfers.kick()
        self._settle()

    def _settle(self) -> None:
        """End what readers have got."""
        while self.over:
            self.transfers.end(self.over.pop())
            self.reading -= 1
            self.transfers.kick()

    @rule(
        place=st.integers(0, 7),
        code=st.sampled_from((0, 0, 0, errno.EIO, errno.ENODEV, errno.ENOSPC)),
    )
    def finish(self, place: int, code: int) -> None:
        if place < len(self.disk.waiting):
            self.disk.finish(place, code)
            self._settle()

    @rule(seconds=st.sampled_from((0.1, 1.0, 100.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.transfers.probe()

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "disk"):
            return
        claimed = [word for word in self.claims if word]
        slots = [word >> 16 for word in claimed]
        assert len(set(slots)) == len(slots)
        counts = self.transfers.statistics()
        assert len(claimed) <= counts.in_flight

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        while self.disk.waiting:
            self.finish(0, 0)
        assert self.transfers.is_idle()
        assert not self.reading, "a reader waits for ever"
        assert not any(self.claims)
        assert not any(self.queued.values())
        for slot, page in self.certain.items():
            if page is not None:
                assert self.disk.slots[slot] == page
        # All buffers came back: the most that can be written at once can be written.
        self.now += 1000
        self.transfers.probe()
        self.disk.finish_all()
        taken = 0
        while self.transfers.write(taken % SLOTS, bytes(PAGE), lambda _code: None):
            taken += 1
        assert taken == BUFFERS - BUFFERS // 4


TestTransfers = TransfersMachine.TestCase
