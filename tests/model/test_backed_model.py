# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to a device with slots, while pages are written back and the disk answers in any order.

Held to: a read gives what the last write that began before it has written, or what a write wrote
that began while the read waited; an error only where a write or the disk has failed; never anything
older, and never a mixture. An answer that is cut short ends at a page that is an error. Each
request is answered.
"""

from __future__ import annotations

import contextlib
import errno
import logging

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.backed import Files
from tests.support.strategies import KINDS, page
from zswapd.core import compress

PAGES = 24
PAGE = 4096
ZEROS = bytes(PAGE)
ERROR = -errno.EIO
Held = bytes | int


class BackedMachine(RuleBasedStateMachine):
    """`may` has for each page what a read that began now could get."""

    @initialize(
        buffers=st.sampled_from((40, 64)),
        allocator=st.sampled_from(("zsmalloc", "zbud")),
        ahead=st.sampled_from((0, 3, 8)),
        poor=st.sampled_from(("auto", "store", "refuse")),
    )
    def build(self, buffers: int, allocator: str, ahead: int, poor: str) -> None:
        logging.getLogger("zswapd.fuse.failures").disabled = True
        self.now = 0.0
        settings = (f"pool.allocator={allocator}", f"pool.incompressible={poor}")
        self.files = Files(
            PAGES, PAGE, buffers=buffers, clock=lambda: self.now, settings=settings, ahead=ahead
        )
        self.may: list[set[Held]] = [{ZEROS} for _ in range(PAGES)]
        self.writes: dict[int, dict[int, tuple[bytes, set[Held]]]] = {}
        """By request: for each page what it writes, and what the page may have been before."""
        self.last_writer = [0] * PAGES
        self.parts: set[int] = set()
        self.untouched: set[int] = set()
        """Pages of a request that failed, maybe at a page before them."""
        self.reads: dict[int, tuple[int, list[set[Held]]]] = {}
        self.serial = 0

    # Requests.

    @rule(
        first=st.integers(0, PAGES - 1),
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    )
    def write(self, first: int, kinds: list[str]) -> None:
        pages = {}
        for number, kind in enumerate(kinds[: PAGES - first], first):
            if self._has_part(number):
                return
            self.serial += 1
            pages[number] = self.serial.to_bytes(4, "little") + page(kind, number, PAGE)[4:]
        self._began(self.files.write(first * PAGE, b"".join(pages.values())), pages)

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def discard(self, first: int, count: int) -> None:
        pages = dict.fromkeys(range(first, min(first + count, PAGES)), ZEROS)
        if not any(map(self._has_part, pages)):
            self._began(self.files.discard(first * PAGE, len(pages) * PAGE), pages)

    @rule(
        number=st.integers(0, PAGES - 1),
        begin=st.integers(1, 4000),
        length=st.integers(1, 90),
        byte=st.integers(0, 255),
    )
    def change_a_part(self, number: int, begin: int, length: int, byte: int) -> None:
        # Only one at a time, and where it is known what the rest is: two writers of one page would
        # interleave.
        if len(self.may[number]) != 1 or any(number in pages for pages in self.writes.values()):
            return
        (before,) = self.may[number]
        if not isinstance(before, bytes):
            return
        where = number * PAGE + begin
        request = (
            self.files.write(where, bytes([byte]) * length)
            if byte
            else self.files.discard(where, length)
        )
        self.parts.add(request)
        self._began(
            request, {number: before[:begin] + bytes([byte]) * length + before[begin + length :]}
        )

    @rule(
        place=st.integers(0, PAGES - 1),
        begin=st.integers(1, 4000),
        length=st.integers(1, 90),
        byte=st.integers(0, 255),
    )
    def change_a_part_of_one_on_the_disk(
        self, place: int, begin: int, length: int, byte: int
    ) -> None:
        states = {number: self.files.device.state_of(number) for number in range(PAGES)}
        there = [number for number, state in states.items() if state and state.state == "disk"]
        if there:
            self.change_a_part(there[place % len(there)], begin, length, byte)

    def _has_part(self, number: int) -> bool:
        return any(
            number in pages for request, pages in self.writes.items() if request in self.parts
        )

    def _began(self, request: int, pages: dict[int, bytes]) -> None:
        self.writes[request] = {
            number: (content, self.may[number]) for number, content in pages.items()
        }
        for number, content in pages.items():
            self.last_writer[number] = request
            self.untouched.discard(number)
            self.may[number] = {content} | (self.may[number] if request in self.parts else set())
        self._answered()

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, 6))
    def read(self, first: int, count: int) -> None:
        count = min(count, PAGES - first)
        self.reads[self.files.read(first * PAGE, count * PAGE)] = (
            first,
            [set() for _ in range(count)],
        )
        self._answered()

    @rule(first=st.integers(0, PAGES - 1), count=st.integers(1, 3), times=st.integers(3, 8))
    def read_in_order(self, first: int, count: int, times: int) -> None:
        for number in range(first, min(first + times * count, PAGES), count):
            self.read(number, count)

    @rule()
    def look(self) -> None:
        self.files.operations.look()

    def _answered(self) -> None:
        """Draw the conclusions from what was begun and answered."""
        for request in [request for request in self.writes if request in self.files.answers]:
            pages = self.writes.pop(request)
            answer = self.files.answers[request]
            assert isinstance(answer, int)
            for number, (content, before) in pages.items():
                if self.last_writer[number] != request:
                    if (
                        answer < 0 and number in self.untouched
                    ):  # what came later may never have come to this page
                        self.may[number] |= before & {ZEROS, ERROR} | {ERROR}
                    continue
                if answer >= 0:
                    self.may[number] = {content}
                else:
                    # Whichever of its pages failed is lost, if it was there; those behind it are as
                    # before, and so is one of which a part was to be changed, and which could not
                    # be read.
                    is_unread = request in self.parts and self._disk_failed_to_read
                    kept = before if len(pages) > 1 or is_unread else before & {ZEROS, ERROR}
                    self.may[number] = kept | {content, ERROR}
                    if len(pages) > 1:
                        self.untouched.add(number)
        for first, may in self.reads.values():
            for number, one in enumerate(may, first):
                one.update(self.may[number])
                if self.files.transfers.statistics().failed_writes:
                    # One page of a request has failed already, others are under way, and so its
                    # writer has no answer yet.
                    for pages in self.writes.values():
                        if len(pages) > 1 and number in pages:
                            one.update(pages[number][1] & {ZEROS}, {ERROR})
        for request in [request for request in self.reads if request in self.files.answers]:
            first, may = self.reads.pop(request)
            answer = self.files.answers[request]
            whole = 0 if isinstance(answer, int) else len(answer) // PAGE
            if isinstance(answer, bytes):
                assert len(answer) == whole * PAGE > 0, "the answer ends within a page"
                for number, one in enumerate(may[:whole], first):
                    found = answer[(number - first) * PAGE : (number - first + 1) * PAGE]
                    assert found in one, f"page {number} has contents that no request wrote"
            assert whole == len(may) or ERROR in may[whole] or self._disk_failed_to_read, (
                "an error that neither a write nor the disk has caused"
            )

    @property
    def _disk_failed_to_read(self) -> bool:
        return self.files.transfers.statistics().failed_reads > 0

    # The weather.

    @rule(place=st.integers(0, 9), code=st.sampled_from((0, 0, 0, 0, 0, errno.EIO, errno.ENOSPC)))
    def disk_answers(self, place: int, code: int) -> None:
        if place < len(self.files.disk.waiting):
            self.files.disk.finish(place, code)
            self._answered()

    @rule(numbers=st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES))
    def write_back(self, numbers: list[int]) -> None:
        self.files.write_back(sorted(set(numbers)))

    @rule()
    def disk_comes_to_rest(self) -> None:
        self.files.settle()
        self._answered()

    @rule(numbers=st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES))
    def send_to_the_disk(self, numbers: list[int]) -> None:
        self.write_back(numbers)
        self.disk_comes_to_rest()

    @rule(limit=st.sampled_from((0, 4, 1000)))
    def pool_limit(self, limit: int) -> None:
        self.files.core.zv.limit_frames = limit

    @rule(on=st.booleans())
    def promote(self, on: bool) -> None:
        self.files.device.promotes = on

    @rule(on=st.booleans())
    def freeze(self, on: bool) -> None:
        if on:
            self.files.core.frontswap.freeze()
        else:
            self.files.core.frontswap.thaw()

    @rule(number=st.integers(0, PAGES - 1))
    def recompress(self, number: int) -> None:
        if not self.files.device.in_use(number, 256):
            self.files.device.recompress(number, compress.get("zstd"), 0)

    @rule()
    def compact(self) -> None:
        self.files.core.tmem.compact(self.files.core.zv)

    @rule(seconds=st.sampled_from((0.5, 100.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.files.device.epoch = self.files.device.epoch % 255 + 1
        self.files.transfers.probe()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "files"):
            self.files.core.check()
            transfers = self.files.transfers
            assert (
                not transfers.is_idle() or transfers.statistics().free_buffers == transfers.buffers
            )

    def teardown(self) -> None:
        try:
            if hasattr(self, "files"):
                self._settle_and_look()
        finally:
            logging.getLogger("zswapd.fuse.failures").disabled = False

    def _settle_and_look(self) -> None:
        with contextlib.closing(self.files):
            self.files.settle()
            self._answered()
            assert not self.writes, "writers wait for ever"
            assert not self.reads, "readers wait for ever"
            for number, may in enumerate(self.may):
                found = self.files.get(number)
                assert found in may, f"page {number} is not what it was"
            self.files.operations.look()
            self.files.operations.look()
            assert self.files.transfers.is_idle(), "a buffer is held and no reader waits for it"
            self.files.discard(0, PAGES * PAGE)
            self.files.settle()
            seen = self.files.core.statistics()
            assert seen.frames.used_frames == 0
            assert seen.backed[0].bd_count == 0
            assert seen.devices[0].lost_pages == 0


TestBacked = BackedMachine.TestCase
TestBacked.settings = settings(max_examples=120, stateful_step_count=50)
