# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls and programs for swapon and swapoff. Tests replace this class.

Loop devices are configured with LO_FLAGS_AUTOCLEAR: the kernel detaches a loop device when its last
user closes it. A loop device therefore ends with the process that attaches it, also after SIGKILL,
unless there is swap on it.

swapoff(2) always runs in a child process. The kernel makes a process in swapoff the first victim of
the OOM killer, independent of its oom_score_adj. If that were the daemon, a lack of memory during
swapoff would kill the one process that must not die. system/spawn.py makes the child process.

Sources: loop(4), linux/loop.h, linux/fs.h, swapon(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
from typing import TYPE_CHECKING

from zswapd.host.machine import plain_ioctl
from zswapd.system.spawn import Child, spawn

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOP_CTL_GET_FREE = 0x4C82
LOOP_CONFIGURE = 0x4C0A
LOOP_CLR_FD = 0x4C01
LOOP_GET_STATUS64 = 0x4C05
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16
_LOOP_INFO = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: backing descriptor, block size, loop_info64, reserved
_LOOP_CONFIG = struct.Struct("=II 5Q4I64s64s32s2Q 64x")

SWAP_FLAG_PREFER = 0x8000
SWAP_FLAG_DISCARD = 0x10000

BLKDISCARD = plain_ioctl(0x12, 119)
DISCARD_STEP = 16 << 20
"""Bytes that one request discards: 4096 pages, about 10 ms of the daemon's time."""

SWAPOFF_NO_MEMORY = 2
"""Exit code of swapoff(8) for ENOMEM, since util-linux 2.36."""


class Kernel:
    """The real system calls and programs. All methods raise OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def free_loop(self) -> int:
        """Return the number of a free loop device. Another process may take it first."""
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        finally:
            os.close(control)

    def open_loop(self, device: str, *, exclusive: bool = False) -> int:
        """Open a loop device and return the descriptor.

        Args:
            device: path of the device.
            exclusive: True to keep other programs from swap and mount on the device while it is
                open. EBUSY if there is swap or a mount on it.
        """
        return os.open(device, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0))

    def close(self, loop: int) -> None:
        """Close a loop device. The last close detaches it."""
        os.close(loop)

    def configure_loop(self, loop: int, backing: int, name: str, block_size: int) -> None:
        """Attach a file to a loop device, with direct I/O, until its last user closes it."""
        flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO
        shown = os.fsencode(name)[-63:]
        config = _LOOP_CONFIG.pack(
            backing, block_size, 0, 0, 0, 0, 0, 0, 0, 0, flags, shown, b"", b"", 0, 0
        )
        fcntl.ioctl(loop, LOOP_CONFIGURE, config)

    def loop_identity(self, device: str) -> tuple[int, int]:
        """Return st_dev and st_ino of the file behind a loop device.

        The kernel may ask the file system, which may hang.
        """
        loop = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = fcntl.ioctl(loop, LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
        finally:
            os.close(loop)
        number, inode, *_ = _LOOP_INFO.unpack(info)
        return number, inode

    def clear_loop(self, loop: int) -> None:
        """Detach the file from a loop device, at once or when its last user closes it."""
        fcntl.ioctl(loop, LOOP_CLR_FD)

    def is_readable(self, device: str) -> bool:
        """Return whether the first or the last page of a device can be read from what is behind it.

        One of the two may be unreadable by itself. Direct I/O passes the page cache by, which may
        still have the page when the file behind the device gives only errors.
        """
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            last = os.lseek(fd, 0, os.SEEK_END) - mmap.PAGESIZE
            return any(_reads(fd, offset) for offset in (0, max(last, 0)))
        finally:
            os.close(fd)

    def discard(self, loop: int) -> None:
        """Discard a whole loop device, in steps, so that the daemon can serve other requests."""
        size = os.lseek(loop, 0, os.SEEK_END)
        for offset in range(0, size, DISCARD_STEP):
            fcntl.ioctl(
                loop, BLKDISCARD, struct.pack("=QQ", offset, min(DISCARD_STEP, size - offset))
            )

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a program to its end; return its exit code and its output."""
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.returncode, done.stdout.strip()

    def swapon(self, device: str, flags: int) -> None:
        """Swap on to a device."""
        if self._libc.swapon(os.fsencode(device), flags) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), device)

    def start_swapoff(self, device: str) -> Child:
        """Start swapoff in a child process. A killed child stops at the next page."""
        return spawn(("swapoff", device))


def _reads(fd: int, offset: int) -> bool:
    """Return False if the page at an offset gives EIO."""
    try:
        os.preadv(fd, [mmap.mmap(-1, mmap.PAGESIZE)], offset)
    except OSError as error:
        if error.errno == errno.EIO:
            return False
        raise
    return True
