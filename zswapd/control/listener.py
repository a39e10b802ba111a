# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket's place in the file system: its lock, its path, its permissions.

Apart from the server (server.py), because it lives longer: the supervisor listens, one worker after
the other serves, and clients that come in between wait in the socket's queue.

Who may talk: the socket has mode 0600, directories made for it 0700; the server checks every peer's
uid besides.

Who may be a second daemon: nobody. A lock beside the socket is held as long as any process of the
daemon lives and vanishes with the last, in whatever way it dies, so whoever holds the lock may
replace a socket that a dead daemon left. (Connecting to see whether somebody answers would leave a
gap in which two daemons replace each other's socket.)

Who supervises: one process. On the same file it holds a second lock, of the other kind (fcntl, not
flock), which is the process' own: neither its workers have it, nor does it survive the process, but
it does survive exec. So of two that want to take over from an orphan one is refused, and whether a
worker has a supervisor is known without asking the worker. Whoever closes any descriptor of that
file loses this lock: a supervisor closes none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from typing import TYPE_CHECKING, Self

from zswapd.errors import AlreadyRunningError, ControlError, PermissionsError, ZswapdError
from zswapd.host import installation
from zswapd.host.hints import for_failure
from zswapd.paths import nearest_existing, why_unmakeable

if TYPE_CHECKING:
    from pathlib import Path

QUEUE = 32
"""Clients that may wait to be served."""
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)
"""Reasons that no privilege helps against."""
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2): type, whence, start, length, pid."""


class Listener:
    """A listening control socket; a context manager.

    Args:
        path: where the socket appears.

    Attributes:
        path: as above.
        socket: the listening socket while open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket: socket.socket | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Take the lock and listen; clients wait until a server serves.

        Raises:
            AlreadyRunningError: another daemon has this socket.
            ControlError: something else stands at its path, or the system has no room for it.
            PermissionsError: the directory or the socket may not be made there.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _take_lock(lock_path(self.path))
            self._claim()
            _clear_path(self.path)
            self.socket = _listen(self.path)
        except OSError as error:
            self.close()
            raise _not_made(self.path, error) from error
        except BaseException:
            self.close()
            raise

    def adopt(self, listening: int, lock: int) -> None:
        """Take over the descriptors of a socket that another process has opened.

        Remove it at the end as if it were our own.

        Raises:
            AlreadyRunningError: another process supervises already, or has made the socket anew;
                the descriptors stay open.
        """
        self._lock = lock
        try:
            self._claim()
        except AlreadyRunningError:
            self._lock = None
            raise
        self.socket = socket.socket(fileno=listening)

    def seize(self) -> None:
        """Do as `open`, though processes of a dead supervisor still have the lock.

        Dead ones, or such that are about to end.

        Raises:
            AlreadyRunningError: there is a supervisor.
            ControlError, PermissionsError: as from `open`.
        """
        path = lock_path(self.path)
        with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
            old = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            undo.callback(
                os.close, old
            )  # when the new one is held: nobody else may be so bold in between
            _claim(old, self.path)
            path.unlink()
            # Nobody accepts any more, but whoever has it open keeps it listening.
            self.path.unlink(missing_ok=True)
            self.open()
            return
        self.open()

    def descriptors(self) -> tuple[int, int]:
        """Return the descriptors of socket and lock, for `adopt` in another process."""
        assert self.socket is not None, "open() comes before descriptors()"
        assert self._lock is not None, "open() comes before descriptors()"
        return self.socket.fileno(), self._lock

    def close(self) -> None:
        """Stop listening and leave neither socket nor lock behind."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
            self.path.unlink(missing_ok=True)
        if self._lock is not None:
            lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def forget(self) -> None:
        """Close the descriptors and leave socket and lock in place: another process has them."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        """Become the supervisor."""
        assert self._lock is not None
        _claim(self._lock, self.path)
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._lock), lock_path(self.path).lstat()):
                raise AlreadyRunningError(
                    f"another zswapd has taken over the control socket {self.path}"
                )


def lock_path(path: Path) -> Path:
    """Return where the lock of a control socket is."""
    return path.with_name(path.name + ".lock")


def supervisor_of(path: Path) -> int:
    """Return the process id of the supervisor of the daemon that has a control socket.

    0 if there is none, dead or alive.

    Raises:
        ControlError, PermissionsError: the lock cannot be looked at.
    """
    try:
        lock = os.open(lock_path(path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    except OSError as error:
        hint = for_failure(
            error, lock_path(path), "choose another place with --set control.socket=PATH"
        )
        cls = PermissionsError if error.errno in (errno.EACCES, errno.EPERM) else ControlError
        raise cls(f"cannot look at {lock_path(path)}: {error.strerror}", hint=hint) from error
    try:
        answer = fcntl.fcntl(lock, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(lock)
    kind, _whence, _start, _length, pid = _FLOCK.unpack(answer)
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def is_served(path: Path) -> bool:
    """Say whether a daemon has a control socket; False too where this process may not look."""
    try:
        if supervisor_of(path):
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            return probe.connect_ex(str(path)) == 0
    except (ControlError, OSError):
        return False


def check_place(path: Path) -> None:
    """Do nothing if a control socket could be made.

    Nothing is made, so some causes of a failure are not seen.

    Raises:
        ControlError: something else stands at its path.
        PermissionsError: it cannot be made there.
    """
    try:
        _look_at_path(path)
        number = why_unmakeable(nearest_existing(path.parent))
    except OSError as error:
        raise _not_made(path, error) from error
    if number:
        raise _not_made(path, OSError(number, os.strerror(number)))


def _not_made(path: Path, error: OSError) -> ZswapdError:
    cls = ControlError if error.errno in _EXHAUSTED else PermissionsError
    return cls(
        f"cannot make the control socket {path}: {error.strerror}",
        hint=for_failure(error, path, "choose another place with --set control.socket=PATH"),
    )


def _stop(path: Path) -> str:
    """Return what stops the daemon that has a control socket."""
    with contextlib.suppress(ZswapdError):
        if pid := supervisor_of(path):
            return f"stop it with {installation.of_daemon().stop(pid)}"
    return "stop it"


def _claim(lock: int, path: Path) -> None:
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise AlreadyRunningError(
            f"another zswapd supervises the control socket {path}",
            hint=f"{_stop(path)}, or give this one its own with --set control.socket=PATH",
        ) from None


def _take_lock(path: Path) -> int:
    """Return a descriptor that holds the lock file's lock.

    The lock goes when it is closed, or the process dies.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise AlreadyRunningError(
                f"another zswapd runs with the control socket {path.with_suffix('')}",
                hint=(
                    f"{_stop(path.with_suffix(''))}, or give this one its own with --set"
                    " control.socket=PATH"
                ),
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.lstat()):
                return lock
        os.close(
            lock
        )  # its last holder removed the file between our open and our lock: take the new one


def _clear_path(path: Path) -> None:
    """Remove a socket that a dead daemon left; refuse anything else."""
    if _look_at_path(path):
        path.unlink()


def _look_at_path(path: Path) -> bool:
    """Say whether a dead daemon has left a socket; refuse anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise ControlError(
            f"{path} exists and is no socket",
            hint="remove it, or set control.socket to another path",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise ControlError(
                f"something else listens at {path}",
                hint="stop it, or set control.socket to another path",
            )
    return True


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(QUEUE)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old)
    return listener
