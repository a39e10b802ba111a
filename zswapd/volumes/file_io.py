# SPDX-License-Identifier: GPL-2.0-or-later
"""Operations on a volume's backing file or block device. They may block for ever.

Each function runs in a thread of the volume.

Reads bypass the page cache (O_DIRECT) where the file system allows it. A second copy in the page
cache would cost the memory that this cache saves, and may be older than the data on the device.
Writes go through the page cache, since they have any size. Both see the same data, because the
kernel writes dirty pages out before a direct read.

A changed file is recognised by its signature: device, inode, length, mtime and ctime. mtime can be
set back, ctime cannot. A second change within one tick of the file system's clock leaves the times
as they are. So a look that finds times this young says so (`is_racy`, git's word for it). A block
device has no signature.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.errors import VolumeError
from zswapd.host.installation import restart_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

RACY_NS = 20_000_000
"""Two ticks of the slowest kernel clock (CONFIG_HZ=100), in ns."""
COARSE_NS = 2_100_000_000
"""The same for file systems with times in whole or even seconds (FAT), in ns."""
_FORCE_SYNC = 0x2000
_EMPTY_PATH = 0x1000
_AT_FDCWD = -100
_BASIC_STATS = 0x7FF
_STATX_BYTES = 256
"""Constants from <linux/stat.h> and <linux/fcntl.h>."""
LARGEST_BLOCK = 4096
"""Largest alignment in bytes that a device requires for direct reads."""
_SECOND_NS = 1_000_000_000
_OCTAL = re.compile(r"\\([0-7]{3})")
"""mountinfo's escapes: blanks, tabs, line ends and backslashes; all other bytes are literal."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Signature:
    """The visible properties of a file. Another signature means other contents."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(slots=True)
class SourceFile:
    """An open backing file.

    Attributes:
        read_fd: descriptor for reading.
        is_direct: whether reads bypass the page cache. Otherwise their pages are dropped from it.
        write_fd: descriptor for writing, -1 if the file is not to be written.
        is_block: whether it is a block device. Its changes are not visible.
        identity: (device, inode) of the open file.
        users: jobs that use its descriptors, counted by the event loop.
        is_retired: whether to close it when no job uses it.
    """

    read_fd: int
    is_direct: bool
    write_fd: int
    is_block: bool
    identity: tuple[int, int]
    users: int = 0
    is_retired: bool = False

    def close(self) -> None:
        """Close the descriptors. This may block as well."""
        for fd in (self.read_fd, self.write_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)


@dataclass(frozen=True, slots=True)
class Look:
    """The result of `examine`.

    Attributes:
        signature: the present one.
        is_racy: whether the file may change again with the same signature.
        opened: the file, if it had to be opened. The caller must close it.
    """

    signature: Signature
    is_racy: bool
    opened: SourceFile | None


def examine(path: str, writable: bool, backing: SourceFile | None, mountpoint: Path) -> Look:  # noqa: FBT001 - through a thread
    """Look at a backing file by its name.

    Open it if it is not open, or if the name now means another file.

    Args:
        path: its name.
        writable: whether to open it for writing too.
        backing: the file that is open at present.
        mountpoint: our mount. The file must not lie on it: its I/O would wait for this process.

    Raises:
        OSError: it does not exist or cannot be opened.
        VolumeError: it cannot be a backing file.
    """
    # The directory first: its entry for the name may be cached, too.
    ask_server(os.path.dirname(path))  # noqa: PTH120 - of the name as it is written
    ask_server(path)
    status = Path(path).stat()
    if backing is not None and backing.identity == (status.st_dev, status.st_ino):
        return _look(status, backing, None)
    opened = _open(path, status, mountpoint, writable=writable)
    try:
        return _look(os.fstat(opened.read_fd), opened, opened)
    except BaseException:
        opened.close()
        raise


def ask_server(file: str | int) -> None:
    """Refresh the attributes of a file on a network file system, by its name or a descriptor.

    NFS answers stat(2) from its cache for up to a minute, and a FUSE file system for any time.
    Errors are ignored here: the stat(2) that follows reports them.
    """
    room = ctypes.create_string_buffer(_STATX_BYTES)
    if isinstance(file, int):
        _libc.statx(file, b"", _EMPTY_PATH | _FORCE_SYNC, _BASIC_STATS, room)
    else:
        _libc.statx(_AT_FDCWD, os.fsencode(file), _FORCE_SYNC, _BASIC_STATS, room)


def _look(status: os.stat_result, backing: SourceFile, opened: SourceFile | None) -> Look:
    if backing.is_block:
        size = os.lseek(backing.read_fd, 0, os.SEEK_END)
        return Look(Signature(status.st_rdev, 0, size, 0, 0), is_racy=False, opened=opened)
    signature = _signature(status)
    youngest = max(signature.mtime_ns, signature.ctime_ns)
    window = RACY_NS if youngest % _SECOND_NS else COARSE_NS
    return Look(signature, is_racy=abs(time.time_ns() - youngest) < window, opened=opened)


def _signature(status: os.stat_result) -> Signature:
    return Signature(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


def refuse_unusable(path: str, mountpoint: Path) -> None:
    """Check that a path names a possible backing file.

    The daemon's own mount may not exist yet.

    Args:
        path: its name.
        mountpoint: our mount.

    Raises:
        OSError: it does not exist.
        VolumeError: it cannot be a backing file.
    """
    devices = [device for device, place, _source in _mounts() if place == str(mountpoint)]
    if Path(path).resolve().is_relative_to(mountpoint):
        raise _ours(path)
    _refuse_unusable(path, Path(path).stat(), _Site(mountpoint, devices[-1] if devices else -1))


def _refuse_unusable(path: str, status: os.stat_result, site: _Site) -> bool:
    """Refuse an impossible backing file; return whether it is a block device."""
    if stat.S_ISDIR(status.st_mode):
        raise VolumeError(
            f"{path} is a directory", hint="name a file or a block device", errno_=errno.EISDIR
        )
    is_block = stat.S_ISBLK(status.st_mode)
    if not is_block and not stat.S_ISREG(status.st_mode):
        raise VolumeError(
            f"{path} is neither a file nor a block device", hint="name one", errno_=errno.EINVAL
        )
    if _is_ours(status.st_rdev if is_block else status.st_dev, site):
        raise _ours(path)
    return is_block


def _ours(path: str) -> VolumeError:
    return VolumeError(
        f"{path} lies on a file that this daemon serves: reading it would wait for the daemon"
        " itself",
        hint="name a file that does not lie on the mount, or on a device made from it",
        errno_=errno.ELOOP,
    )


def _open(path: str, status: os.stat_result, mountpoint: Path, *, writable: bool) -> SourceFile:
    is_block = _refuse_unusable(path, status, _site(mountpoint))
    with contextlib.ExitStack() as undo:
        write_fd = -1
        if writable:
            write_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, write_fd)
        is_direct = True
        try:
            read_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            is_direct = False
            read_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, read_fd)
        for fd in (read_fd, write_fd):
            now = os.fstat(fd) if fd >= 0 else status
            if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
                raise VolumeError(
                    f"{path} became another file while it was being opened", hint="try again"
                )
        undo.pop_all()
    return SourceFile(read_fd, is_direct, write_fd, is_block, (status.st_dev, status.st_ino))


def read_into(backing: SourceFile, buffer: memoryview, offset: int) -> int:
    """Read into a buffer until it is full or the file ends; return the number of bytes.

    Raises:
        OSError: as the device says.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(backing.read_fd, [buffer[done:]], offset + done)
        done += count
        # A direct read that ends within a block has reached the end of the file. Another read from
        # there would not be aligned.
        if not count or count % LARGEST_BLOCK:
            break
    if not backing.is_direct:
        os.posix_fadvise(backing.read_fd, offset, done, os.POSIX_FADV_DONTNEED)
    return done


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a write.

    Attributes:
        count: bytes that were written. Fewer than requested after an error or a short write.
        errno_: the error that ended the write, 0 for none.
        before: signature just before the write.
        after: signature just after the write.
    """

    count: int
    errno_: int
    before: Signature | None
    after: Signature | None


def write_through(backing: SourceFile, data: bytes, offset: int) -> Written:
    """Write to the backing file. The result has the error, because a part may be written."""
    count = errno_ = 0
    before = after = None
    try:
        before = _status(backing)
        while count < len(data):
            step = os.pwrite(backing.write_fd, memoryview(data)[count:], offset + count)
            count += step
            if not step:
                break
        after = _status(backing)
    except OSError as error:
        errno_ = error.errno or errno.EIO
    return Written(count, errno_, before, after)


def _status(backing: SourceFile) -> Signature | None:
    if backing.is_block:
        return None
    ask_server(backing.write_fd)
    return _signature(os.fstat(backing.write_fd))


def sync(backing: SourceFile) -> None:
    """Flush written data to the device.

    Raises:
        OSError: as the device says.
    """
    if backing.write_fd >= 0:
        os.fsync(backing.write_fd)

    # Detection of our own mount below a file.


@dataclass(frozen=True, slots=True)
class _Site:
    """Our own mount, and its st_dev."""

    mountpoint: Path
    device: int


def _site(mountpoint: Path) -> _Site:
    devices = [device for device, place, _source in _mounts() if place == str(mountpoint)]
    if not devices:  # unmounted by another program; open files still work
        raise VolumeError(f"{mountpoint} is not mounted any more", hint=restart_daemon())
    return _Site(mountpoint, devices[-1])


def _is_ours(device: int, site: _Site, depth: int = 8) -> bool:
    """Say whether a device, or the device of a file system, lies on our mount at any depth."""
    if device == site.device:
        return True
    return depth > 0 and any(_is_ours(below, site, depth - 1) for below in _below(device, site))


def _below(device: int, site: _Site) -> Iterator[int]:
    """Yield the devices below a device; for a loop device, the device of its file."""
    for mounted, _place, source in _mounts():
        if mounted == device and source.startswith("/dev/"):
            # A file system over several devices has a number of its own.
            with contextlib.suppress(OSError):
                below = Path(source).stat().st_rdev
                if below != device:
                    yield below
    directory = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not directory.exists():
        return
    if (directory / "partition").exists():
        directory = directory.resolve().parent
        yield _number(directory / "dev")
    for slave in (directory / "slaves").glob("*"):
        yield _number(slave / "dev")
    with contextlib.suppress(OSError):
        file = os.fsdecode((directory / "loop" / "backing_file").read_bytes().rstrip(b"\n"))
        # For our own file the answer is known without stat(2).
        yield (
            site.device if Path(file).is_relative_to(site.mountpoint) else Path(file).stat().st_dev
        )


def _number(path: Path) -> int:
    major, _, minor = path.read_text().strip().partition(":")
    return os.makedev(int(major), int(minor))


def _mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> Iterator[tuple[int, str, str]]:
    """Yield (device, mountpoint, source) of every mount."""
    for line in filter(None, mountinfo.read_text(errors="surrogateescape").split("\n")):
        fields = line.split(" ")
        major, _, minor = fields[2].partition(":")
        place, source = (
            _OCTAL.sub(lambda code: chr(int(code[1], 8)), name)
            for name in (fields[4], fields[fields.index("-") + 2])
        )
        yield os.makedev(int(major), int(minor)), place, source
