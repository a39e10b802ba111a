# SPDX-License-Identifier: GPL-2.0-or-later
"""The system calls and programs behind swapon and swapoff, each as thin as can be.

So that tests can stand in for all of them.

Loop devices are configured with LO_FLAGS_AUTOCLEAR: the kernel detaches one by itself when its last
user closes it. So whatever becomes of the process that attaches (SIGKILL included), a loop device
never outlives both it and the swap on it.

swapoff(2) always runs in a child process. The kernel marks the process that is in swapoff as the
first victim of the OOM killer, whatever its oom_score_adj; were that the daemon, a shortage during
swapoff would kill the one process that must not die (how it is made: system/spawn.py).

Sources: loop(4), linux/loop.h, linux/fs.h, swapon(2).
"""

from __future__ import annotations

import ctypes
import fcntl
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
"""Bytes discarded in one request: 4096 pages, some ten milliseconds of the daemon's time."""

SWAPOFF_NO_MEMORY = 2
"""Exit code of swapoff(8), since util-linux 2.36, for ENOMEM."""


class Kernel:
    """The real ones. All raise OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def free_loop(self) -> int:
        """Return the number of a loop device that is free now.

        Another process may take it before us.
        """
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        finally:
            os.close(control)

    def open_loop(self, device: str, *, exclusive: bool = False) -> int:
        """Open a loop device and return the descriptor.

        Args:
            device: its path.
            exclusive: nobody can swap on to it or mount it meanwhile; EBUSY if somebody has.
        """
        return os.open(device, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0))

    def close(self, loop: int) -> None:
        """Close a loop device; it detaches itself if nobody else has it open."""
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

        Its file system may be asked.
        """
        loop = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = fcntl.ioctl(loop, LOOP_GET_STATUS64, bytes(_LOOP_INFO.size))
        finally:
            os.close(loop)
        number, inode, *_ = _LOOP_INFO.unpack(info)
        return number, inode

    def clear_loop(self, loop: int) -> None:
        """Detach the file from a loop device, now or when its last other user closes it."""
        fcntl.ioctl(loop, LOOP_CLR_FD)

    def discard(self, loop: int) -> None:
        """Discard all of a loop device, in steps, between which the daemon can serve others."""
        size = os.lseek(loop, 0, os.SEEK_END)
        for offset in range(0, size, DISCARD_STEP):
            fcntl.ioctl(
                loop, BLKDISCARD, struct.pack("=QQ", offset, min(DISCARD_STEP, size - offset))
            )

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Run a program to its end; return its exit code and what it said."""
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
        """Switch swap on."""
        if self._libc.swapon(os.fsencode(device), flags) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), device)

    def start_swapoff(self, device: str) -> Child:
        """Switch swap off in a child process, however long that takes.

        Killed, it gives up at the next page.
        """
        return spawn(("swapoff", device))
