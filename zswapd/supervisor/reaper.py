# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers that are dead and cannot be buried yet.

A process is not reaped, and its parent hears nothing, while one of its threads is in a system call
that no signal ends: a read of a device that hangs, say, by a thread of a cache volume. Its main
thread is a zombie then, and nothing of it will ever run in user space again. Its successor must not
wait for a device.

It has to wait for all other threads, though: one that is about to punch holes into the arena does
so before it dies. Threads of volumes, known by their names, have nothing to do with what a
successor takes over; from what those of the disk behind the pool may still write it keeps away
(core/backing/transfers.py, claims); and the threads of swapoff wait for a page or an answer that
their own process owed them, which is the successor's to give.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from zswapd.system.signals import name_of

HARMLESS = ("volume", "backing", "swapoff", "attendant")
"""What the names of threads begin with that may outlive their process.

They are those of volumes/mounted.py, worker/disk.py and worker/prepare.py; in 0.1.0, the last one
had the name "attendant".
"""
_STATE, _BORN, _EXIT_CODE = 0, 19, 49
"""Fields of /proc/PID/stat, counted from behind the name.

State (3), starttime (22), exit_code (52, in the form of wait(2)).
"""
_DEAD = frozenset({"Z", "X"})


def exit_status_if_dead(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Return the wait status of a process of which only harmless threads are left.

    None if it lives, or if there is none.

    The kernel tells it to who may trace the process: 0 for all others, as for us without
    CAP_SYS_PTRACE (zswapd.service), since
    workers are not dumpable. That is no danger: a worker that ends well says so in shared memory
    first (Phase.STOPPING).
    """
    try:
        fields = _fields(proc / str(pid))[1]
        if fields[_STATE] not in _DEAD:
            return None
        for thread in (proc / str(pid) / "task").iterdir():
            name, its = _fields(thread)
            if its[_STATE] not in _DEAD and not name.startswith(HARMLESS):
                return None
    except OSError:  # it is just ending
        return None
    return int(fields[_EXIT_CODE])


def born_ticks(pid: int, proc: Path = Path("/proc")) -> int:
    """Return when a process began, in ticks since the machine did; 0 if there is none."""
    try:
        return int(_fields(proc / str(pid))[1][_BORN])
    except OSError:
        return 0


def _fields(directory: Path) -> tuple[str, list[str]]:
    """Return a thread's name, and what stands behind it in its `stat`."""
    head, _, rest = (directory / "stat").read_text(errors="replace").rpartition(")")
    return head.partition("(")[2], rest.split()


def end_by(code: int) -> str:
    """Return what a process ended by, from `os.waitstatus_to_exitcode`."""
    if code >= 0:
        return f"exit code {code}" if code else "an unknown cause"
    return name_of(-code)


class Reaper:
    """Dead children that wait(2) still has to tell of."""

    def __init__(self) -> None:
        self._pids: set[int] = set()

    def add(self, pid: int) -> None:
        """Bury it later."""
        self._pids.add(pid)

    def reap(self) -> None:
        """Bury those whose last thread has come back."""
        for pid in list(self._pids):
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(pid, os.WNOHANG)[0]:
                    continue
            self._pids.discard(pid)
