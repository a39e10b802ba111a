# SPDX-License-Identifier: GPL-2.0-or-later
"""Scheduling of the daemon's threads, which in Linux also decides on the last free memory.

A page request that waits for the time slice of a computing program waits for milliseconds. A nice
value prevents that. Real-time scheduling does more: allocations may go below the min watermark of a
zone, as far as half of it (three quarters before Linux 6.3). Ordinary tasks wait at that watermark
until swap-out has freed memory. So a thread that must not wait for swap is real-time when it
allocates. The supervisor always is, because it sleeps nearly all the time. A worker is real-time
until it serves, and then while memory is scarce (`check_memory` in fuse/_lowlevel.c). At other
times it is not: a real-time task that wakes up drives the swapping program from its processor.

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
"""Nice value of the daemon: a page request does not wait for the time slice of another program.

Beside two computing programs, the p99 of a random fault is 0.2 ms instead of 3.3 ms. At -20, the
daemon drove the swapping program from its processor as it woke up. In half of the runs, that cost a
third of swap-out.
"""

_SLACK = 16 << 20


def set_realtime() -> None:
    """Make this thread real-time, and the threads and processes that it starts later.

    A new thread first allocates memory, so it must be real-time from its start. Without
    CAP_SYS_NICE, the scheduling does not change.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


WORKER_NAME, SPARE_NAME = "zswapd-worker", "zswapd-spare"
"""The process names of a worker and of a spare."""


def set_process_name(name: str) -> None:
    """Give this process a name for ps, top and the kernel's messages.

    At most 15 bytes of it are kept.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def set_normal(thread: int = 0) -> None:
    """Give a thread ordinary scheduling again; its nice value does not change.

    Args:
        thread: the kernel's id of the thread; 0 for this one.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


@contextlib.contextmanager
def ordinary_children() -> Iterator[None]:
    """Fork ordinary processes in this context, although this thread is real-time."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, parameter)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy & ~os.SCHED_RESET_ON_FORK, parameter)


def set_idle() -> None:
    """Make this thread an idle task, for work of 0.1 s and more, such as to prepare a spare.

    A swapping program that waits that long is moved to another processor. Each of its pages then
    costs an interrupt (core/allocators/_populate.c), which halved swap-out.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def set_nice(*, needed: bool) -> None:
    """Give this thread nice value 0, or NICE if its work is needed now.

    It is for threads that compute for milliseconds: at the daemon's priority, they would keep the
    swapping program from running. A thread that may not change its priority keeps it.
    """
    set_normal()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE if needed else 0)


def scarce_bytes(root: Path = Path("/")) -> int:
    """Return the free memory, bytes, below which allocations may soon wait; 0 if it is unknown.

    It is 1.5 times vm.min_free_kbytes, at which kswapd sleeps, and the 16 MiB of the DMA zone,
    which count as free but are not used.

    Args:
        root: directory of /proc, for tests.
    """
    try:
        return int((root / "proc/sys/vm/min_free_kbytes").read_text()) * 1536 + _SLACK
    except (OSError, ValueError):
        return 0
