# SPDX-License-Identifier: GPL-2.0-or-later
"""The path of the control socket, with its permissions and locks.

It is separate from the server (server.py), because it lives longer. The supervisor listens, and the
workers serve one after another. Clients that connect in between wait in the socket's queue.

- **Permissions.** The socket has mode 0600. Directories made for it have mode 0700. The server also
  checks the uid of each peer.
- **One daemon.** All processes of the daemon share a flock on a file beside the socket. The kernel
  drops the lock after the death of the last process. The holder of the lock may therefore replace
  the socket of a dead daemon. A test connection instead would leave a gap in which two daemons
  could replace each other's socket.
- **One supervisor.** The supervisor holds a second lock on the same file, with fcntl(2). This lock
  belongs to one process. Workers do not inherit it, it ends with the process, and it survives exec.
  Of two supervisors that want to take over an orphan worker, one is therefore refused. The lock
  also shows whether a worker has a supervisor, without a question to the worker. A process that
  closes any descriptor of the file loses this lock, so a supervisor closes none.
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
"""Limit of clients that wait to be served."""
_EXHAUSTED = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO)
"""Errnos that do not come from missing privileges."""
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2): type, whence, start, length, pid."""


class Listener:
    """A listening control socket; a context manager.

    Args:
        path: path of the socket.

    Attributes:
        path: as above.
        socket: the listening socket while open, otherwise None.
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
        """Take the locks and listen. Clients wait until a server serves.

        Raises:
            AlreadyRunningError: another daemon has this socket.
            ControlError: another file has the path, or a resource of the system is exhausted.
            PermissionsError: this process may not make the directory or the socket.
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
        """Take over the socket of another process; `close` removes it.

        Args:
            listening: descriptor of the socket.
            lock: descriptor of the lock.

        Raises:
            AlreadyRunningError: another process supervises already, or has replaced the socket.
                The descriptors stay open.
        """
        self._lock = lock
        try:
            self._claim()
        except AlreadyRunningError:
            self._lock = None
            raise
        self.socket = socket.socket(fileno=listening)

    def seize(self) -> None:
        """Open although orphans of a dead supervisor hold the lock; they must be about to end.

        Raises:
            AlreadyRunningError: there is a supervisor.
            ControlError, PermissionsError: see `open`.
        """
        path = lock_path(self.path)
        with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
            old = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            # The old lock is closed after the new one is held, so that no other process can seize
            # the socket in between.
            undo.callback(os.close, old)
            _claim(old, self.path)
            path.unlink()
            # The orphans do not accept any more, but their open descriptors keep it listening.
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
        """Stop listening; remove the socket and the lock file."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
            self.path.unlink(missing_ok=True)
        if self._lock is not None:
            lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def forget(self) -> None:
        """Close the descriptors; leave socket and lock to another process."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _claim(self) -> None:
        """Take the supervisor's lock.

        Raises:
            AlreadyRunningError: another process supervises, or has replaced the lock file.
        """
        assert self._lock is not None
        _claim(self._lock, self.path)
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(self._lock), lock_path(self.path).lstat()):
                raise AlreadyRunningError(
                    f"another zswapd has taken over the control socket {self.path}"
                )


def lock_path(path: Path) -> Path:
    """Return the path of the lock file of a control socket."""
    return path.with_name(path.name + ".lock")


def supervisor_of(path: Path) -> int:
    """Return the process id of the supervisor of a control socket, or 0 if there is none.

    Raises:
        ControlError, PermissionsError: the lock file cannot be opened.
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
        raise cls(f"cannot open {lock_path(path)}: {error.strerror}", hint=hint) from error
    try:
        answer = fcntl.fcntl(lock, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    finally:
        os.close(lock)
    kind, _whence, _start, _length, pid = _FLOCK.unpack(answer)
    return 0 if kind == fcntl.F_UNLCK else int(pid)


def is_served(path: Path) -> bool:
    """Return whether a daemon serves a control socket; False if this process has no access."""
    try:
        if supervisor_of(path):
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            return probe.connect_ex(str(path)) == 0
    except (ControlError, OSError):
        return False


def check_place(path: Path) -> None:
    """Check that a control socket can be made. This makes nothing, so it does not find all causes.

    Raises:
        ControlError: another file has the path.
        PermissionsError: the socket cannot be made at the path.
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
    """Return a hint how to stop the daemon of a control socket."""
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
    """Return a descriptor that holds the flock of a lock file until all its copies are closed.

    Raises:
        AlreadyRunningError: another daemon holds the lock.
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
        # The last holder removed the file between open(2) and flock(2). Try the new file.
        os.close(lock)


def _clear_path(path: Path) -> None:
    """Remove the socket of a dead daemon; refuse any other file."""
    if _look_at_path(path):
        path.unlink()


def _look_at_path(path: Path) -> bool:
    """Return whether the path has the socket of a dead daemon.

    Raises:
        ControlError: another file has the path, or another program listens there.
    """
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
                f"another program listens at {path}",
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
