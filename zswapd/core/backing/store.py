# SPDX-License-Identifier: GPL-2.0-or-later
"""The file or block device that slots are on.

Checked, allocated in full, locked, read and written past the page cache.

    0      label: who uses this, in plain text (`LABEL`)
    1 MiB  slot 0, slot 1, …: a page each

The first mebibyte is no slot's, since it is where programs look for the signatures of file systems:
what was swapped out must never look like one. It also tells our own file from somebody else's.

`open_store` refuses what somebody else may need: a device that is mounted, swapped on or part of
another (O_EXCL finds these), one with a signature (blkid), a file with foreign contents, an active
swap file, and (checks.py) what lies in memory, and whatever would come back to our own mount.

Direct I/O: a page on its way to the disk must not need a page of the page cache. All buffers are
page-aligned, all transfers whole pages.

Encryption: AES-256-XTS, the slot's number the tweak (IEEE 1619; dm-crypt's plain64), by the thread
that moves the page, whole requests at a time and without the GIL: 0.6 µs a page of 4 KiB with AES
instructions, of which the event loop feels nothing while there is another processor. The key is
random, lives in locked memory only (handover/state.py) and ends with it: what the daemon leaves on
the disk is noise. XTS hides contents, it does not prove them: the checksums of
core/block/slotmap.py do.

Limits: what is stored has no meaning after a reboot, so nothing is ever flushed (fdatasync): the
disk's own cache may keep it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zswapd.core.backing._disk import Job
from zswapd.core.backing.checks import device_of, refuse_memory, refuse_ours
from zswapd.errors import BackingError
from zswapd.host.hints import for_failure
from zswapd.pages import round_down

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zswapd.core.backing._disk import Cipher

KEY_BYTES = 64
"""Of a cipher: two AES-256 keys, since XTS takes one for data and one for tweaks."""
LABEL = b"zswapd backing store, version 1\n"
DATA_AT = 1 << 20
"""Offset of slot 0 in bytes; a multiple of every page size."""


class Slots(Protocol):
    """What makes requests of slots.

    Each is done by a call, in any thread, and raises OSError if that fails.
    """

    def reading(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        """Return a request that fills page-aligned buffers from slot `first` on."""

    def writing(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        """Return one that writes page-aligned buffers to the slots from `first` on.

        Some of them or parts if it fails.
        """

    def labelling(self, *, writes: bool) -> Callable[[], None]:
        """Return a probe that writes the label again, or reads it.

        Neither changes anything, and both tell whether that works.
        """


class SlotStore:
    """Slots on an open descriptor, which stays the giver's.

    Args:
        fd: what `open_store` returned.
        page_size: bytes in a slot.
        cipher: makes unreadable what is in the slots; None to store pages as they are.
    """

    def __init__(self, fd: int, page_size: int, cipher: Cipher | None = None) -> None:
        self._fd = fd
        self._page_size = page_size
        self._cipher = cipher
        self._label = memoryview(mmap.mmap(-1, page_size))
        self._label[: len(LABEL)] = LABEL
        self._label_read = memoryview(mmap.mmap(-1, page_size))

    def reading(self, first: int, pages: Sequence[memoryview]) -> Job:
        """Do as `Slots.reading` does; EIO for a device that has become too short."""
        return self._moving(first, pages, writes=False)

    def writing(self, first: int, pages: Sequence[memoryview]) -> Job:
        """Do as `Slots.writing` does."""
        return self._moving(first, pages, writes=True)

    def labelling(self, *, writes: bool) -> Job:
        """Do as `Slots.labelling` does."""
        return Job(
            self._fd, writes=writes, offset=0, pages=[self._label if writes else self._label_read]
        )

    def _moving(self, first: int, pages: Sequence[memoryview], *, writes: bool) -> Job:
        at = DATA_AT + first * self._page_size
        return Job(self._fd, writes=writes, offset=at, pages=pages, slot=first, cipher=self._cipher)


def make_buffers(size: int, page_size: int) -> memoryview:
    """Return private memory for pages on their way to the disk and back, aligned for direct I/O.

    Every page of it is touched: a transfer must not wait for the kernel's memory.

    Args:
        size: bytes; rounded down to the page.
        page_size: bytes in a page.
    """
    memory = mmap.mmap(-1, round_down(size, page_size))
    memory.madvise(mmap.MADV_DONTDUMP)
    view = memoryview(memory)
    for place in range(0, len(view), mmap.PAGESIZE):
        view[place] = 0
    return view


def open_store(
    path: Path, slots: int, page_size: int, *, mountpoint: Path, force: bool = False
) -> int:
    """Open, check, allocate and lock a backing store; return its descriptor.

    Args:
        path: a file, which is made if it is not there, or a block device.
        slots: pages that it has to hold.
        page_size: bytes in a page.
        mountpoint: where our own files are: nothing in there, and nothing made of it, can stand
            behind them.
        force: take it although it carries a signature or foreign data, or lies in memory.

    Raises:
        BackingError: it cannot be used; the message says why. Nothing was changed, but for a new
            file that is removed again.
    """
    path = _resolved(path, mountpoint)  # what a link names is what is made, and removed again
    needed = DATA_AT + slots * page_size
    is_new = not path.exists()
    with contextlib.ExitStack() as undo:
        fd = _open(path)
        undo.callback(os.close, fd)
        if is_new:
            undo.callback(path.unlink)
        _lock(fd, path)
        _check(fd, path, needed, mountpoint, force=force)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _allocate(fd, path, needed)
        try:
            # The way that pages will take: if it fails, better now than then.
            SlotStore(fd, page_size).labelling(writes=True)()
        except OSError as error:
            raise BackingError(
                f"backing.path {path} cannot be written: {error.strerror}",
                hint=_choose_another(error, path),
            ) from error
        undo.pop_all()
    return fd


def check_store(
    path: Path, slots: int, page_size: int, *, mountpoint: Path, force: bool = False
) -> None:
    """Do nothing if `open_store` could open a backing store.

    Nothing is made or written, so some causes of a failure are not seen.

    Args:
        path: see `open_store`, as for the others.
        slots: pages that it has to hold.
        page_size: bytes in a page.
        mountpoint: where our own files are.
        force: take it although it carries a signature or foreign data, or lies in memory.

    Raises:
        BackingError: it cannot be used.
    """
    path = _resolved(path, mountpoint)
    needed = DATA_AT + slots * page_size
    fd = _open(path) if path.exists() else _open_unnamed(path)
    try:
        _lock(fd, path)
        _check(fd, path, needed, mountpoint, force=force)
        if not stat.S_ISBLK(os.fstat(fd).st_mode) and not _fits(fd, needed):
            raise _no_room(path, needed, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def _resolved(path: Path, mountpoint: Path) -> Path:
    """Return what a path names.

    Raises:
        BackingError: it is in our own mount.
    """
    resolved = path.resolve()
    if resolved.is_relative_to(mountpoint.resolve()):
        raise BackingError(
            f"backing.path {path} is in the mount itself",
            hint="choose a file or device outside of it",
        )
    return resolved


def _check(fd: int, path: Path, needed: int, mountpoint: Path, *, force: bool) -> None:
    """Refuse a file or device that is in use, too small, in memory, or on a file of this daemon."""
    status = os.fstat(fd)
    if not force:
        refuse_memory(path, status)
    if stat.S_ISBLK(status.st_mode):
        _check_device(fd, path, status, needed, mountpoint, force=force)
    else:
        refuse_ours(device_of(status), path, mountpoint)
        _check_file(fd, path, status, force=force)


def _open_unnamed(path: Path) -> int:
    """Open a file without a name in the directory in which the backing file is to be made.

    Where the file system has no files without a name, the directory itself is opened.
    """
    flags = os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC
    try:
        return os.open(path.parent, flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR) or not path.parent.is_dir():
            raise _not_opened(path, error) from error
    if not os.access(path.parent, os.W_OK):
        raise _not_opened(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))
    return os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _open(path: Path) -> int:
    """Open for direct I/O; a block device for us alone."""
    try:
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise BackingError(
                f"backing.path {path} is neither a file nor a block device",
                hint="name one of these",
            )
        flags = os.O_EXCL if stat.S_ISBLK(kind) else os.O_CREAT
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | flags, 0o600)
    except OSError as error:
        raise _not_opened(path, error) from error


def _not_opened(path: Path, error: OSError) -> BackingError:
    name = shlex.quote(str(path))
    hints = {
        errno.EBUSY: f"it is mounted, swapped on, or part of another device: `lsblk {name}`",
        errno.ETXTBSY: f"it is swapped on: `swapoff {name}` first, or choose another",
        errno.EINVAL: "its file system has no direct I/O: choose another",
    }
    hint = hints.get(error.errno or 0) or _choose_another(error, path)
    return BackingError(f"backing.path {path} cannot be opened: {error.strerror}", hint=hint)


def _choose_another(error: OSError, path: Path) -> str:
    return for_failure(error, path, "choose another path")


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BackingError(
            f"backing.path {path} is in use by another process", hint="one daemon, one backing"
        ) from error


def _is_ours(fd: int, path: Path) -> bool:
    """Say whether a daemon like this one has used it; raises BackingError if it cannot be read."""
    copy = os.open(
        f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC
    )  # direct I/O would want an aligned buffer
    try:
        return os.pread(copy, len(LABEL), 0) == LABEL
    except OSError as error:
        raise BackingError(
            f"backing.path {path} cannot be read: {error.strerror}",
            hint=_choose_another(error, path),
        ) from error
    finally:
        os.close(copy)


def _check_device(
    fd: int, path: Path, status: os.stat_result, needed: int, mountpoint: Path, *, force: bool
) -> None:
    size = os.lseek(fd, 0, os.SEEK_END)  # every transfer names its own offset
    if size < needed:
        raise BackingError(
            f"backing.path {path} has {size} bytes, the swap files need {needed}",
            hint="use a larger device or less swap",
        )
    refuse_ours(status.st_rdev, path, mountpoint)
    if force or _is_ours(fd, path):
        return
    try:
        found = subprocess.run(
            ["blkid", "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", str(path)],
            check=False,
            capture_output=True,
        )
    except OSError as error:
        raise BackingError(
            f"blkid cannot be asked what backing.path {path} carries: {error.strerror}",
            hint="install util-linux; or set backing.force, if nobody needs what is there",
        ) from error
    # blkid ends with 2 when there is nothing to be found, with 8 when it finds more than one.
    if found.returncode != 2:
        what = " ".join(found.stdout.decode(errors="replace").split()) or "something unclear"
        raise BackingError(
            f"backing.path {path} carries a signature: {what}",
            hint=(
                f"if no program needs it: `wipefs --all {shlex.quote(str(path))}`, or set"
                " backing.force"
            ),
        )


def _check_file(fd: int, path: Path, status: os.stat_result, *, force: bool) -> None:
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            used = Path(os.fsdecode(loop.read_bytes().rstrip(b"\n")))
            if used.exists() and used.samefile(path):
                device = f"/dev/{loop.parts[3]}"
                raise BackingError(
                    f"backing.path {path} is in use by {device}",
                    hint=f"`losetup --detach {device}` first",
                )
    if stat.S_ISREG(status.st_mode) and status.st_size and not force and not _is_ours(fd, path):
        raise BackingError(
            f"backing.path {path} exists and is none of ours",
            hint="if no program needs it: remove it, or set backing.force",
        )


def _allocate(fd: int, path: Path, needed: int) -> None:
    """Give a file all its blocks.

    One that cannot get them is left as it was, and so is its file system.
    """
    status = os.fstat(fd)
    # What fallocate(2) has got before it fails it keeps: it is not tried where it would fill the
    # file system.
    why = "" if _fits(fd, needed) else os.strerror(errno.ENOSPC)
    if not why:
        try:
            os.posix_fallocate(fd, 0, needed)
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
    if why:
        os.ftruncate(fd, status.st_size)
        raise _no_room(path, needed, why)


def _fits(fd: int, needed: int) -> bool:
    """Say whether a file's file system has blocks for `needed` bytes.

    The blocks that the file has count as well.
    """
    status, room = os.fstat(fd), os.fstatvfs(fd)
    return needed - status.st_blocks * 512 <= room.f_bavail * room.f_frsize


def _no_room(path: Path, needed: int, why: str) -> BackingError:
    return BackingError(
        f"no room for {needed} bytes in {path.parent}: {why}",
        hint="a slot must never be missing: free some, or use less swap",
    )
