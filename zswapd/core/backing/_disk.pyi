# SPDX-License-Identifier: GPL-2.0-or-later
from collections.abc import Callable, Sequence

class Cipher:
    """AES-256-XTS. Each page is one data unit, and its slot's number is the tweak.

    Sources: IEEE 1619; plain64 of dm-crypt.
    """

    def __new__(cls, key: bytes | memoryview, lanes: Sequence[memoryview]) -> Cipher:
        """Make a cipher.

        Args:
            key: 64 bytes, one AES key for data and one for tweaks.
            lanes: one buffer for each thread that may encrypt at the same time. Each buffer has
                room for the pages of the longest request.

        Raises:
            ValueError: the key has another length, or its halves are equal (a sign of memory that
                was never filled).
        """

class Job:
    """One request to a file or device. Call it, or submit it to a queue, but only once."""

    def __new__(
        cls,
        fd: int,
        writes: bool,
        offset: int,
        pages: Sequence[memoryview],
        slot: int = 0,
        cipher: Cipher | None = None,
    ) -> Job:
        """Make a request.

        Args:
            fd: descriptor; the caller keeps it and closes it.
            writes: true for a write, false for a read.
            offset: where the request begins, in bytes.
            pages: buffers of equal length.
            slot: number of the first page's slot.
            cipher: encrypts written pages into its own memory; decrypts read pages in place.

        Raises:
            ValueError: there is no page, there are too many pages for one request or for the
                cipher, or the pages differ in length.
        """

    def __call__(self) -> None:
        """Carry the request out in this thread, without the GIL.

        Raises:
            OSError: as the device says; EIO for a request that ends before the last page.
        """

class Queue:
    """Jobs for the threads that call `work`.

    Attributes:
        fd: readable when a job has ended.
        spin_ns: how long a thread spins for the next job after a quick read, in ns; 0 for never.
    """

    fd: int
    spin_ns: int

    def submit(self, job: Job, done: Callable[[int], None]) -> None:
        """Queue a job. `ended` returns `done` when the job has ended."""

    def work(self) -> None:
        """Carry out jobs in this thread without the GIL; never return."""

    def ended(self) -> list[tuple[Callable[[int], None], int]]:
        """Return the `done` of each job that has ended since the last call, with 0 or an errno."""
