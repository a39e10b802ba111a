# SPDX-License-Identifier: GPL-2.0-or-later
"""The FUSE session: pyfuse3 on the descriptor of a mount, with the hook in front of it.

pyfuse3 gets `/dev/fd/N` as its mountpoint, so that it neither mounts nor unmounts. A session starts
on a new mount, or it takes over the mount of a process that has died (`adopt`). Only the hook makes
a takeover possible.

The session switches the hook (`_lowlevel.c`) on, and refuses to start without it. pyfuse3 alone has
no discards, so freed swap slots would keep their memory. No process could take its session over.

Limits: one session per process, because pyfuse3 keeps its session in module globals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import pyfuse3
import trio

from zswapd import counters
from zswapd.errors import MountError
from zswapd.fuse import hook_error, lowlevel, require_hook
from zswapd.fuse.held import NONE_HELD, HeldStatistics, HeldWrites
from zswapd.fuse.mount import MAX_IO, Mount

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.memory import StoreMemory
    from zswapd.fuse.operations import Operations

log = logging.getLogger(__name__)

MOST_WAITING = 3072
"""Limit of requests that wait for slow files, for all cache volumes together.

`volumes/gate.py` enforces it.
"""

MAX_BACKGROUND = 256 + MOST_WAITING
"""Limit of asynchronous requests in flight. 256 of them are for swap; a loop device has 128.

With fewer, the loop device's kernel thread sleeps until a request is answered and is woken for each
request. That is one more context switch a request, and the scheduler moves the swapping program
between processors. The kernel's default of 12 also costs a quarter of the random reads at queue
depth 32 (109 000 instead of 148 000 a second). The others are for readers of slow files that bypass
the page cache. If all of these wait, swap still has its own.
"""

MAX_TASKS = 1024 + MOST_WAITING
"""Limit of requests in flight in coroutines.

If all tasks wait, no task fetches the next request, not even one of swap. The limit is therefore
higher than the number of requests that can wait for slow files. A task takes a few kilobytes while
it lives.
"""


@dataclass(frozen=True, slots=True)
class LatencyStatistics:
    """The times of requests from the queue to the end of the answer; one request in 64 is timed."""

    counts: tuple[int, ...]
    """Requests of at most 1, 2, 4, … µs and more than the bound before; the last has no bound."""
    seconds: float
    """Time of all timed requests."""


counters.declare(LatencyStatistics, cumulative="counts seconds")


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """The counters of a session since it was opened.

    A request is counted when it is answered or passed on.
    """

    reads: int
    writes: int
    discards: int
    """Punched holes and zeroed ranges, including refused ones."""
    others: int
    """All other requests, such as look-ups, opens and attributes."""
    read_bytes: int
    """Bytes that the hook read."""
    written_bytes: int
    """Bytes that the hook wrote."""
    refused_writes: int
    """Writes that the pool refused; the kernel keeps the pages."""
    refused_writers: int
    """Opens for writing and changes that were refused because of another writer."""
    drained: int
    """Requests that were taken from the queue without a turn of the event loop before them."""
    receives: int
    """Turns of the event loop that asked for a request."""
    polls: int
    """Polls: waits for the next request without sleep."""
    poll_hits: int
    """Polls that ended with a request."""
    poll_seconds: float
    """Time of all polls. It is processor time while no other process wants the processor."""
    crowded_polls: int
    """Polls that ended because another process wanted the processor."""
    naps: int
    """Naps: sleeps for the next request without a return to the event loop."""
    nap_hits: int
    """Naps that a request or an answer of the disk ended."""
    budget_ends: int
    """Times that the session left a busy queue to let the event loop run."""
    reads_ahead: int
    """Read-aheads: the next pages of a sequential reader were fetched early."""
    reads_ahead_hits: int
    """Read-aheads whose pages the reader then requested. All read-aheads count as loads."""
    scarcities: int
    """Times that free memory became scarce and the session's thread became real-time."""
    deferred: int
    """Requests that waited for the disk behind the pool and were answered later."""
    resent: int
    """Requests that the kernel sent again because a worker died before it answered them."""
    let_go: int
    """Readers of cache volumes that were killed while they waited."""
    request_errors: int
    """Requests that the hook answered with an errno."""
    reply_errors: int
    """Replies for which the kernel did not wait any more, for example to a killed reader."""
    internal_errors: int
    """Unexpected exceptions in handlers, which are bugs and were answered with EIO."""
    failed_requests: int
    """Requests that failed with an expected error, such as a page with a wrong checksum."""
    read_latency: LatencyStatistics
    """Times of reads that the hook answers. A read that was fetched early takes almost no time."""
    write_latency: LatencyStatistics
    """Times of writes that the hook answers at once."""
    held: HeldStatistics
    """Writes that waited for memory."""
    max_background: int
    """Limit of asynchronous requests that the kernel has accepted; 0 for the kernel's default."""


counters.declare(
    SessionStatistics,
    cumulative=(
        "reads writes discards others read_bytes written_bytes refused_writes refused_writers"
        " drained receives polls poll_hits poll_seconds crowded_polls naps nap_hits budget_ends"
        " reads_ahead reads_ahead_hits scarcities deferred resent let_go request_errors"
        " reply_errors internal_errors failed_requests"
    ),
)


class MemoryMonitor(trio.abc.Instrument):
    """A trio instrument that makes the hook check free memory before the event loop's tasks run.

    The tasks may allocate memory (`set_scarce`).
    """

    def after_io_wait(self, timeout: float) -> None:
        """Check free memory each time after the loop has waited for events."""
        if lowlevel is not None:
            lowlevel.check_memory()


class Session:
    """The service of one mounted file system; a context manager around `serve`.

    Args:
        operations: the handlers; their directory must be complete.
        mount: an open `Mount`, which stays mounted after the session. Or the path of a mountpoint,
            which the session mounts and unmounts.
        poll_us: longest wait for the next request after an answer in µs; 0 sleeps at once.
        device: the FUSE device node, if the session mounts.
        shared: memory for the hook that outlives the process, `handover.hook_bytes(MAX_IO)` bytes.
        adopt: True if another process has served this mount before, with the same `shared`.
        resend: False for a takeover without FUSE_NOTIFY_RESEND, as before Linux 6.9.
    """

    _current: ClassVar[Session | None] = None

    def __init__(
        self,
        operations: Operations,
        mount: Mount | Path,
        *,
        poll_us: int = 400,
        device: Path = Path("/dev/fuse"),
        shared: memoryview | None = None,
        adopt: bool = False,
        resend: bool = True,
    ) -> None:
        self.operations = operations
        self._mount = Mount(mount, device=device) if isinstance(mount, Path) else mount
        self._is_own_mount = isinstance(mount, Path)
        require_hook()
        self._hook: Any = lowlevel
        self._poll_us = poll_us
        self._shared = shared
        self._adopt = adopt
        self._resend = resend
        self._can_resend = resend and can_resend()
        self._undo = contextlib.ExitStack()
        self._is_terminating = False

    @property
    def mountpoint(self) -> Path:
        """The mountpoint, as mountinfo has it."""
        return self._mount.mountpoint

    @property
    def descriptor(self) -> int:
        """The mount's descriptor of the FUSE connection."""
        return self._mount.descriptor

    @property
    def device(self) -> int:
        """The st_dev of the files, 0 if it is unknown."""
        return self._mount.device

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Mount if necessary, and prepare `serve`. An error undoes everything.

        Raises:
            PermissionsError: there is no FUSE device, or this process may not mount.
            MountError: the mountpoint or the hook cannot be used, or this process has a session
                already.
        """
        if Session._current is not None:
            raise MountError(
                "this process serves a mount already", hint="run one daemon per mountpoint"
            )
        with contextlib.ExitStack() as undo:
            Session._current = self
            undo.callback(setattr, Session, "_current", None)
            if self._is_own_mount:
                undo.enter_context(self._mount)
            self._start_pyfuse3(undo)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Undo `open`. `serve` must have returned. A repeat has no effect."""
        self._undo.close()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until `terminate` is called or the file system is unmounted.

        The task has started when the files can be opened.

        Raises:
            MountError: the kernel and libfuse could not agree on a protocol.
        """
        agreed = trio.Event()

        async def announce() -> None:
            await agreed.wait()
            task_status.started()

        self.operations.on_init = agreed.set
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce)
            if self._adopt and self._hook.adopt(resend=self._resend):
                nursery.start_soon(self._poke)
            nursery.start_soon(self.operations.interrupts.run)
            if self.operations.held is not None:
                nursery.start_soon(self.operations.held.run)
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
        if self._is_terminating:
            if not agreed.is_set():
                task_status.started()  # the caller waits for it and has asked for the end
        elif agreed.is_set():
            log.warning("%s was unmounted by another program", self.mountpoint)
        else:
            raise MountError(
                "the kernel and libfuse could not agree on a protocol",
                hint="see the messages above; kernel 5.10 and libfuse 3.10 or later are needed",
            )

    async def _poke(self) -> None:
        """Make a request, so that the request in the buffer is answered without another client."""
        await trio.to_thread.run_sync(os.statvfs, self.mountpoint, abandon_on_cancel=True)

    def terminate(self) -> None:
        """Make `serve` return. It must be called in the event loop's thread."""
        self._is_terminating = True
        pyfuse3.terminate()

    def add_block_file(self, inode: int) -> None:
        """Serve a block file that was added to the directory."""
        self.operations.add_block_file(inode)
        self._hook.add_inode(inode)

    def remove_block_file(self, inode: int) -> None:
        """Serve a block file no more; it is not in the directory, and not open for writing."""
        self._hook.remove_inode(inode)
        self.operations.remove_block_file(inode)

    def set_poll_us(self, poll_us: int) -> None:
        """Set the longest wait for the next request in µs."""
        self._poll_us = poll_us
        self._hook.set_poll_us(poll_us)

    def hold_writes(
        self, memory: StoreMemory, blame: Callable[[int], None], *, wait_s: float
    ) -> None:
        """Have writes wait for memory (held.py). Call it before `serve`.

        Args:
            memory: says whether there is memory for a write.
            blame: records the number of the request that is stored; 0 for none.
            wait_s: longest wait of a write, s; 0 for no waits.
        """
        self.operations.held = HeldWrites(
            memory,
            self.operations.store_held,
            wait_s=wait_s,
            room=MAX_IO if self._can_resend else 0,
            page_size=self.operations.page_size,
            unique=self._hook.unique,
            reply=self._hook.reply,
            blame=blame,
            resume=self._hook.resume,
        )

    def set_refill_wait(self, seconds: float) -> None:
        """Set the longest time for which a write waits for memory."""
        if self.operations.held is not None:
            self.operations.held.wait_s = seconds

    def set_scarce(self, free_bytes: int) -> None:
        """Set the free memory in bytes below which this thread becomes real-time."""
        self._hook.set_scarce(free_bytes)

    def statistics(self) -> SessionStatistics:
        """Return the counters."""
        plain = self.operations.statistics()
        hook = self._hook.statistics()
        read_latency, write_latency = (
            LatencyStatistics(counts, ns / 1e9) for counts, ns in self._hook.latencies()
        )
        return SessionStatistics(
            reads=hook["read"] + plain.reads,
            writes=hook["write"] + plain.writes,
            discards=hook["fallocate"],
            others=hook["other"],
            read_bytes=hook["read_bytes"],
            written_bytes=hook["write_bytes"],
            refused_writes=plain.refused_writes,
            refused_writers=plain.refused_writers,
            drained=hook["drained"],
            receives=hook["receives"],
            polls=hook["polls"],
            poll_hits=hook["poll_hits"],
            poll_seconds=hook["poll_ns"] / 1e9,
            crowded_polls=hook["crowded_polls"],
            naps=hook["naps"],
            nap_hits=hook["nap_hits"],
            budget_ends=hook["budget_ends"],
            reads_ahead=hook["aheads"],
            reads_ahead_hits=hook["ahead_hits"],
            scarcities=hook["scarcities"],
            deferred=hook["deferred"],
            resent=hook["resent"],
            let_go=plain.let_go,
            request_errors=hook["errors"],
            reply_errors=hook["reply_errors"],
            internal_errors=plain.internal_errors + hook["exceptions"],
            failed_requests=plain.failed_requests,
            read_latency=read_latency,
            write_latency=write_latency,
            held=self.operations.held.statistics() if self.operations.held else NONE_HELD,
            max_background=hook["max_background"],
        )

    def _start_pyfuse3(self, undo: contextlib.ExitStack) -> None:
        self._attach_hook(undo)
        descriptor = os.dup(self._mount.descriptor)
        try:
            pyfuse3.init(self.operations, f"/dev/fd/{descriptor}", set())
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, RuntimeError):
                raise MountError(f"libfuse: {error}", hint="see the messages above") from error
            raise
        undo.callback(pyfuse3.close, unmount=False)  # closes the duplicate
        if self._is_own_mount:
            # The unmount comes before the connection is closed. A mount without a connection would
            # look like the mount of a dead daemon.
            undo.callback(self._mount.unmount)
        if not self._hook.hooked():
            raise hook_error(
                "pyfuse3 was loaded before zswapd.fuse, or its calls of libfuse have other names"
            )

    def _attach_hook(self, undo: contextlib.ExitStack) -> None:
        self._hook.attach(
            self.operations.serve_read,
            self.operations.serve_write,
            self.operations.serve_fallocate,
            poll_us=self._poll_us,
            budget_us=_BUDGET_US,
            max_io=MAX_IO,
            max_background=MAX_BACKGROUND,
            shared=self._shared,
            interrupt=self.operations.interrupts.interrupt,
            admit=self.operations.admit,
            checks_requests=not self._can_resend,
        )
        undo.callback(self._hook.detach)
        self.operations.writers.when_void = self._hook.forget_writer
        for inode in self.operations.directory.block_files:
            self._hook.add_inode(inode)


def can_resend() -> bool:
    """Return whether this kernel can resend unanswered requests (FUSE_NOTIFY_RESEND)."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return release is not None and (int(release[1]), int(release[2])) >= _RESEND


_RESEND = (6, 9)
"""The first Linux with FUSE_NOTIFY_RESEND."""
_BUDGET_US = 2000
"""Longest time in µs for which a full queue delays the event loop's other tasks."""


def forget_inode(inode: int) -> None:
    """Invalidate the kernel's cached pages and attributes of an inode.

    It waits for readers of the inode and must not be called in the event loop's thread.
    """
    with contextlib.suppress(OSError):  # ENOENT: the kernel has none
        pyfuse3.invalidate_inode(inode)


def forget_name(parent: int, name: str) -> None:
    """Invalidate the kernel's cached name in a directory.

    It waits for look-ups in the directory and must not be called in the event loop's thread.
    """
    with contextlib.suppress(OSError):
        pyfuse3.invalidate_entry(parent, name.encode(errors="surrogateescape"))
