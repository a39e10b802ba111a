# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk in memory whose requests end on command, in any order, with success or failure."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial


class Disk:
    """The slots of a `backing.store.SlotStore`, and their `submit`.

    Attributes:
        slots: the data of each slot.
        waiting: the requests under way, as (job, done).
        probes: the kind of each request for the label.
        writes: the slots of each write request, in the order of the requests.
        failing: the errno of all further requests, 0 for none.
        bad: the slots that cannot be read; a request with one of them fails.
    """

    def __init__(self, page_size: int, slots: int) -> None:
        self.page_size = page_size
        self.slots = [b"\xdb" * page_size for _ in range(slots)]
        self.waiting: list[tuple[Callable[[], None], Callable[[int], None]]] = []
        self.writes: list[tuple[int, int]] = []
        self.probes: list[str] = []
        self.failing = 0
        self.bad: set[int] = set()

    def read(self, first: int, pages: Sequence[memoryview]) -> None:
        if not self.bad.isdisjoint(range(first, first + len(pages))):
            raise OSError(errno.EIO, "a bad sector")
        for number, page in enumerate(pages, first):
            page[:] = self.slots[number]

    def write(self, first: int, pages: Sequence[memoryview]) -> None:
        self.writes.append((first, len(pages)))
        for number, page in enumerate(pages, first):
            self.slots[number] = bytes(page)

    def reading(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        return partial(self.read, first, pages)

    def writing(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        return partial(self.write, first, pages)

    def labelling(self, *, writes: bool) -> Callable[[], None]:
        self.probes.append("write" if writes else "read")
        return lambda: None

    def submit(self, job: Callable[[], None], done: Callable[[int], None]) -> None:
        self.waiting.append((job, done))

    def finish(self, place: int = 0, code: int | None = None) -> None:
        """End a request; a failed one has done half of its work, or has written other data."""
        job, done = self.waiting.pop(place)
        code = self.failing if code is None else code
        if code != errno.ENODEV:  # then nothing has reached the disk
            try:
                job()
            except OSError as error:
                code = error.errno or errno.EIO
        done(code)

    def finish_all(self) -> None:
        while self.waiting:
            self.finish()
