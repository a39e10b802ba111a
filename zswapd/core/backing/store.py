# SPDX-License-Identifier: GPL-2.0-or-later
"""The file or block device with the slots: checked, allocated in full, locked, read and written.

    0      label: the user of this file or device, in plain text (`LABEL`)
    1 MiB  slot 0, slot 1, …: one page each

The first mebibyte belongs to no slot. Programs look there for the signatures of file systems, and
swapped-out data must never look like one. The label also tells our own file from a foreign one.

`open_store` refuses what another program may need:
  - a device that is mounted, swapped on or part of another device (O_EXCL finds these),
  - a device with a signature (blkid),
  - a file with foreign contents, or an active swap file,
  - a file or device in memory, or on top of our own mount (checks.py).

Direct I/O: a page on its way to the disk must not need a page of the page cache. All buffers are
page-aligned, and all transfers are whole pages.

Encryption is AES-256-XTS with the slot's number as the tweak (IEEE 1619; plain64 of dm-crypt). The
thread that moves the pages encrypts them, a whole request at a time and without the GIL. It takes
0.6 µs for a page of 4 KiB with AES instructions. The event loop is not delayed while another
processor is free. The key is random, lives in locked memory only (handover/state.py) and is lost
with it: after that, the data on the disk is noise. XTS hides data but does not authenticate it.
The checksums of core/block/slotmap.py detect changes.

Limits: the slots have no meaning after a reboot. So there is no flush (fdatasync), and the disk's
own cache may keep the data.
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
"""Length of a key: two AES-256 keys, since XTS takes one for data and one for tweaks."""
LABEL = b"zswapd backing store, version 1\n"
DATA_AT = 1 << 20
"""Offset of slot 0 in bytes; a multiple of every page size."""


class Slots(Protocol):
    """A maker of requests to slots.

    A request is carried out by a call, in any thread. The call raises OSError if it fails.
    """

    def reading(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        """Return a request that fills page-aligned buffers from the slots from `first` on."""

    def writing(self, first: int, pages: Sequence[memoryview]) -> Callable[[], None]:
        """Return a request that writes page-aligned buffers to the slots from `first` on.

        If it fails, some slots or parts of slots may be written.
        """

    def labelling(self, *, writes: bool) -> Callable[[], None]:
        """Return a probe that writes the label again, or reads it.

        Neither changes any data. The result tells whether the device works.
        """


class SlotStore:
    """Slots on an open descriptor. The caller closes the descriptor.

    Args:
        fd: the result of `open_store`.
        page_size: bytes in a slot.
        cipher: encrypts the slots; None to store pages in clear.
    """

    def __init__(self, fd: int, page_size: int, cipher: Cipher | None = None) -> None:
        self._fd = fd
        self._page_size = page_size
        self._cipher = cipher
        self._label = memoryview(mmap.mmap(-1, page_size))
        self._label[: len(LABEL)] = LABEL
        self._label_read = memoryview(mmap.mmap(-1, page_size))

    def reading(self, first: int, pages: Sequence[memoryview]) -> Job:
        """Do as `Slots.reading` does. A device that has become too short gives EIO."""
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
    """Return private memory for pages under way, aligned for direct I/O.

    Every page is touched here: a transfer must not wait for memory from the kernel.

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
    """Open, check, allocate and lock a backing store, and return its descriptor.

    Args:
        path: a block device or a file. A file is made if it does not exist.
        slots: pages that the store has to hold.
        page_size: bytes in a page.
        mountpoint: directory of our own files. No backing may lie on them.
        force: accept a signature, foreign data, or a place in memory.

    Raises:
        BackingError: the path cannot be used; the message says why. Nothing is changed then, and a
            new file is removed again.
    """
    path = _resolved(path, mountpoint)  # the target of a link is made, and removed on failure
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
            # The way that pages take: a failure is better now than later.
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
    """Check that `open_store` could open a backing store.

    Nothing is made or written, so this check misses some causes of a failure.

    Args:
        path: a block device or a file.
        slots: pages that the store has to hold.
        page_size: bytes in a page.
        mountpoint: directory of our own files.
        force: accept a signature, foreign data, or a place in memory.

    Raises:
        BackingError: the path cannot be used.
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
    """Return the real path.

    Raises:
        BackingError: the path is in our own mount.
    """
    resolved = path.resolve()
    if resolved.is_relative_to(mountpoint.resolve()):
        raise BackingError(
            f"backing.path {path} is in the mount itself",
            hint="choose a file or device outside of it",
        )
    return resolved


def _check(fd: int, path: Path, needed: int, mountpoint: Path, *, force: bool) -> None:
    """Refuse a file or device that is in use, too small, in memory, or on our own mount."""
    status = os.fstat(fd)
    if not force:
        refuse_memory(path, status)
    if stat.S_ISBLK(status.st_mode):
        _check_device(fd, path, status, needed, mountpoint, force=force)
    else:
        refuse_ours(device_of(status), path, mountpoint)
        _check_file(fd, path, status, force=force)


def _open_unnamed(path: Path) -> int:
    """Open a file without a name in the directory of the backing file.

    Where the file system has no such files (O_TMPFILE), open the directory itself.
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
    """Open a path for direct I/O; a block device exclusively."""
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
        errno.ETXTBSY: f"it is swapped on: `swapoff {name}` first, or choose another path",
        errno.EINVAL: "its file system has no direct I/O: choose another path",
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
            f"backing.path {path} is in use by another process",
            hint="each daemon needs a backing of its own",
        ) from error


def _is_ours(fd: int, path: Path) -> bool:
    """Say whether the label is there.

    Raises:
        BackingError: the label cannot be read.
    """
    # A second descriptor: direct I/O would need an aligned buffer.
    copy = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
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
    size = os.lseek(fd, 0, os.SEEK_END)  # no transfer depends on the file position
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
            f"blkid cannot be asked about backing.path {path}: {error.strerror}",
            hint="install util-linux; or set backing.force if no program needs the data there",
        ) from error
    # blkid exits with 2 if it finds no signature, and with 8 if it finds more than one.
    if found.returncode != 2:
        what = " ".join(found.stdout.decode(errors="replace").split()) or "an unknown one"
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
    """Allocate all blocks of a file. On failure, restore the file's size and free the blocks."""
    status = os.fstat(fd)
    # A failed fallocate(2) keeps what it has allocated. So it is not tried if it would fill the
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
    """Say whether a file can have `needed` bytes, counting blocks that it has and free blocks."""
    status, room = os.fstat(fd), os.fstatvfs(fd)
    return needed - status.st_blocks * 512 <= room.f_bavail * room.f_frsize


def _no_room(path: Path, needed: int, why: str) -> BackingError:
    return BackingError(
        f"no room for {needed} bytes in {path.parent}: {why}",
        hint="every slot needs a block: free disk space, or use less swap",
    )
