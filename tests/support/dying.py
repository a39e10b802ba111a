# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that die at a crash point in the middle of their work, and a model of the result.

A `World` outlives a process. It has the arena, the bitmap of lost pages, and a model of the allowed
contents of every page. A life is a forked process. It takes over, arms a crash point, does
operations, and notes in shared memory which of them it began and which were acknowledged.

The parent follows. An acknowledged operation has happened. After an unfinished one, each page has
its old or its new contents; it may be lost if a refusal was under way.
"""

from __future__ import annotations

import mmap
import os
import signal
import traceback
from dataclasses import dataclass
from typing import Any, Self

from tests.support.strategies import page
from tests.support.successor import check_books, make_config
from zswapd.core import compress, crashpoints
from zswapd.core.core import Core, Inherited
from zswapd.core.sizing import lost_bitmap_bytes, make_arena
from zswapd.errors import LostPageError

Op = tuple[Any, ...]
Held = bytes | str
"""The state of a page: its bytes if it is stored, or one of the two below."""
ABSENT = "absent"
"""The page is not stored: it reads as zeros."""
LOST = "lost"
"""The page has no data: a read is an error."""

PAGES = 300
"""More than 256 pages, so that a range of offsets covers several objects."""

STORED, REFUSED = 1, 2
GIVEN_UP = 70
"""The exit code of a life that ended by an exception of an operation."""


@dataclass
class Life:
    """The end of one process.

    Attributes:
        killed: whether it died at its crash point; otherwise it did all its operations.
        begun, done: the numbers of operations begun and acknowledged.
    """

    killed: bool
    begun: int
    done: int


class World:
    """The memory that outlives processes, and its model: a context manager that frees it."""

    def __init__(
        self,
        kind: str,
        page_size: int,
        allocator: str = "zsmalloc",
        *,
        cache: str = "",
        packer: bool = True,
    ) -> None:
        self.size = page_size
        self.packer = packer
        ephemeral = ["cache.limit=25%", f"cache.allocator={cache}"] if cache else ["cache.limit="]
        self.config = make_config(
            f"swap.size={PAGES * page_size}",
            f"memory.reserve={PAGES // 3 * page_size}",
            f"memory.arena={kind}",
            f"pool.allocator={allocator}",
            *ephemeral,
            page_size=page_size,
        )
        self.arena = make_arena(self.config)
        (length,) = lost_bitmap_bytes(self.config).values()
        self.lost = memoryview(mmap.mmap(-1, length))
        self.model: list[set[Held]] = [{ABSENT} for _ in range(PAGES)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def may_write_through(self, _kind: str, _seed: int) -> bool:
        """Say whether the pool may refuse a page for its contents, so that a disk keeps the page.

        A death between the refusal and the slot loses that page (coherency rule 2, "writing
        through"). The kernel has no answer to its request then, and sends the request again.
        """
        return False

    def take_over(self) -> Core:
        """Return a core in this process."""
        core = Core(self.config, inherited=Inherited(self.arena.fd, {"swap": self.lost}))
        if not self.packer:
            core.zv.packer = None
        return core

    def process(self, core: Core) -> Process:
        """Return the process that does operations on a core."""
        return Process(core, self.size)

    def find(self, core: Core, number: int, out: memoryview) -> bool:
        """Read a page; return whether there is one."""
        core.devices["swap"].read_into(number * self.size, out)
        return core.frontswap.holds(0, number)

    def close(self) -> None:
        """Free the memory."""
        self.arena.close()

    def live(
        self, ops: list[Op], point: str, nth: int, *, in_takeover: bool = False, how: str = "kill"
    ) -> Life:
        """Fork a process that does the operations and dies at the point; then update the model.

        Args:
            ops: see `Process`.
            point, nth, how: for `crashpoints.arm`; an exception there ends the process when it
                leaves the operation, as a worker gives up.
            in_takeover: arm before the process takes over, not after it.
        """
        # A word with the operations begun, and one with the operations done; from byte 16 on, a
        # byte with the outcome of each; behind these, a traceback.
        notes = mmap.mmap(-1, 16 + len(ops) + 8192)
        pid = os.fork()
        if not pid:
            try:
                if in_takeover:
                    crashpoints.arm(point, nth, how)
                core = self.take_over()
                if not in_takeover:
                    crashpoints.arm(point, nth, how)
                process = self.process(core)
                for number, op in enumerate(ops):
                    notes[0:4] = (number + 1).to_bytes(4, "little")
                    notes[16 + number] = process.do(op)
                    notes[4:8] = (number + 1).to_bytes(4, "little")
            except BaseException as error:  # noqa: BLE001 - no exception may leave the child
                if how in ("memory", "bug") and str(error) == crashpoints.ON_PURPOSE:
                    os._exit(GIVEN_UP)
                text = traceback.format_exc().encode()[-8000:]
                notes[16 + len(ops) : 16 + len(ops) + len(text)] = text
                os._exit(1)
            os._exit(0)
        _pid, status = os.waitpid(pid, 0)
        killed = (
            os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        ) or status == GIVEN_UP << 8
        begun, done = int.from_bytes(notes[0:4], "little"), int.from_bytes(notes[4:8], "little")
        assert killed or status == 0, notes[16 + len(ops) :].rstrip(b"\0").decode(errors="replace")
        self._enter(ops, notes, begun, done, fails=how in ("memory", "bug"))
        return Life(killed, begun, done)

    def _enter(
        self, ops: list[Op], notes: mmap.mmap, begun: int, done: int, *, fails: bool
    ) -> None:
        may_refuse = fails  # an overwrite that fails loses the older page, as a refused one does
        for number, op in enumerate(ops[:begun]):
            may_refuse = may_refuse or op[0] in (
                "freeze",
                "keep_poor",
                "hog",
                "trim",
                "limit",
                "disk_fails",
            )
            if op[0] == "write":
                new = page(op[2], op[3], self.size)
                before = self.model[op[1]]
                refused: set[Held] = {held if isinstance(held, str) else LOST for held in before}
                if number >= done:
                    may_be_lost = may_refuse or self.may_write_through(op[2], op[3])
                    self.model[op[1]] = before | {new} | (refused if may_be_lost else set())
                elif notes[16 + number] == STORED:
                    self.model[op[1]] = {new}
                else:
                    assert may_refuse
                    self.model[op[1]] = refused
            elif op[0] == "discard":
                for place in range(op[1], min(PAGES, op[1] + op[2])):
                    self.model[place] = {ABSENT} if number < done else self.model[place] | {ABSENT}

    def check(self) -> None:
        """Take over in this process, and prove every invariant and the state of every page.

        The model then has the state that was found.
        """
        core = self.take_over()
        try:
            self._check(core)
        finally:
            core.close()

    def _check(self, core: Core) -> None:
        check_books(core)
        assert core.frames.ephemeral_frames == 0, "what is ephemeral has outlived its process"
        assert core.statistics().recovery.damaged == 0
        device = core.devices["swap"]
        out = bytearray(self.size)
        lost = 0
        for number, allowed in enumerate(self.model):
            found: Held
            try:
                found = bytes(out) if self.find(core, number, memoryview(out)) else ABSENT
                assert found != ABSENT or not any(out)
            except LostPageError:
                found = LOST
                lost += 1
            assert found in allowed, (
                f"page {number} holds neither what it held nor what was written"
            )
            self.model[number] = {found}
        assert device.statistics().lost_pages == lost
        stored = sum(core.frontswap.holds(0, number) for number in range(PAGES))
        kept = core.zv.statistics()
        assert kept.curr_pages == stored
        assert core.allocator.statistics().objects == stored + kept.curr_incompressible, (
            "an object that is no page's"
        )


class Process:
    """A process that does operations on a core: tuples of a name and arguments."""

    def __init__(self, core: Core, size: int) -> None:
        self.core = core
        self.size = size
        self.cached = core.cache.cleancache.init_fs() if core.cache else -1
        self._refill()

    def _refill(self) -> None:
        """Refill the reserve, as the daemon's task does."""
        if self.core.frames.wants_refill():
            self.core.frames.refill_now()

    def do(self, op: Op) -> int:
        """Do one operation; return the outcome for the model."""
        core, device = self.core, self.core.devices["swap"]
        match op:
            case ("write", number, kind, seed):
                reason = device.write(number * self.size, memoryview(page(kind, seed, self.size)))
                self._refill()
                return STORED if reason is None else REFUSED
            case ("read", first, count):
                device.read_into(first * self.size, memoryview(bytearray(count * self.size)))
            case ("discard", first, count):
                device.discard(first * self.size, min(count, PAGES - first) * self.size)
            case ("cache", first, count, kind):
                for index in range(first, first + count):
                    if core.cache:
                        core.cache.cleancache.put_page(
                            self.cached, 1, index, memoryview(page(kind, index % 9, self.size))
                        )
            case ("evict", count):
                if core.cache:
                    core.cache.eviction.evict(count)
            case ("compact", moves):
                core.tmem.compact(core.zv, moves)
                if core.cache:
                    core.tmem.compact(core.cache.zbuds, moves)
            case ("recompress", first, count):
                for number in range(first, min(first + count, PAGES)):
                    device.recompress(number, compress.get("zstd"), 0)
            case ("freeze", True):
                core.frontswap.freeze()
            case ("freeze", False):
                core.frontswap.thaw()
            case ("keep_poor", keep):
                core.zv.keep_poor = keep
            case ("codec", name):
                core.zv.compressor = compress.get(name)
            case ("checksum", on):
                core.zv.checksum = on
            case ("hog", leave):
                while core.frames.table.free_frames > leave and core.allocator.alloc(self.size):
                    pass
            case ("refill", target):
                core.frames.reserve_target = target
                core.frames.refill_now()
            case ("arm", point, nth):
                crashpoints.arm(point, nth)
            case ("trim", target):
                core.frames.reserve_target = target
                core.frames.trim_now()
            case _:
                raise ValueError(op)
        return STORED
