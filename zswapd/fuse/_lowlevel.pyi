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
    """Make these functions answer the block inodes of the next FUSE session; zero the counters.

    The functions run in the session's thread and must not raise. `read(inode, offset, out)` fills
    `out` from its beginning and returns the number of bytes. `write(inode, offset, data)` returns
    the number of bytes that it took. `fallocate(inode, mode, offset, length)` returns 0. Each may
    return -errno instead, or -EINPROGRESS if `reply` will answer. `write` may return -EALREADY:
    the request stays in the buffer until `resume`. The views are valid during the call only,
    because the next request uses them again. They must not be released.

    Args:
        read: fills a view with data.
        write: takes data from a view.
        fallocate: punches or zeroes a range.
        poll_us: longest wait for the next request after an answer in µs; 0 for no wait.
        budget_us: longest time between two turns of the event loop in µs.
        max_io: longest read and longest write in bytes; a multiple of the page, up to 64 MiB.
        max_background: limit of asynchronous requests in flight.
        shared: writable memory that outlives the process, on a page boundary and of
            `handover.hook_bytes(max_io)` bytes. It holds the request buffer and the survivor page
            for a successor. None for private memory.
        interrupt: called with the number of a request whose client got a signal.
        admit: called with an inode and a handle before a change of the file, if the last admitted
            handle was another one; returns 0, or -errno to refuse the request.
        checks_requests: True to give each request a checksum, because a successor may have to take
            the last request from `shared`.

    Raises:
        RuntimeError: functions are attached already.
        ValueError: `max_io` or `max_background` is out of range, or `shared` is too small.
        OSError: there is no memory for the buffers.
    """

def adopt(*, resend: bool = True) -> bool:
    """Take over a session that another process has served with the same `shared`.

    It must be called before the first request is received. It repeats FUSE_INIT to libfuse, and
    asks the kernel to resend all unanswered requests (Linux 6.9).

    Args:
        resend: False to work without FUSE_NOTIFY_RESEND, as with an older kernel.

    Returns:
        True if the kernel cannot resend and the buffer has an unanswered request. It is answered
        when the next request arrives. A request with a wrong checksum was answered with EIO.

    Raises:
        RuntimeError: there is no session since `attach()`, or both copies of FUSE_INIT in `shared`
            are damaged.
    """

def detach() -> None:
    """Drop functions, inodes and buffers. No session may be served any more."""

def unique() -> int:
    """Return the kernel's number of the present request; 0 if there is none (read-ahead)."""

def takes_part() -> bool:
    """Return whether the present reader accepts a short answer and requests the rest again.

    The kernel's page cache does not: it takes a short answer for the end of the file.
    """

def reply(unique: int, error: int, payload: bytes | memoryview) -> None:
    """Answer a deferred request.

    `reply_errors` counts answers for which the kernel does not wait any more.

    Args:
        unique: the kernel's number of the request.
        error: an errno, or 0.
        payload: bytes after the header; empty with an errno.
    """

def resume() -> None:
    """Serve the write for which `write` returned -EALREADY. It may return that again.

    Until then the write stays in the buffer, and the hook takes no other request.
    """

def on_disk_ready(fd: int, function: Callable[[], object]) -> None:
    """Call a function when a descriptor is readable while the session naps between two requests.

    Requests that wait for the disk are thus answered without a turn of the event loop. The event
    loop must watch the descriptor too, for its longer sleeps. An exception of the function ends the
    process.

    Args:
        fd: the descriptor; it belongs to the caller and must stay open until `detach`.
        function: reads the descriptor.
    """

def set_poll_us(poll_us: int) -> None:
    """Set the longest wait for the next request in µs."""

def current() -> tuple[int, int]:
    """Return the number of the last request that pyfuse3 got, and its client's thread.

    Return (0, 0) if there was none. In a handler, before its first await, it is its own request.
    """

def set_scarce(free_bytes: int) -> None:
    """Make the session's thread real-time (SCHED_RR) while the system has less free memory.

    Free memory is checked here, after each batch of requests, and by `check_memory`. If the thread
    is real-time at the first call, it becomes an ordinary task as soon as memory is not scarce.

    Args:
        free_bytes: the limit of free memory in bytes; 0 does not change the thread.
    """

def check_memory() -> None:
    """Check the system's free memory now."""

def hooked() -> bool:
    """Return whether a session was created through this module since `attach()`."""

def add_inode(inode: int) -> None:
    """Make the attached functions serve an inode.

    Raises:
        ValueError: the inode is 65536 or more.
    """

def forget_writer(inode: int) -> None:
    """Drop the admitted handle and the read-ahead of a file, which may be out of date."""

def remove_inode(inode: int) -> None:
    """Make pyfuse3's handlers serve an inode again."""

def statistics() -> dict[str, int]:
    """Return the counters since `attach()`; `session.SessionStatistics` describes them."""

def latencies() -> tuple[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]]:
    """Return (counts, ns) of the timed reads and of the timed writes since `attach()`.

    One request in 64 is timed. The counts are those of requests that took at most 1, 2, 4, …
    2^19 µs and more than the bound before; the last count has no bound. ns is their total time.
    """
