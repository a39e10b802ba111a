# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand-ins that fail on cue.

Each takes a script: a string that is read one letter a call, "R" for right and "E" for error; when
it is used up, calls are right. The idea is borg's and nbdkit's (an error filter with a script), and
it keeps a failing run short enough to read.
"""

from __future__ import annotations

from collections.abc import Callable

from zswapd.core.allocators.arena import Arena
from zswapd.core.compress.base import Compressor
from zswapd.core.pam.base import PageKey, RejectReason
from zswapd.errors import ArenaError, CorruptedPageError


class Script:
    """Reads a script such as "RRER".

    Attributes:
        calls: how often it was asked.
    """

    def __init__(self, script: str) -> None:
        assert set(script) <= set("RE"), script
        self.script = script
        self.calls = 0

    def fails(self) -> bool:
        """Whether this call has to fail."""
        self.calls += 1
        return self.script[self.calls - 1 : self.calls] == "E"


class FailingArena:
    """An arena whose memory runs out, for `Job.work`: every populate or punch reads one letter."""

    def __init__(self, arena: Arena, script: str) -> None:
        self.arena = arena
        self.script = Script(script)

    def populate_table(self, frame: int, count: int) -> None:
        """Populate the table; never fails by itself."""
        self.arena.populate_table(frame, count)

    def populate(self, offset: int, length: int, *, floor: int = 0) -> int:
        """Populate, or fail like a system without memory."""
        if self.script.fails():
            raise ArenaError("no memory, says the script")
        return self.arena.populate(offset, length, floor=floor)

    def punch_runs(self, _runs: object) -> int:
        """Have the first one fail, so that each is punched by itself."""
        return 0

    def punch(self, offset: int, length: int) -> None:
        """Punch, or fail."""
        if self.script.fails():
            raise ArenaError("no hole, says the script")
        self.arena.punch(offset, length)


class FailingCompressor:
    """A compressor that works as another does, or raises when the script says so.

    Args:
        inner: does the work.
        script: read by `compress`.
        unscript: read by `decompress`.
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
    """A back end without memory management: a dict of pampd → (pool, oid, index, bytes).

    Attributes:
        pages: what is kept.
        refuse: the reason for which every create is refused, or None.
        log: ("create" or "free", pampd) in order.
        replacing: what each create was told about it.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[int, tuple[int, int, int, bytes]] = {}
        self.refuse: RejectReason | None = None
        self.log: list[tuple[str, int]] = []
        self.replacing: list[bool] = []
        self._next = 1000

    def create(self, pool: int, oid: int, index: int, page: memoryview, *, replacing: bool) -> int:
        """Keep a page, or refuse it."""
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
        """Let go of a page; KeyError if there is none."""
        del self.pages[pampd]
        self.log.append(("free", pampd))

    def key_of(self, pampd: int) -> PageKey:
        """Return the page's key."""
        pool, oid, index, _ = self.pages[pampd]
        return PageKey(pool, oid, index, 1, 0, 0)

    def compact(self, moved: Callable[[int, int, int, int, int], None], max_moves: int) -> int:
        """Give every page a new pampd, and call each of them a frame set free."""
        before = list(self.pages)[:max_moves]
        for old in before:
            self._next += 8
            self.pages[self._next] = self.pages[old]
            pool, oid, index, _ = self.pages[old]
            moved(pool, oid, index, old, self._next)
            del self.pages[old]
        return len(before)
