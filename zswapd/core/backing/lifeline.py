# SPDX-License-Identifier: GPL-2.0-or-later
"""How a process knows that no thread of its predecessors lives any more.

A thread that hangs in the kernel outlives its dead process, and may still write to the disk when it
comes back. As long as it lives, so do the open files of its process; and so does a lock on one.
Each process that writes holds a shared lock on a common file, through an open file of its own:
whoever gets it exclusively is the only one.

Limits: to be held by one process and its predecessors, of which only threads in the kernel are
left; a child that is forked without exec counts as its parent.
"""

from __future__ import annotations

import fcntl
import os


class Lifeline:
    """One process' lock.

    Args:
        fd: any descriptor of the common file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def is_alone(self) -> bool:
        """Say whether no thread of a predecessor lives."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_SH)  # a try in vain may have cost the shared one
        return True

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._fd)
