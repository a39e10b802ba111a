# SPDX-License-Identifier: GPL-2.0-or-later
"""Serve one FUSE session: pyfuse3 on a mount's descriptor, with the hook in front of it.

pyfuse3 gets `/dev/fd/N` as mountpoint, so that it neither mounts nor unmounts: a session is begun
on a new mount, or taken over in the middle from a process that has died (`adopt`), which only the
hook makes possible.

The hook (`_lowlevel.c`) is switched on here. Without it, on purpose or because the dynamic linker
bound pyfuse3 elsewhere, everything works but discards (freed swap slots are then never heard of)
and being taken over.

Limits: one session per process, since pyfuse3 keeps its session in module globals.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import pyfuse3
import trio

from zswapd import counters
from zswapd.errors import MountError
from zswapd.fuse import lowlevel, lowlevel_problem
from zswapd.fuse.mount import MAX_IO, Mount

if TYPE_CHECKING:
    from types import TracebackType

    from zswapd.fuse.operations import Operations

log = logging.getLogger(__name__)

MOST_WAITING = 3072
"""Requests that may wait for slow files at once, of all cache volumes together.

`volumes/gate.py` keeps to it.
"""

MAX_BACKGROUND = 256 + MOST_WAITING
"""Asynchronous requests under way at once. 256 are more than a loop device has (128).

With fewer, its kernel thread sleeps until one is answered and is woken for each request: one more
switch for every request, and the swapping program gets moved about. The kernel's own 12 cost a
quarter of the random reads at queue depth 32 besides (109 000 a second against 148 000). The rest
is for readers of slow files that go around the page cache: when all of these wait, swap still has
its own.
"""

MAX_TASKS = 1024 + MOST_WAITING
"""Requests that coroutines may have under way at once.

When all wait, nobody fetches the next one, of swap either: so more than ever wait for slow files. A
task takes some kilobytes, while it lives.
"""


@dataclass(frozen=True, slots=True)
class LatencyStatistics:
    """How long requests took from the queue to the end of their answer; one in 64 is timed."""

    counts: tuple[int, ...]
    """Requests of at most 1, 2, 4, … µs, and more than the one before; the last has no bound."""
    seconds: float
    """All of them together."""


counters.declare(LatencyStatistics, cumulative="counts seconds")


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """Counters of a session since it was opened.

    Requests are counted when they are answered or passed on.
    """

    hook_active: bool
    """Whether the hook answers reads, writes and discards."""
    discard_available: bool
    """Whether the file system takes discards at all; False without the hook."""
    reads: int
    writes: int
    discards: int
    """Punched holes and zeroed ranges, refused ones included."""
    others: int
    """Everything else: look-ups, opens, attributes."""
    read_bytes: int
    written_bytes: int
    """Bytes moved by the hook."""
    refused_writes: int
    """Writes that the pool turned away; the kernel keeps the pages."""
    refused_writers: int
    """Opens for writing of a file that was attached or open for writing,
    and changes through other open files.
    """
    drained: int
    """Requests taken from the queue without a turn of the event loop before them."""
    receives: int
    """Turns of the event loop that asked for a request."""
    polls: int
    """Times the session waited for the next request instead of sleeping."""
    poll_hits: int
    """Those of them in which one came."""
    poll_seconds: float
    """Time spent in all of them; processor time, as long as no other process wanted it."""
    crowded_polls: int
    """Those of them that were given up, since another process wanted the processor."""
    naps: int
    """Times the session slept for the next request without going back to the event loop for it."""
    nap_hits: int
    """Those of them that a request or an answer of the disk ended."""
    budget_ends: int
    """Times the queue was left, though busy, to let the event loop run."""
    reads_ahead: int
    """Times the next pages of a sequential reader were fetched before it asked."""
    reads_ahead_hits: int
    """Those of them that it then asked for.

    The pages of the others count as loaded all the same.
    """
    scarcities: int
    """Times that the system's free memory became scarce, and the session's thread a real-time one.
    """
    deferred: int
    """Requests that waited for the disk behind the pool, and were answered later."""
    resent: int
    """Requests that came again, because a worker had died before it answered them."""
    let_go: int
    """Readers of cache volumes that were killed while they waited."""
    request_errors: int
    """Requests that the hook answered with an errno."""
    reply_errors: int
    """Replies that the kernel no longer wanted, e.g. because the reader was killed."""
    internal_errors: int
    """Unexpected exceptions in handlers: bugs, answered with EIO."""
    failed_requests: int
    """Requests that failed for a reason with a name.

    Such as a page that does not match its checksum.
    """
    read_latency: LatencyStatistics
    write_latency: LatencyStatistics
    """Of the reads and writes that the hook answers; pages read ahead take next to no time."""
    max_background: int
    """As agreed with the kernel; 0 if it was left at the kernel's own."""


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
    """Has the hook look at free memory before the event loop's tasks run.

    They may ask the kernel for some (`set_scarce`).
    """

    def after_io_wait(self, timeout: float) -> None:
        """Look, after each time that the loop slept or looked for events."""
        if lowlevel is not None:
            lowlevel.check_memory()


class Session:
    """The service of one mounted file system.

    A context manager, with `serve` for the time in between.

    Args:
        operations: what answers; its directory must be complete.
        mount: what to serve: an open `Mount`, which stays when the session ends, or the mountpoint
            of one to be made and undone with the session.
        hook: False to go without `_lowlevel.c`: slower, without discard, and no process can take
            the session over.
        poll_us: longest wait for the next request after one was answered, µs; 0 sleeps at once.
        budget_us: longest time for which a full queue keeps the event loop from its other tasks,
            µs.
        device: the FUSE device node, for a mount to be made.
        shared: memory that outlives the process, `handover.hook_bytes(MAX_IO)` bytes, for the hook.
        adopt: whether a process before us has served this mount, with the same `shared`.
        resend: False to take a session over as with a kernel that cannot send requests again
            (before Linux 6.9).

    Attributes:
        hook_active: whether the hook serves this session; known once it is open.
        hook_problem: why not, empty if it does.
    """

    _current: ClassVar[Session | None] = None

    def __init__(
        self,
        operations: Operations,
        mount: Mount | Path,
        *,
        hook: bool = True,
        poll_us: int = 400,
        budget_us: int = 2000,
        device: Path = Path("/dev/fuse"),
        shared: memoryview | None = None,
        adopt: bool = False,
        resend: bool = True,
    ) -> None:
        self.operations = operations
        self._mount = Mount(mount, device=device) if isinstance(mount, Path) else mount
        self._is_own_mount = isinstance(mount, Path)
        self.hook_active = False
        self.hook_problem = "" if hook else "it is switched off (fuse.hook)"
        self._poll_us = poll_us
        self._budget_us = budget_us
        self._shared = shared
        self._adopt = adopt
        self._resend = resend
        self._undo = contextlib.ExitStack()
        self._is_terminating = False

    @property
    def mountpoint(self) -> Path:
        """Where the files are, by the name that mountinfo has."""
        return self._mount.mountpoint

    @property
    def descriptor(self) -> int:
        """The FUSE connection's descriptor, the mount's own."""
        return self._mount.descriptor

    @property
    def device(self) -> int:
        """St_dev of the files, 0 if that is not known."""
        return self._mount.device

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Mount if that is left to do, so that the files can be opened as soon as `serve` runs.

        Raises:
            PermissionsError: no FUSE device, or not allowed to mount.
            MountError: the mountpoint cannot be used, this process has a session already, or a
                session is to be taken over without the hook. In all cases everything is as before.
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
        if not self.hook_active:
            log.warning("discard is off, since the FUSE hook is not in use: %s", self.hook_problem)

    def close(self) -> None:
        """Give everything back, unmount if `open` mounted; does nothing on a closed session.

        `serve` must have returned.
        """
        self._undo.close()
        self.hook_active = False

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until `terminate` is called or somebody unmounts.

        `started` means files can be opened.

        Raises:
            MountError: the kernel's first message could not be answered.
        """
        agreed = trio.Event()

        async def announce() -> None:
            await agreed.wait()
            task_status.started()

        self.operations.on_init = agreed.set
        async with trio.open_nursery() as nursery:
            nursery.start_soon(announce)
            if self._adopt and lowlevel is not None and lowlevel.adopt(resend=self._resend):
                nursery.start_soon(self._poke)
            nursery.start_soon(self.operations.interrupts.run)
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
        if self._is_terminating:
            if not agreed.is_set():
                task_status.started()  # whoever waits for it asked for the end as well
        elif agreed.is_set():
            log.warning("%s was unmounted by somebody else", self.mountpoint)
        else:
            raise MountError(
                "the kernel and libfuse could not agree on a protocol",
                hint="see the messages above; kernel 5.10 and libfuse 3.10 or later are needed",
            )

    async def _poke(self) -> None:
        """Make a request of our own, so that the one left behind is looked at although no other comes."""
        await trio.to_thread.run_sync(os.statvfs, self.mountpoint, abandon_on_cancel=True)

    def terminate(self) -> None:
        """Make `serve` return. To be called from the event loop's thread."""
        self._is_terminating = True
        pyfuse3.terminate()

    def set_poll_us(self, poll_us: int) -> None:
        """Change the longest wait for the next request, µs; without the hook it changes nothing."""
        self._poll_us = poll_us
        if lowlevel is not None and self.hook_active:
            lowlevel.set_poll_us(poll_us)

    def set_scarce(self, free_bytes: int) -> None:
        """Say below how much free memory this thread is to be a real-time one.

        Without the hook it is none.
        """
        if lowlevel is not None and self.hook_active:
            lowlevel.set_scarce(free_bytes)

    def statistics(self) -> SessionStatistics:
        """Return the counters; those of the hook are 0 when it is not active."""
        plain = self.operations.statistics()
        hook = (
            lowlevel.statistics()
            if lowlevel is not None and self.hook_active
            else dict.fromkeys(_COUNTERS, 0)
        )
        latencies = (
            lowlevel.latencies()
            if lowlevel is not None and self.hook_active
            else (_UNTIMED, _UNTIMED)
        )
        read_latency, write_latency = (
            LatencyStatistics(counts, ns / 1e9) for counts, ns in latencies
        )
        return SessionStatistics(
            hook_active=self.hook_active,
            discard_available=self.hook_active,
            reads=hook["read"] + plain.reads,
            writes=hook["write"] + plain.writes,
            discards=hook["fallocate"],
            others=hook["other"] if self.hook_active else plain.others,
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
            max_background=hook["max_background"],
        )

    def _start_pyfuse3(self, undo: contextlib.ExitStack) -> None:
        if not self.hook_problem:
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
            # Unmount while somebody has the connection open: a mount without one cannot be told
            # from a dead one.
            undo.callback(self._mount.unmount)
        if not self.hook_problem and lowlevel is not None and lowlevel.hooked():
            self.hook_active = True
            return
        self.hook_problem = (
            self.hook_problem
            or "pyfuse3 was loaded before zswapd.fuse, or calls libfuse by another name"
        )
        if self._adopt:
            raise MountError(
                f"the session cannot be taken over without the FUSE hook: {self.hook_problem}"
            )

    def _attach_hook(self, undo: contextlib.ExitStack) -> None:
        if lowlevel is None:
            self.hook_problem = lowlevel_problem
            return
        lowlevel.attach(
            self.operations.serve_read,
            self.operations.serve_write,
            self.operations.serve_fallocate,
            poll_us=self._poll_us,
            budget_us=self._budget_us,
            max_io=MAX_IO,
            max_background=MAX_BACKGROUND,
            shared=self._shared,
            interrupt=self.operations.interrupts.interrupt,
            admit=self.operations.admit,
            checks_requests=not (self._resend and can_resend()),
        )
        undo.callback(lowlevel.detach)
        self.operations.writers.when_void = lowlevel.forget_writer
        for inode in self.operations.directory.block_files:
            lowlevel.add_inode(inode)


def can_resend() -> bool:
    """Say whether this kernel can send again the requests that a dead process has not answered.

    That is FUSE_NOTIFY_RESEND.
    """
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return release is not None and (int(release[1]), int(release[2])) >= _RESEND


_RESEND = (6, 9)
"""The first Linux with FUSE_NOTIFY_RESEND."""
_UNTIMED: tuple[tuple[int, ...], int] = ((0,) * 21, 0)


def forget_inode(inode: int) -> None:
    """Have the kernel forget pages and attributes of an inode.

    Waits for its readers, so never in the event loop's thread.
    """
    with contextlib.suppress(OSError):  # ENOENT: it knows of none
        pyfuse3.invalidate_inode(inode)


def forget_name(parent: int, name: str) -> None:
    """Have the kernel forget a name in a directory.

    Waits for look-ups there, so never in the event loop's thread.
    """
    with contextlib.suppress(OSError):
        pyfuse3.invalidate_entry(parent, name.encode(errors="surrogateescape"))


_COUNTERS = (
    "read",
    "write",
    "fallocate",
    "read_bytes",
    "write_bytes",
    "other",
    "drained",
    "receives",
    "polls",
    "poll_hits",
    "poll_ns",
    "crowded_polls",
    "naps",
    "nap_hits",
    "budget_ends",
    "scarcities",
    "deferred",
    "resent",
    "aheads",
    "ahead_hits",
    "errors",
    "exceptions",
    "reply_errors",
    "max_background",
)
