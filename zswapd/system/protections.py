# SPDX-License-Identifier: GPL-2.0-or-later
"""Protections of a daemon that serves swap against waiting for its own swap.

Each protection is reported as on or off. None is enough alone, and the daemon starts without them.
The main rule is that the page path never allocates memory from the kernel. A protection that is off
must be visible, so every function returns a Protection and never raises. `zswapctl swapon` checks
them.

Order and timing: `protect` runs before any thread exists (PR_SET_IO_FLUSHER is per thread and
inherited) and before the arena is mapped (MCL_FUTURE covers it then, and MCL_ONFAULT keeps it from
being faulted in whole). Memory is locked first: what is taken before could be swapped out before
it is locked, and would then be in swap when this process has to serve. The heaps grow before
PR_SET_IO_FLUSHER, while allocations may still wait for reclaim in the ordinary way.

Sources: mlockall(2), prctl(2), proc(5), mallopt(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from zswapd.host import cgroups
from zswapd.host.hints import for_capability
from zswapd.system import code
from zswapd.system.heap import (
    LIBC_HEAP,
    PYTHON_HEAP,
    grow_libc_heap,
    grow_python_heap,
    leave_out_of_core_dumps,
    own_memory,
    swap_in,
)
from zswapd.system.scheduling import NICE, set_idle
from zswapd.units import format_size

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4
PR_SET_IO_FLUSHER = 57
PR_SET_DUMPABLE = 4
CAP_IPC_LOCK, CAP_SYS_RESOURCE = 14, 24


@dataclass(frozen=True, slots=True)
class Protection:
    """One protection, or one recommended setting of the system."""

    name: str
    on: bool
    detail: str
    """The state that was reached, or the reason of the failure, as a clause."""
    hint: str | None = None
    """The remedy if it is off."""


def protect(
    *,
    lock_memory: bool,
    oom_score_adj: int,
    scheduling: str = "normal",
    owns_memory: bool = False,
    populates_code: bool = True,
    libc_heap: int = LIBC_HEAP,
    python_heap: int = PYTHON_HEAP,
    root: Path = Path("/"),
) -> tuple[Protection, ...]:
    """Switch the protections on, before any thread exists.

    Args:
        lock_memory: lock present and future memory.
        oom_score_adj: the OOM killer's adjustment, -1000 to 1000.
        scheduling: "nice", "rr" or "normal": scheduling of this thread and those that it starts.
        owns_memory: this process was forked, and is to have its memory for itself.
        populates_code: load programs and libraries, if memory is locked. This has to wait while
            they may be in swap that no process serves (code.py).
        libc_heap: bytes by which malloc's heap grows.
        python_heap: bytes by which Python's arenas grow.
        root: directory of /proc, for tests.

    Returns:
        All protections as they are now, including those that are switched off.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    locked = (
        _lock_memory(libc, root, populates_code=populates_code)
        if lock_memory
        else _not_wanted("lock_memory")
    )
    reached = (
        *((take_own_memory(root),) if owns_memory else ()),
        _grow_heaps(libc, libc_heap, python_heap),
        locked,
        _set_oom_score_adj(oom_score_adj, root),
        flusher := _set_io_flusher(libc, root),
        _forbid_core_dumps(libc, root),
        _set_scheduling(scheduling),
    )
    return (*reached, _look_at_limits(root, is_flusher=flusher.on))


def set_idle_priority() -> None:
    """Make this process an idle task, and let it wait for memory like any process, swap included.

    This is for a spare, for which no page waits. The next `protect` and `set_realtime` undo it.
    """
    ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    set_idle()


def grow_heaps() -> None:
    """Grow the heaps to their full size in about 20 ms; call it when idle and memory is plenty."""
    grow_python_heap(PYTHON_HEAP)
    grow_libc_heap(ctypes.CDLL(None, use_errno=True), LIBC_HEAP)


def refreshed(
    protections: tuple[Protection, ...], root: Path = Path("/")
) -> tuple[Protection, ...]:
    """Return the protections with the present locked memory and memory limits."""
    is_flusher = any(item.name == "io_flusher" and item.on for item in protections)
    return tuple(
        (
            dataclasses.replace(item, detail=_locked_detail(root))
            if item.name == "lock_memory" and item.on
            else (
                _look_at_limits(root, is_flusher=is_flusher)
                if item.name == "memory_limit"
                else item
            )
        )
        for item in protections
    )


def limit_protection(root: Path = Path("/")) -> Protection:
    """Return the protection `memory_limit` of a daemon with the capabilities of this process."""
    return _look_at_limits(root, is_flusher=_has_capability(root, CAP_SYS_RESOURCE))


def _not_wanted(name: str) -> Protection:
    return Protection(
        name, on=False, detail="switched off by configuration", hint=f"set service.{name}=true"
    )


def _grow_heaps(libc: ctypes.CDLL, libc_heap: int, python_heap: int) -> Protection:
    arenas = grow_python_heap(python_heap)
    detail = f"Python holds {arenas} MiB"
    if not grow_libc_heap(libc, libc_heap):
        return Protection(
            "heap",
            on=False,
            detail=f"{detail}, but this malloc has no setting to keep its own memory",
            hint="use glibc",
        )
    return Protection("heap", on=True, detail=f"{detail}, malloc {libc_heap >> 20} MiB")


def take_own_memory(root: Path = Path("/")) -> Protection:
    """Copy all pages that are shared with the parent until a write.

    A forked Python writes to them all the time, because each use of an object changes its reference
    count. Each first write to a page allocates a page from the kernel, on the page path too.

    Args:
        root: directory of /proc, for tests.
    """
    name = "own_memory"
    copied = own_memory(ctypes.CDLL(None), root)
    if copied < 0:
        hint = "use Linux 5.14 or later"
        return Protection(
            name,
            on=False,
            detail="pages shared with the supervisor are copied when written to",
            hint=hint,
        )
    return Protection(name, on=True, detail=f"{copied >> 20} MiB are the worker's own")


def _lock_memory(libc: ctypes.CDLL, root: Path, *, populates_code: bool) -> Protection:
    name = "lock_memory"
    if not _may_lock_all(root):
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        # To lock up to the limit would be worse than no lock: with MCL_FUTURE, a mapping beyond the
        # limit fails.
        detail = f"only {limit >> 10} KiB may be locked (RLIMIT_MEMLOCK)"
        hint = f"{for_capability('CAP_IPC_LOCK')}; or raise RLIMIT_MEMLOCK: `ulimit -l unlimited`"
        return Protection(name, on=False, detail=detail, hint=hint)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) != 0:
        return Protection(
            name, on=False, detail=f"mlockall: {_last_error()}", hint=for_capability("CAP_IPC_LOCK")
        )
    swap_in(libc, root)
    if populates_code:
        code.populate(libc, root, waits=True)
    if _status_field(root, "VmLck") == 0:
        return Protection(
            name,
            on=False,
            detail="mlockall worked, but VmLck is 0",
            hint="check the kernel's version (4.4)",
        )
    return Protection(name, on=True, detail=_locked_detail(root))


def _may_lock_all(root: Path) -> bool:
    if _has_capability(root, CAP_IPC_LOCK):
        return True
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def _locked_detail(root: Path) -> str:
    """Return the locked memory as text: all resident pages (MCL_ONFAULT)."""
    resident = min(_status_field(root, "VmRSS"), _status_field(root, "VmLck"))
    return f"{resident >> 10} MiB of the worker are in memory and locked, and what it takes will be"


def _look_at_limits(root: Path, *, is_flusher: bool) -> Protection:
    """Say whether reclaim at a memory limit can make this process write to its own swap device.

    An IO flusher never writes a page to swap. Without the flag, this process may wait in a page
    fault for a request to its own swap device, which no other process serves. It cannot be killed
    then.
    """
    name = "memory_limit"
    limits = cgroups.find(root)
    if not limits:
        return Protection(name, on=True, detail="no memory cgroup above the daemon has one")
    lowest = f"{format_size(limits[0].bytes)} ({limits[0].file})"
    unsafe = next((limit for limit in limits if cgroups.may_swap(limit)), None)
    if unsafe is None:
        return Protection(name, on=True, detail=f"{lowest}; nothing is swapped out because of it")
    if is_flusher:
        return Protection(
            name, on=True, detail=f"{lowest}; the daemon swaps nothing out when it is met"
        )
    detail = (
        f"{format_size(unsafe.bytes)} ({unsafe.file}): to stay below it the daemon may swap to its"
        " own device"
    )
    return Protection(name, on=False, detail=detail, hint=_without_swap(unsafe))


def _without_swap(limit: cgroups.Limit) -> str:
    """Return the command that switches off swap-out at a limit."""
    directory = limit.file.parent
    if limit.version == 2:
        unit = (
            directory.name
            if limit.is_own and directory.name.endswith((".service", ".scope"))
            else ""
        )
        return (
            f"systemctl set-property {unit} MemorySwapMax=0"
            if unit
            else f"echo 0 > {directory}/memory.swap.max"
        )
    if limit.is_own:
        return f"echo 0 > {directory}/memory.swappiness"
    if limit.file.name == "memory.stat":  # of a cgroup that cannot be seen from here
        return (
            "start the container with as much memory and swap together as memory, or with the"
            " capability CAP_SYS_RESOURCE"
        )
    return f"echo {limit.bytes} > {directory}/memory.memsw.limit_in_bytes"


def _set_io_flusher(libc: ctypes.CDLL, root: Path) -> Protection:
    name = "io_flusher"
    threads = len(list((root / "proc/self/task").iterdir()))
    if threads > 1:
        return Protection(
            name,
            on=False,
            detail=f"{threads} threads run already and would lack it",
            hint="report this as a bug",
        )
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0:
        return Protection(
            name, on=True, detail="allocations by the daemon start no I/O to its own swap"
        )
    failed = ctypes.get_errno()
    if failed == errno.EPERM:
        return Protection(
            name, on=False, detail="not permitted", hint=for_capability("CAP_SYS_RESOURCE")
        )
    if failed == errno.EINVAL:
        return Protection(
            name, on=False, detail="this kernel does not have it", hint="use Linux 5.6 or later"
        )
    return Protection(
        name,
        on=False,
        detail=f"prctl: {os.strerror(failed)}",
        hint=for_capability("CAP_SYS_RESOURCE"),
    )


def _forbid_core_dumps(libc: ctypes.CDLL, root: Path) -> Protection:
    """Keep the memory of other users out of core dumps.

    The limit is for dumps to files, and the flag for dumps to a program. A dump that a debugger
    makes lacks the heaps. It also lacks the arena and the hook's buffers, which exclude themselves.
    """
    name = "no_core_dumps"
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        return Protection(
            name, on=False, detail=f"RLIMIT_CORE: {error}", hint="report this as a bug"
        )
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        return Protection(
            name, on=False, detail=f"prctl: {_last_error()}", hint="report this as a bug"
        )
    if not leave_out_of_core_dumps(libc, root):
        return Protection(
            name,
            on=True,
            detail="the kernel makes no core dump; a debugger's would have pages in it",
        )
    return Protection(name, on=True, detail="what is swapped out is in no core dump")


def _set_scheduling(kind: str) -> Protection:
    """Run before programs that compute: a request that waits for their time slice waits for ms.

    "rr" also lets allocations go below the watermarks, as for all real-time tasks. With only one
    processor, it keeps the loop driver's thread from running while the daemon polls for requests.
    """
    name = "scheduling"
    if kind == "normal":
        return Protection(
            name,
            on=False,
            detail="switched off by configuration",
            hint="set service.scheduling=nice",
        )
    try:
        if kind == "rr":
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            return Protection(name, on=True, detail="real-time, round robin, priority 1")
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    except OSError as error:
        return Protection(
            name, on=False, detail=f"{kind}: {error.strerror}", hint=for_capability("CAP_SYS_NICE")
        )
    return Protection(name, on=True, detail=f"nice {NICE}")


def _set_oom_score_adj(wanted: int, root: Path) -> Protection:
    path = root / "proc/self/oom_score_adj"
    reason = ""
    try:
        if int(path.read_text()) != wanted:
            path.write_text(f"{wanted}\n")
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
        reason = "not permitted" if missing else str(error)
    try:
        reached = int(path.read_text())
    except (OSError, ValueError):
        return Protection(
            "oom_score_adj", on=False, detail=reason, hint="`mount -t proc proc /proc`"
        )
    if reached <= wanted:
        return Protection("oom_score_adj", on=True, detail=f"{reached}")
    return Protection(
        "oom_score_adj",
        on=False,
        detail=f"{reached} instead of {wanted}: {reason}",
        hint=for_capability("CAP_SYS_RESOURCE"),
    )


def _status_field(root: Path, name: str) -> int:
    """Return a field of /proc/self/status in KiB; 0 if it is missing."""
    match = re.search(
        rf"^{name}:\s*(\d+) kB", (root / "proc/self/status").read_text(), re.MULTILINE
    )
    return int(match[1]) if match else 0


def _has_capability(root: Path, bit: int) -> bool:
    match = re.search(
        r"^CapEff:\s*([0-9a-f]+)", (root / "proc/self/status").read_text(), re.MULTILINE
    )
    return match is not None and bool(int(match[1], 16) >> bit & 1)


def _last_error() -> str:
    return os.strerror(ctypes.get_errno())
