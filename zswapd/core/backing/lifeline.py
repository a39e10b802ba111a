# SPDX-License-Identifier: GPL-2.0-or-later
"""A lock that shows whether threads of dead predecessors still live.

A thread that hangs in the kernel outlives its process, and may still write to the disk later. As
long as the thread lives, the open files of its process stay open, and the locks on them stay held.
Each process that writes holds a shared lock on one common file, through an open file of its own. A
process that gets the exclusive lock knows that no other process and no old thread is left.

Limits: the lock is for one process and its predecessors, of which only threads in the kernel
remain. A child that is forked without exec counts as its parent.
"""

from __future__ import annotations

import fcntl
import os


class Lifeline:
    """The lock of one process.

    Args:
        fd: any descriptor of the common file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Say whether no thread of a predecessor lives any more."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            # Shared again; a failed conversion may have dropped the shared lock.
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        return True

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)
