# SPDX-License-Identifier: GPL-2.0-or-later
"""Mount, serve, unmount: the life of one FUSE session.

The session opens /dev/fuse and calls mount(2) itself, and gives pyfuse3 `/dev/fd/N` as mountpoint. fusermount3
is not needed then, a mount option less is trusted to a parser, and a later process can take over a descriptor
that it was handed. Without allow_other the kernel keeps every other user out, even of `stat`.

All checks come before the first step, each step registers its undoing before the next, and `close` undoes them
in reverse, whatever failed. The directory that will be covered is locked with flock while the session lives: of
two daemons started at once on one mountpoint, one is refused. (The lock lies on the covered directory, which
nobody reaches through its name any more once it is covered; from then on mountinfo tells.)

The hook (`_lowlevel.c`) is switched on here. Without it, on purpose or because the dynamic linker bound pyfuse3
elsewhere, everything works but discards: freed swap slots are then never heard of.

Limits: one session per process, since pyfuse3 keeps its session in module globals.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import pyfuse3
import trio

from zswapd import carry
from zswapd.errors import MountError, PermissionsError
from zswapd.fuse import lowlevel, lowlevel_problem

if TYPE_CHECKING:
    from types import TracebackType

    from zswapd.fuse.operations import Operations

log = logging.getLogger(__name__)

MAX_IO = 1 << 20
"""Longest read and write in bytes; 256 pages of 4 KiB are the most that the kernel puts into one request."""

MAX_BACKGROUND = 64
"""Asynchronous requests under way at once. The kernel's own 12 cost a quarter of the random reads at queue
depth 32 (109 000 a second against 148 000); 32, 64 and 128 are the same."""

_FILESYSTEM = b"fuse.zswapd"
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """Counters of a session since it was opened; requests are counted when they are answered or passed on."""

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
    """Those of them that a request ended."""
    budget_ends: int
    """Times the queue was left, though busy, to let the event loop run."""
    reads_ahead: int
    """Times the next pages of a sequential reader were fetched before it asked."""
    reads_ahead_hits: int
    """Those of them that it then asked for. The pages of the others count as loaded all the same."""
    request_errors: int
    """Requests that the hook answered with an errno."""
    reply_errors: int
    """Replies that the kernel no longer wanted, e.g. because the reader was killed."""
    internal_errors: int
    """Unexpected exceptions in handlers: bugs, answered with EIO."""
    failed_requests: int
    """Requests that failed for a reason with a name, such as a page that does not match its checksum."""
    max_background: int
    """As agreed with the kernel; 0 if it was left at the kernel's own."""


carry.declare(
    SessionStatistics,
    cumulative=(
        "reads writes discards others read_bytes written_bytes refused_writes drained receives polls "
        "poll_hits poll_seconds crowded_polls naps nap_hits budget_ends reads_ahead reads_ahead_hits "
        "request_errors reply_errors internal_errors failed_requests"
    ),
)


class Session:
    """One mounted file system; a context manager around its mount, with `serve` for the time in between.

    Args:
        operations: what answers; its directory must be complete.
        mountpoint: an empty directory, or a name that does not exist yet: it is then made (0700) and removed
            at the end.
        hook: False to go without `_lowlevel.c`: slower, and without discard.
        poll_us: longest wait for the next request after one was answered, µs; 0 sleeps at once.
        budget_us: longest time for which a full queue keeps the event loop from its other tasks, µs.
        device: the FUSE device node.

    Attributes:
        hook_active: whether the hook serves this session; known once it is open.
        hook_problem: why not, empty if it does.
    """

    _current: ClassVar[Session | None] = None

    def __init__(
        self,
        operations: Operations,
        mountpoint: Path,
        *,
        hook: bool = True,
        poll_us: int = 100,
        budget_us: int = 2000,
        device: Path = Path("/dev/fuse"),
    ) -> None:
        self.operations = operations
        self.mountpoint = _without_links(mountpoint)
        self.hook_active = False
        self.hook_problem = "" if hook else "it is switched off (fuse.hook)"
        self._poll_us = poll_us
        self._budget_us = budget_us
        self._device = device
        self._undo = contextlib.ExitStack()
        self._is_terminating = False

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def open(self) -> None:
        """Mount, so that the files can be opened as soon as `serve` runs.

        Raises:
            PermissionsError: no FUSE device, or not allowed to mount.
            MountError: the mountpoint cannot be used, or this process has a session already. In both cases
                everything is as before.
        """
        if Session._current is not None:
            raise MountError("this process serves a mount already", hint="run one daemon per mountpoint")
        self._check_privileges()
        self._check_not_mounted()
        with contextlib.ExitStack() as undo:
            Session._current = self
            undo.callback(setattr, Session, "_current", None)
            self._make_mountpoint(undo)
            self._lock_mountpoint(undo)
            descriptor = self._mount(undo)
            self._start_pyfuse3(descriptor, undo)
            self._undo = undo.pop_all()
        if not self.hook_active:
            log.warning("discard is off, since the FUSE hook is not in use: %s", self.hook_problem)

    def close(self) -> None:
        """Unmount and give everything back; does nothing on a closed session. `serve` must have returned."""
        self._undo.close()
        self.hook_active = False

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer requests until `terminate` is called or somebody unmounts; `started` means files can be opened.

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
            await pyfuse3.main()
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

    def terminate(self) -> None:
        """Make `serve` return. To be called from the event loop's thread."""
        self._is_terminating = True
        pyfuse3.terminate()

    def set_poll_us(self, poll_us: int) -> None:
        """Change the longest wait for the next request, µs; without the hook it changes nothing."""
        self._poll_us = poll_us
        if lowlevel is not None and self.hook_active:
            lowlevel.set_poll_us(poll_us)

    def statistics(self) -> SessionStatistics:
        """Return the counters; those of the hook are 0 when it is not active."""
        plain = self.operations.statistics()
        hook = lowlevel.statistics() if lowlevel is not None and self.hook_active else dict.fromkeys(_COUNTERS, 0)
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
            request_errors=hook["errors"],
            reply_errors=hook["reply_errors"],
            internal_errors=plain.internal_errors + hook["exceptions"],
            failed_requests=plain.failed_requests,
            max_background=hook["max_background"],
        )

    # Checks: nothing is changed by them.

    def _check_privileges(self) -> None:
        if not self._device.exists():
            raise PermissionsError(f"{self._device} does not exist", hint="load the FUSE module: modprobe fuse")
        if not os.access(self._device, os.R_OK | os.W_OK) or os.geteuid() != 0:
            raise PermissionsError("mounting needs root's privileges", hint="start zswapd as root")

    def _check_not_mounted(self) -> None:
        kind = _mounted_kind(self.mountpoint)
        if kind is None:
            return
        try:
            self.mountpoint.stat()
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                raise MountError(
                    f"{self.mountpoint} is the mount of a daemon that has died",
                    hint=f"umount -l {self.mountpoint}",
                ) from None
        if kind == _FILESYSTEM.decode():
            raise MountError(f"another zswapd serves {self.mountpoint}", hint="stop it, or choose another --mountpoint")
        raise MountError(f"a file system of type {kind} is mounted on {self.mountpoint}", hint="choose another --mountpoint")

    # Steps: each leaves its undoing behind.

    def _make_mountpoint(self, undo: contextlib.ExitStack) -> None:
        try:
            missing = [path for path in (self.mountpoint, *self.mountpoint.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir(mode=0o700 if path == self.mountpoint else 0o755)
                undo.callback(_remove_if_empty, path)
            if not self.mountpoint.is_dir():
                raise MountError(f"{self.mountpoint} is not a directory", hint="choose another --mountpoint")
            if any(self.mountpoint.iterdir()):
                raise MountError(
                    f"{self.mountpoint} is not empty", hint="choose an empty directory, or one that does not exist"
                )
        except OSError as error:
            raise MountError(
                f"{self.mountpoint} cannot be used as mountpoint: {error.strerror}",
                hint="choose another --mountpoint",
            ) from error

    def _lock_mountpoint(self, undo: contextlib.ExitStack) -> None:
        descriptor = os.open(self.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MountError(
                f"another zswapd is starting or stopping on {self.mountpoint}",
                hint="stop it, or choose another --mountpoint",
            ) from None
        self._check_not_mounted()  # by one that was faster: then it is its root that was locked

    def _mount(self, undo: contextlib.ExitStack) -> int:
        """Mount; return the descriptor of the session, which closing it leaves to pyfuse3 once that has it."""
        descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,default_permissions,max_read={MAX_IO}"
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
        target = os.fsencode(self.mountpoint)
        if _libc.mount(b"zswapd", target, _FILESYSTEM, flags, options.encode()) != 0:
            number = ctypes.get_errno()
            os.close(descriptor)
            message = f"mounting on {self.mountpoint} failed: {os.strerror(number)}"
            if number == errno.EPERM:
                raise PermissionsError(message, hint="the process needs CAP_SYS_ADMIN")
            raise MountError(message, hint="see dmesg for the kernel's reason")
        undo.callback(self._unmount)
        return descriptor

    def _start_pyfuse3(self, descriptor: int, undo: contextlib.ExitStack) -> None:
        if not self.hook_problem:
            self._attach_hook(undo)
        try:
            pyfuse3.init(self.operations, f"/dev/fd/{descriptor}", set())
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, RuntimeError):
                raise MountError(f"libfuse: {error}", hint="see the messages above") from error
            raise
        undo.callback(pyfuse3.close, unmount=False)  # closes the descriptor
        # The order of undoing matters: unmount while the connection lives, then close it.
        undo.callback(self._unmount)
        if self.hook_problem or lowlevel is None:
            return
        if lowlevel.hooked():
            self.hook_active = True
        else:
            self.hook_problem = "pyfuse3 was loaded before zswapd.fuse, or calls libfuse by another name"

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
        )
        undo.callback(lowlevel.detach)
        for inode in self.operations.directory.block_files:
            lowlevel.add_inode(inode)

    def _unmount(self) -> None:
        """Unmount what is mounted on the mountpoint, if it is a file system of ours; else do nothing."""
        if _mounted_kind(self.mountpoint) != _FILESYSTEM.decode():
            return
        target = os.fsencode(self.mountpoint)
        if _libc.umount2(target, _UMOUNT_NOFOLLOW) == 0:
            return
        reason = os.strerror(ctypes.get_errno())
        log.warning("unmounting %s: %s; detached it instead, whoever uses it gets errors", self.mountpoint, reason)
        if _libc.umount2(target, _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            log.error("%s stays mounted: %s", self.mountpoint, os.strerror(ctypes.get_errno()))


def _mounted_kind(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the type of the file system that is mounted on `path`, None if `path` is no mountpoint.

    Asks the kernel's table, not the file system: one whose daemon hangs would hang the question.
    """
    kind = None
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        # Space, tab, newline and backslash are written in octal.
        place = fields[4].encode(errors="surrogateescape").decode("unicode_escape")
        if place.encode("latin-1") == os.fsencode(path):
            kind = fields[fields.index("-") + 1]  # the last one covers those before it
    return kind


def _without_links(path: Path) -> Path:
    """Return the absolute name under which mountinfo lists `path`.

    The last component is not asked what it is, only whether it is a link: a `stat` of a mount whose daemon hangs
    would hang as well, readlink fails without asking the daemon.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute() keeps `..`
    try:
        path.readlink()
    except OSError:
        return Path(os.path.realpath(path.parent)) / path.name
    return Path(os.path.realpath(path))


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


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
    "aheads",
    "ahead_hits",
    "errors",
    "exceptions",
    "reply_errors",
    "max_background",
)
