# SPDX-License-Identifier: GPL-2.0-or-later
"""The reaper: dead workers that wait(2) cannot reap yet.

A process cannot be reaped while one of its threads is in a system call that no signal interrupts.
An example is a read from a device that hangs, by a thread of a cache volume. The main thread is
then a zombie, and the process never runs in user space again. Its parent gets no SIGCHLD. Its
successor must not wait for a device.

The successor waits for all threads that are not harmless: a thread that is about to punch holes
into the arena does so before it dies. Three kinds of threads are harmless, and known by their
names:

- Threads of volumes do not touch what a successor takes over.
- Threads of the disk behind the pool may still write to slots. The successor keeps away from these
  slots (core/backing/transfers.py, claims).
- Threads of swapoff wait for a page or an answer of their own process. The successor gives it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from zswapd.system.signals import name_of

HARMLESS = ("volume", "backing", "swapoff", "attendant")
"""Prefixes of the names of threads that may outlive their process.

volumes/mounted.py, worker/disk.py and worker/prepare.py name these threads. "attendant" is the name
of the swapoff thread in version 0.1.0.
"""
_STATE, _BORN, _EXIT_CODE = 0, 19, 49
"""Fields of /proc/PID/stat, counted from the field after the name.

In proc(5) they are state (3), starttime (22) and exit_code (52, in the form of wait(2)).
"""
_DEAD = frozenset({"Z", "X"})


def exit_status_if_dead(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Return the wait status of a process that has only harmless threads left.

    Limit: the status is 0 for a caller that may not trace the process. Workers are not dumpable, so
    the supervisor in zswapd.service, which lacks CAP_SYS_PTRACE, always reads 0. That is safe,
    because a worker that stops the daemon first says so in shared memory (Phase.STOPPING).

    Returns:
        The wait status; None if the process lives, or if there is no such process.
    """
    try:
        fields = _fields(proc / str(pid))[1]
        if fields[_STATE] not in _DEAD:
            return None
        for thread in (proc / str(pid) / "task").iterdir():
            name, its = _fields(thread)
            if its[_STATE] not in _DEAD and not name.startswith(HARMLESS):
                return None
    except OSError:  # the process is ending right now
        return None
    return int(fields[_EXIT_CODE])


def born_ticks(pid: int, proc: Path = Path("/proc")) -> int:
    """Return the start time of a process in ticks since boot; 0 if there is no such process."""
    try:
        return int(_fields(proc / str(pid))[1][_BORN])
    except OSError:
        return 0


def _fields(directory: Path) -> tuple[str, list[str]]:
    """Return a thread's name, and the fields after the name in its `stat`."""
    head, _, rest = (directory / "stat").read_text(errors="replace").rpartition(")")
    return head.partition("(")[2], rest.split()


def end_by(code: int) -> str:
    """Return the cause of a process's end as text, from `os.waitstatus_to_exitcode`."""
    if code >= 0:
        return f"exit code {code}" if code else "an unknown cause"
    return name_of(-code)


class Reaper:
    """Dead children that are still to be reaped."""

    def __init__(self) -> None:
        self._pids: set[int] = set()

    def add(self, pid: int) -> None:
        """Have a child reaped later."""
        self._pids.add(pid)

    def reap(self) -> None:
        """Reap the children whose last thread has ended."""
        for pid in list(self._pids):
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            self._pids.discard(pid)
