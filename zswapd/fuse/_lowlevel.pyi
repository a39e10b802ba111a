# SPDX-License-Identifier: GPL-2.0-or-later
from collections.abc import Callable

def attach(
    read: Callable[[int, int, memoryview], int],
    write: Callable[[int, int, memoryview], int],
    fallocate: Callable[[int, int, int, int], int],
    *,
    poll_us: int,
    budget_us: int,
    max_io: int,
    max_background: int,
    shared: memoryview | None = None,
    interrupt: Callable[[int], object] | None = None,
    admit: Callable[[int, int], int] | None = None,
    checks_requests: bool = False,
) -> None:
    """Have the next FUSE session answer its block inodes through these functions.

    Zeroes the counters.

    The functions run in the session's thread and must not raise. `read(inode, offset, out)` fills
    `out` from its beginning and returns how many bytes; `write(inode, offset, data)` returns how
    many it took; `fallocate(inode, mode, offset, length)` returns 0; each may return -errno
    instead, or -EINPROGRESS for "later, by `reply`". The views are valid during the call only (they
    are used again for the next request) and must not be released.

    Args:
        read: fills a view with data.
        write: takes data from a view.
        fallocate: punches or zeroes a range.
        poll_us: the longest wait for the next request after one was answered, µs; 0 never waits.
        budget_us: longest time between two turns of the event loop, µs.
        max_io: longest read and longest write, bytes; a multiple of the page, up to 64 MiB.
        max_background: asynchronous requests the kernel may have under way at once.
        shared: writable memory that outlives the process, for the request buffer and what a
            successor needs (a survivor page; `handover.hook_bytes(max_io)` bytes on a page
            boundary). Private memory if None.
        interrupt: called with the number of a request whose requester has got a signal.
        admit: called with an inode and a handle that is about to change the file, and that was not
            the last one admitted; returns 0, or -errno for a request that is to be refused.
        checks_requests: a successor may have to take the last request from `shared`, so each of
            them gets a checksum.

    Raises:
        RuntimeError: attached already.
        ValueError: `max_io` or `max_background` is out of range, or `shared` too small.
        OSError: no memory for the buffers.
    """

def adopt(*, resend: bool = True) -> bool:
    """Take over a session that another process has served with the same `shared`.

    Before the first request is received.

    FUSE_INIT is repeated to libfuse, and the kernel asked to send again what was read and not
    answered (Linux 6.9).

    Args:
        resend: False to do without that, as with an older kernel.

    Returns:
        True if the kernel cannot, and a request is left in the buffer: it is answered when the next
        one comes. One that does not match its checksum has been answered with EIO.

    Raises:
        RuntimeError: no session was created since `attach()`; or what `shared` has of FUSE_INIT is
            damaged, in both places.
    """

def detach() -> None:
    """Forget functions, inodes and buffers; only when no session is served any more."""

def unique() -> int:
    """Return the kernel's number of the request that is being served.

    0 if there is none, as when the hook reads ahead.
    """

def takes_part() -> bool:
    """Say whether the reader that is being served takes a short answer for what it is.

    Such a reader asks again for the rest; the kernel's page cache would take it for the end of the
    file.
    """

def reply(unique: int, error: int, payload: bytes | memoryview) -> None:
    """Answer a request that was deferred.

    One that the kernel does not wait for any more is counted, as `reply_errors`.

    Args:
        unique: its number.
        error: an errno, or 0.
        payload: what goes behind the header; empty with an errno.
    """

def on_disk_ready(fd: int, function: Callable[[], object]) -> None:
    """Call a function whenever a descriptor is readable while the session sleeps for the next request, between two of these.

    So whoever waits for the disk is answered without a turn of the event loop, which has to look at
    the descriptor as well: it sleeps longer. A function that raises ends the process.

    Args:
        fd: stays the caller's, and open until `detach`.
        function: reads what there is.
    """

def set_poll_us(poll_us: int) -> None:
    """Change the longest wait for the next request, µs."""

def current() -> tuple[int, int]:
    """Return the number of the last request that pyfuse3 was given, and the thread that made it.

    (0, 0) if there was none.

    Within a handler, before its first await, that is its own.
    """

def set_scarce(free_bytes: int) -> None:
    """Have the session's thread be a real-time one.

    (SCHED_RR) whenever the system has less free memory; 0 leaves it as it is.

    Looked at here, after each batch of requests, and by `check_memory`. A thread that is a
    real-time one when this is first set stops being one when memory is not scarce.
    """

def check_memory() -> None:
    """Look at the system's free memory now."""

def hooked() -> bool:
    """Tell whether a session was created through this module since `attach()`."""

def add_inode(inode: int) -> None:
    """Have the attached functions serve this inode, a number below 65536 (ValueError otherwise)."""

def forget_writer(inode: int) -> None:
    """Forget which handle may change a file, and what was read ahead: either may be out of date."""

def remove_inode(inode: int) -> None:
    """Leave this inode to pyfuse3's own handlers again."""

def statistics() -> dict[str, int]:
    """Return the counters since `attach()`; the meaning of each is in `session.SessionStatistics`."""

def latencies() -> tuple[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]]:
    """Return (counts, ns) of the reads and of the writes that were timed since `attach()`.

    One request in 64.

    counts are of requests that took at most 1, 2, 4, … 2^19 µs and more than the bound before; the
    last has no bound. ns is the time of all of them.
    """
