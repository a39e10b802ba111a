# SPDX-License-Identifier: GPL-2.0-or-later
"""The mount: it opens /dev/fuse, calls mount(2), and undoes both.

It is separate from the session (session.py), because it lives longer: the supervisor mounts once,
and the workers serve the descriptor one after another. fusermount3 is not needed. The mount has no
allow_other, so the kernel denies all access by other users, also `stat`.

All checks come before the first step. Each step registers its undo before the next step. `close`
undoes the steps in reverse order after any failure.

The directory under the mount is locked with flock while the mount exists. Of two daemons that start
on one mountpoint at the same time, one is refused. After the mount, no program can open the covered
directory by name, and mountinfo shows the mount instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shlex
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from zswapd.errors import MountError, PermissionsError
from zswapd.host import installation
from zswapd.host.hints import for_capability, for_device, for_failure
from zswapd.paths import nearest_existing, why_unmakeable, without_links

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

MAX_IO = 1 << 20
"""Longest read and write in bytes. The kernel puts at most 256 pages of 4 KiB into a request."""

ANSWER_S = 5.0
"""Time in seconds for an answer of a mount. A mount that takes longer counts as alive and busy."""

_FILESYSTEM = b"fuse.zswapd"
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOATIME = 2, 4, 8, 1024
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


class Mount:
    """A FUSE file system that is mounted but not served; a context manager.

    Args:
        mountpoint: an empty directory, or a path that does not exist. A missing directory is made
            with mode 0700 and removed at the end.
        device: the FUSE device node.
        left_on: returns the loop devices with a file below a directory, each with the command that
            frees it.

    Attributes:
        mountpoint: its path as mountinfo has it.
        descriptor: descriptor of the FUSE connection while mounted, otherwise -1.
        made: the directories that `open` made, outermost first; `close` removes them.
        device: st_dev of the files, 0 if it is unknown.
    """

    def __init__(
        self,
        mountpoint: Path,
        *,
        device: Path = Path("/dev/fuse"),
        left_on: Callable[[Path], Mapping[str, str]] = lambda _: {},
    ) -> None:
        self.mountpoint = without_links(mountpoint)
        self.descriptor = -1
        self.made: tuple[Path, ...] = ()
        self.device = 0
        self._device = device
        self._left_on = left_on
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Mount.

        After an error everything is undone. Only the mount of a dead zswapd may be gone.

        Raises:
            PermissionsError: there is no FUSE device, or this process may not mount.
            MountError: the mountpoint cannot be used.
        """
        self._check_privileges()
        self._clear_dead()
        self.check()
        with contextlib.ExitStack() as undo:
            self._make_mountpoint(undo)
            self._lock_mountpoint(undo)
            self.descriptor = self._mount(undo)
            self.device = _mounted(self.mountpoint)[1]
            self._undo = undo.pop_all()

    def check(self) -> None:
        """Check that `open` can mount. This changes nothing, so it does not find all causes.

        Raises:
            PermissionsError, MountError: see `open`.
        """
        self._check_privileges()
        if not self._is_dead_mount():
            self._check_not_mounted()
            self._check_mountpoint()

    def adopt(self, descriptor: int, made: Sequence[Path], device: int = 0) -> None:
        """Take over the mount of another process; `close` unmounts it.

        It may be unmounted lazily. Then the open files, above all those of loop devices, must still
        be served.

        Args:
            descriptor: descriptor of the FUSE connection.
            made: attribute `made` of that process.
            device: attribute `device` of that process; 0 if it is unknown.
        """
        kind, found = _mounted(self.mountpoint)
        is_there = kind == _FILESYSTEM.decode()
        self.device = device or (found if is_there else 0)
        if not is_there:
            log.warning("%s is not mounted any more; serving only its open files", self.mountpoint)
        self.descriptor = descriptor
        self.made = tuple(made)
        for path in self.made:
            self._undo.callback(_remove_if_empty, path)
        self._undo.callback(os.close, descriptor)
        self._undo.callback(self.unmount)

    def close(self) -> None:
        """Unmount and undo all other steps. A repeat has no effect."""
        self._undo.close()
        self.descriptor = -1

    def forget(self) -> None:
        """Keep the mount after this object. The owner of the descriptor must unmount it."""
        self._undo.pop_all()

    def unmount(self) -> None:
        """Unmount the mountpoint if a zswapd file system is mounted on it."""
        # If mountinfo cannot be opened (too many open files), the mount counts as this daemon's.
        with contextlib.suppress(Exception):
            if _mounted_kind(self.mountpoint) != _FILESYSTEM.decode():
                return
        target = os.fsencode(self.mountpoint)
        if _libc.umount2(target, _UMOUNT_NOFOLLOW) == 0:
            return
        reason = os.strerror(ctypes.get_errno())
        log.warning(
            "unmounting %s: %s; detached it instead; programs that use it get errors",
            self.mountpoint,
            reason,
        )
        if _libc.umount2(target, _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            log.error("%s stays mounted: %s", self.mountpoint, os.strerror(ctypes.get_errno()))

    def _check_privileges(self) -> None:
        if not self._device.exists():
            missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise PermissionsError(
                f"{self._device} does not exist", hint=for_device(missing, self._device, "fuse")
            )
        if os.geteuid() != 0:
            raise PermissionsError(
                "mounting needs root's privileges",
                hint=f"start zswapd as root: {installation.called_again()}",
            )

    def _check_not_mounted(self) -> None:
        kind = _mounted_kind(self.mountpoint)
        if kind is None:
            return
        if _is_dead(self.mountpoint):
            raise MountError(
                f"{self.mountpoint} is the mount of a daemon that has died, of type {kind}",
                hint=(
                    f"`umount -l {shlex.quote(str(self.mountpoint))}` if no program needs it; or"
                    " choose another --mountpoint"
                ),
            )
        if kind == _FILESYSTEM.decode():
            raise MountError(
                f"another zswapd serves {self.mountpoint}",
                hint="stop it, or choose another --mountpoint",
            )
        raise MountError(
            f"a file system of type {kind} is mounted on {self.mountpoint}",
            hint="choose another --mountpoint",
        )

    def _check_mountpoint(self) -> None:
        """Refuse a path that is not an empty directory and cannot be made one."""
        try:
            there = nearest_existing(self.mountpoint)
            if there != self.mountpoint and (number := why_unmakeable(there)):
                raise _unusable(self.mountpoint, OSError(number, os.strerror(number)))
            if not there.is_dir():
                raise MountError(f"{there} is not a directory", hint="choose another --mountpoint")
            if there == self.mountpoint and any(self.mountpoint.iterdir()):
                raise MountError(
                    f"{self.mountpoint} is not empty",
                    hint="choose an empty directory, or one that does not exist",
                )
        except OSError as error:
            raise _unusable(self.mountpoint, error) from error

    def _clear_dead(self) -> None:
        """Unmount the mount of a dead zswapd, which no program can use. It cannot be undone."""
        if not self._is_dead_mount():
            return
        target = os.fsencode(self.mountpoint)
        if _libc.umount2(target, _UMOUNT_NOFOLLOW) and _libc.umount2(
            target, _MNT_DETACH | _UMOUNT_NOFOLLOW
        ):
            return  # the next check reports the mount
        log.warning("%s was the mount of a zswapd that has died: unmounted", self.mountpoint)

    def _is_dead_mount(self) -> bool:
        """Return whether the mount of a dead zswapd is on the mountpoint.

        Loop devices on its files must be detached first. They keep their files open, and all their
        requests would fail unnoticed.

        Raises:
            MountError: a loop device or a swap area is on one of its files.
        """
        if _mounted_kind(self.mountpoint) != _FILESYSTEM.decode() or not _is_dead(self.mountpoint):
            return False
        if left := self._left_on(self.mountpoint):
            raise MountError(
                f"{self.mountpoint} is the mount of a zswapd that has died; the data on"
                f" {', '.join(left)} is lost",
                hint=f"run `{' && '.join(left.values())}`, then start zswapd again",
            )
        return True

    def _make_mountpoint(self, undo: contextlib.ExitStack) -> None:
        try:
            missing = [
                path for path in (self.mountpoint, *self.mountpoint.parents) if not path.exists()
            ]
            for path in reversed(missing):
                path.mkdir(mode=0o700 if path == self.mountpoint else 0o755)
                self.made += (path,)
                undo.callback(_remove_if_empty, path)
        except OSError as error:
            raise _unusable(self.mountpoint, error) from error

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
        # Another daemon may have mounted first. Then the lock is on the root of its mount.
        self._check_not_mounted()

    def _mount(self, undo: contextlib.ExitStack) -> int:
        """Mount; return the descriptor of the connection."""
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            message = f"{self._device} cannot be opened: {error.strerror}"
            raise PermissionsError(message, hint=for_device(error, self._device, "fuse")) from error
        options = (
            f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,default_permissions,"
            f"max_read={MAX_IO}"
        )
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME
        target = os.fsencode(self.mountpoint)
        if _libc.mount(b"zswapd", target, _FILESYSTEM, flags, options.encode()) != 0:
            number = ctypes.get_errno()
            os.close(descriptor)
            message = f"mounting on {self.mountpoint} failed: {os.strerror(number)}"
            if number in (errno.EPERM, errno.EACCES):
                raise PermissionsError(message, hint=for_capability("CAP_SYS_ADMIN"))
            if number == errno.ENODEV:
                raise MountError(
                    message, hint=for_device(OSError(number, ""), self._device, "fuse")
                )
            raise MountError(message, hint="`dmesg` may have the kernel's reason")
        undo.callback(os.close, descriptor)
        # The unmount runs before the close, because it needs the connection.
        undo.callback(self.unmount)
        return descriptor


def _unusable(mountpoint: Path, error: OSError) -> MountError:
    return MountError(
        f"{mountpoint} cannot be used as mountpoint: {error.strerror}",
        hint=for_failure(error, mountpoint, "choose another --mountpoint"),
    )


def _mounted_kind(path: Path) -> str | None:
    """Return the type of the file system that is mounted on `path`, or None."""
    return _mounted(path)[0]


def _mounted(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> tuple[str | None, int]:
    """Return type and st_dev of the file system that is mounted on `path`, or None and 0.

    This reads the kernel's table. A call to the file system would hang if its daemon hangs.
    """
    kind, device = None, 0
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        # Space, tab, newline and backslash are written in octal.
        place = fields[4].encode(errors="surrogateescape").decode("unicode_escape")
        if place.encode("latin-1") == os.fsencode(path):
            kind = fields[fields.index("-") + 1]  # the last mount covers the mounts before it
            device = os.makedev(*map(int, fields[2].split(":")))
    return kind, device


def _is_dead(mountpoint: Path) -> bool:
    """Return whether the daemon of a mount is dead.

    A mount that takes longer than ANSWER_S counts as alive. This calls statvfs(2), because the
    kernel may answer stat(2) from its cache.
    """
    said: list[int | None] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            said.append(error.errno)

    thread = threading.Thread(target=ask, daemon=True)  # it waits as long as a daemon that hangs
    thread.start()
    thread.join(ANSWER_S)
    return said == [errno.ENOTCONN]


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
