# SPDX-License-Identifier: GPL-2.0-or-later
"""A locked segment of System V shared memory: memory that the kernel never swaps out.

It is for kernels without a noswap tmpfs (before Linux 6.4). The pages of a memfd are safe from swap
only while a process has them mapped and locked. Between a worker's death and its successor, the
kernel could swap the pool out to the device that no worker serves, and all would wait for it.
SHM_LOCK marks the file itself instead, so it needs no process that locks pages.

The segment is removed (IPC_RMID) as soon as it is made, so it ends with its last attachment, and
nothing is left behind. Its file is opened through /proc, so it can be handed over, mapped, and
punched like a memfd. The number of the file's inode is that of the segment, by which a successor
attaches it too.

Limits: the lock ends with the last attachment. After the death of supervisor and worker, the file
is like a memfd. The lock needs CAP_IPC_LOCK, and the file CAP_SYS_ADMIN or
CAP_CHECKPOINT_RESTORE.

Sources: shmget(2), shmctl(2), proc_pid_map_files(5); shmem_lock() in mm/shmem.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_IPC_PRIVATE, _IPC_CREAT, _IPC_RMID, _SHM_LOCK = 0, 0o1000, 0, 11
_SHM_NORESERVE = 0o10000
_MADV_DONTDUMP = 16
_NAME = "/SYSV"
"""Begin of the name that the kernel gives the file of a segment."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
_libc.shmctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
_libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.shmat.restype = ctypes.c_void_p
_libc.shmdt.argtypes = [ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


class Segment:
    """One attachment of a segment to this process. A forked process has it too.

    Args:
        number: the kernel's number of the segment.
        size: its bytes.

    Raises:
        OSError: the kernel refuses the attachment.
    """

    def __init__(self, number: int, size: int) -> None:
        self._address, self._size = 0, size
        address = _libc.shmat(number, None, 0)
        if address == ctypes.c_void_p(-1).value or address is None:
            raise _failure()
        self._address = address
        # Each mapping of the arena is left out of core dumps: it has the memory of other processes.
        _libc.madvise(address, size, _MADV_DONTDUMP)

    @classmethod
    def make(cls, size: int) -> tuple[Segment, int]:
        """Make a locked segment; return its attachment and a descriptor of its file.

        Args:
            size: bytes, a multiple of the system's page.

        Raises:
            OSError: the kernel has no such segments, or this process may not lock or open them.
        """
        number = _libc.shmget(_IPC_PRIVATE, size, _IPC_CREAT | _SHM_NORESERVE | 0o600)
        if number < 0:
            raise _failure()
        try:
            segment = cls(number, size)
            if _libc.shmctl(number, _SHM_LOCK, None) != 0:
                raise _failure()
            descriptor = os.open(segment._file(), os.O_RDWR | os.O_CLOEXEC)
        finally:
            _libc.shmctl(number, _IPC_RMID, None)
        return segment, descriptor

    @classmethod
    def find(cls, descriptor: int) -> Segment | None:
        """Attach the segment of an inherited file; return None if the file has none (any more)."""
        with contextlib.suppress(OSError):
            if not str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(_NAME):
                return None
            wanted = os.fstat(descriptor)
            segment = cls(wanted.st_ino, wanted.st_size)
            # Another segment may have the number by now.
            if os.path.samestat(wanted, segment._file().stat()):
                return segment
            segment.close()
        return None

    def _file(self) -> Path:
        """Return the path of the segment's file."""
        return Path(f"/proc/self/map_files/{self._address:x}-{self._address + self._size:x}")

    def close(self) -> None:
        """Detach the segment."""
        if self._address:
            _libc.shmdt(self._address)
            self._address = 0

    def __del__(self) -> None:
        self.close()
