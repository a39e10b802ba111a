# SPDX-License-Identifier: GPL-2.0-or-later
from collections.abc import Callable, Sequence

class Cipher:
    """AES-256-XTS: each page is one data unit, its slot's number the tweak (IEEE 1619.

    Dm-crypt's plain64).
    """

    def __new__(cls, key: bytes | memoryview, lanes: Sequence[memoryview]) -> Cipher:
        """Make one.

        Args:
            key: 64 bytes, one AES key for data and one for tweaks.
            lanes: memory of whole pages, as long as the longest request, for each thread that may
                use it at a time.

        Raises:
            ValueError: the key has another length, or its halves are equal (as those of memory that
                was never filled are).
        """

class Job:
    """One request to a file or device. It may be done once in a queue, or called."""

    def __new__(
        cls,
        fd: int,
        writes: bool,
        offset: int,
        pages: Sequence[memoryview],
        slot: int = 0,
        cipher: Cipher | None = None,
    ) -> Job:
        """Make one.

        Args:
            fd: descriptor, which stays the giver's.
            writes: the direction.
            offset: where it begins, bytes.
            pages: buffers of one length.
            slot: number of the first page.
            cipher: encrypts what is written, and leaves the buffers as they are; decrypts what is
                read, where it is.

        Raises:
            ValueError: there is no page, or too many for one request or the cipher, or they differ
                in length.
        """

    def __call__(self) -> None:
        """Do it now, without the GIL.

        Raises:
            OSError: as the device says; EIO for one that ends before the last page.
        """

class Queue:
    """Jobs that threads do.

    Attributes:
        fd: readable when some have ended.
        spin_ns: how long a thread waits busily for the next job after a read that was quick; 0 for
            never.
    """

    fd: int
    spin_ns: int

    def submit(self, job: Job, done: Callable[[int], None]) -> None:
        """Have a job done, and `done` returned by `ended` then."""

    def work(self) -> None:
        """Do jobs in this thread as they come, without the GIL; never returns."""

    def ended(self) -> list[tuple[Callable[[int], None], int]]:
        """Return those that have ended since, each with 0 or an errno."""
