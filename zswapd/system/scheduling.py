# SPDX-License-Identifier: GPL-2.0-or-later
"""How the daemon gets a processor, and, which goes with it in Linux, the last memory there is.

A page that waits for a time slice of a program that computes waits for milliseconds; a nice value
is enough against that. A real-time task is more: what it asks the kernel for may go below the
zones' min watermark, as far as half of it (three quarters before Linux 6.3). Ordinary tasks wait at
that mark until swapping out has freed something. So whoever must not wait for swap is a real-time
task when it asks: the supervisor always, as it sleeps all the time; a worker until it serves, and
from then on while memory is scarce (`check_memory` in fuse/_lowlevel.c). Not always: a real-time
task drives the swapping program from its processor as it wakes up.

Sources: sched(7); gfp_to_alloc_flags() and __zone_watermark_ok() in mm/page_alloc.c.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NICE = -3
"""Enough that a page does not wait for the time slice of a program that computes.

Beside two of them the p99 of a random fault is 0.2 ms instead of 3.3. Not so much that the daemon,
as it wakes up, drives the swapping program from its processor: at -20 that cost a third of swap-out
in half of the runs.
"""

_SLACK = 16 << 20


def set_realtime() -> None:
    """Make this thread a real-time one, and what it starts, threads and processes.

    A new thread's first act is to take memory.

    Best effort: without CAP_SYS_NICE it stays what it is.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def set_process_name(name: str) -> None:
    """Give this process a name for ps, top and the kernel's messages.

    At most 15 bytes of it are kept.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def set_normal(thread: int = 0) -> None:
    """Make a thread an ordinary one again, with its nice value as before.

    Args:
        thread: its id in the kernel; 0 for this one.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


@contextlib.contextmanager
def ordinary_children() -> Iterator[None]:
    """Have processes that are forked meanwhile begin as ordinary tasks.

    Though this thread is a real-time one.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, parameter)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy & ~os.SCHED_RESET_ON_FORK, parameter)


def set_idle() -> None:
    """Make this thread one that runs where nobody else wants to.

    For work of a tenth of a second and more, such as making a spare worker: if a swapping program
    has to wait that long, it is moved to another processor, and its pages then cost an interrupt
    each (core/allocators/_populate.c): that halved swap-out.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def set_nice(*, needed: bool) -> None:
    """Have this thread get its processor like everybody's.

    Or as the daemon does again where its work is needed now.

    For threads that compute for milliseconds: at the daemon's priority they would keep the swapping
    program itself from
    running. Best effort: a thread that may not change its priority keeps it.
    """
    set_normal()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE if needed else 0)


def scarce_bytes(root: Path = Path("/")) -> int:
    """Return the free memory below which allocations may soon have to wait.

    0 if the kernel does not say.

    One and a half times vm.min_free_kbytes, where kswapd sleeps; and what the DMA zone may hold,
    which counts as free and serves nobody.

    Args:
        root: where /proc is, for tests.
    """
    try:
        return int((root / "proc/sys/vm/min_free_kbytes").read_text()) * 1536 + _SLACK
    except (OSError, ValueError):
        return 0
