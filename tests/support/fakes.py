# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand-ins that fail at chosen calls.

Each takes a script, a string with a letter for each call: "R" for right and "E" for error. After
its end, all calls are right. The idea is from borg and nbdkit (an error filter with a script). It
keeps a failing run short enough to read.
"""

from __future__ import annotations

from collections.abc import Callable

from zswapd.core.allocators.arena import Arena
from zswapd.core.compress.base import Compressor
from zswapd.core.pam.base import PageKey, RejectReason
from zswapd.errors import ArenaError, CorruptedPageError


class Script:
    """The reader of a script like "RRER".

    Attributes:
        calls: the number of calls.
    """

    def __init__(self, script: str) -> None:
        assert set(script) <= set("RE"), script
        self.script = script
        self.calls = 0

    def fails(self) -> bool:
        """Return whether this call has to fail."""
        self.calls += 1
        return self.script[self.calls - 1 : self.calls] == "E"


class FailingArena:
    """An arena for `Job.work` whose memory runs out; each populate or punch reads a letter."""

    def __init__(self, arena: Arena, script: str) -> None:
        self.arena = arena
        self.script = Script(script)

    def populate_table(self, frame: int, count: int) -> None:
        """Populate the table; this never fails."""
        self.arena.populate_table(frame, count)

    def populate(self, offset: int, length: int, *, floor: int = 0, is_idle: bool = False) -> int:
        """Populate, or fail like a system without memory."""
        if self.script.fails():
            raise ArenaError("no memory, says the script")
        return self.arena.populate(offset, length, floor=floor, is_idle=is_idle)

    def punch_runs(self, _runs: object) -> int:
        """Fail the first call, so that each frame is punched alone."""
        return 0

    def punch(self, offset: int, length: int) -> None:
        """Punch, or fail."""
        if self.script.fails():
            raise ArenaError("no hole, says the script")
        self.arena.punch(offset, length)


class FailingCompressor:
    """A compressor that works like another one, or raises as its script says.

    Args:
        inner: the compressor that does the work.
        script: the script of `compress`.
        unscript: the script of `decompress`.
    """

    def __init__(self, inner: Compressor, script: str = "", unscript: str = "") -> None:
        self.inner = inner
        self.name = inner.name
        self.codec = inner.codec
        self.compressions = Script(script)
        self.decompressions = Script(unscript)

    def compress(self, page: memoryview) -> bytes:
        """Compress, or fail as a codec without memory does."""
        if self.compressions.fails():
            raise MemoryError("says the script")
        return self.inner.compress(page)

    def decompress(self, data: memoryview, page_size: int) -> bytes:
        """Decompress, or find the data damaged."""
        if self.decompressions.fails():
            raise CorruptedPageError("says the script")
        return self.inner.decompress(data, page_size)


class FakePam:
    """A back end without memory management: a dict from pampd to (pool, oid, index, bytes).

    Attributes:
        pages: the stored pages.
        refuse: the reason to refuse every create, or None.
        log: ("create" or "free", pampd), in the order of the calls.
        replacing: the argument `replacing` of each create.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, tuple[int, int, int, bytes]] = {}
        self.refuse: RejectReason | None = None
        self.log: list[tuple[str, int]] = []
        self.replacing: list[bool] = []
        self._next = 1000

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Store a page, or refuse it."""
        if self.refuse is not None:
            return -self.refuse
        self._next += 8
        self.pages[self._next] = (pool, oid, index, bytes(page))
        self.log.append(("create", self._next))
        self.replacing.append(replacing)
        return self._next

    def get(self, pampd: int, oid: int, index: int, out: memoryview) -> None:
        """Write the page into `out`."""
        _, its_oid, its_index, data = self.pages[pampd]
        assert (its_oid, its_index) == (oid, index)
        out[:] = data

    def free(self, pampd: int) -> None:
        """Free a page; KeyError if there is none."""
        del self.pages[pampd]
        self.log.append(("free", pampd))

    def key_of(self, pampd: int) -> PageKey:
        """Return the page's key."""
        pool, oid, index, _ = self.pages[pampd]
        return PageKey(pool, oid, index, 1, 0, 0)

    def compact(self, moved: Callable[[int, int, int, int, int], None], max_moves: int) -> int:
        """Give every page a new pampd, and count each as a freed frame."""
        before = list(self.pages)[:max_moves]
        for old in before:
            self._next += 8
            self.pages[self._next] = self.pages[old]
            pool, oid, index, _ = self.pages[old]
            moved(pool, oid, index, old, self._next)
            del self.pages[old]
        return len(before)
