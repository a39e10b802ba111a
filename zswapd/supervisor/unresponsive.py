# SPDX-License-Identifier: GPL-2.0-or-later
"""End an orphan that does not answer, because it is stopped or loops, and take over its files.

No other process would end it, and every reader of a swapped-out page waits. Before anything is done
to the worker, its supervisor is known to be dead: the lock that only a living supervisor holds is
free (control/listener.py). A slow worker with a living supervisor is left to the supervisor.

The files come from one of two places:

- The service manager's store. The shared state then has the worker's process id and start time.
- The worker itself. The process that has the lock file open is found in /proc. Its files are copied
  (pidfd_getfd(2), Linux 5.6) before it is ended. The shared state is recognised by its first bytes,
  and has the numbers of the other files.

Limits: copying files needs CAP_SYS_PTRACE. The shipped unit does not have it, and uses the store. A
worker that waits in the kernel for its own answer cannot be ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.control.listener import lock_path
from zswapd.errors import HandoverError
from zswapd.handover.resources import NAMES
from zswapd.handover.state import MAGIC, SharedState, Word
from zswapd.host.hints import for_capability
from zswapd.supervisor.orphan import retire
from zswapd.supervisor.reaper import born_ticks, exit_status_if_dead
from zswapd.system.scheduling import SPARE_NAME, WORKER_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

ABORT_S = 0.5
"""Time, s, in which a worker that loops can write its stack into the log."""
_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


def end(worker: int) -> None:
    """End a worker that does not answer, and wait for its death.

    Its successor does again what the worker was doing.
    """
    log.error("worker %d has lost its supervisor and does not answer: ending it", worker)
    retire(worker, ask=signal.SIGABRT, limit=ABORT_S)


def worker_in(descriptor: int) -> int:
    """Return the process id of the worker that a shared state names; 0 if it is dead.

    Raises:
        HandoverError: the shared state names no worker, because it is of an older version.
    """
    state = SharedState(os.dup(descriptor))
    try:
        if not state.words[Word.WORKER]:
            raise HandoverError(
                "the worker does not answer, and its process id is not known",
                hint=f"`ps -C {WORKER_NAME}` shows its process id: `kill -KILL PID` ends it",
            )
        if not state.check_words(Word.WORKER_CHECK):
            raise HandoverError(
                "the worker does not answer, and the record of its process id is damaged",
                hint=f"`ps -C {WORKER_NAME}` shows its process id: `kill -KILL PID` ends it",
            )
        return living_worker(state)
    finally:
        state.close()


def living_worker(state: SharedState) -> int:
    """Return the process id of the worker that a shared state names; 0 if it is dead or not named.

    The start time tells the worker from a later process with the same id.
    """
    pid = state.words[Word.WORKER]
    return pid if pid and born_ticks(pid) == state.words[Word.WORKER_BORN] else 0


def take_descriptors(socket: Path) -> tuple[dict[str, int], int]:
    """Copy the open files of the worker that has a control socket.

    Returns:
        The files by name, and the process id of the worker.

    Raises:
        HandoverError: no worker or more than one has the socket, or this process may not look into
            the worker.
    """
    lock = lock_path(socket)
    holders = {pid: _name(pid) for pid in _holders(os.path.realpath(lock.parent) + "/" + lock.name)}
    workers = [
        pid
        for pid, name in holders.items()
        if name == WORKER_NAME and exit_status_if_dead(pid) is None
    ]
    if len(workers) != 1 or set(holders.values()) - {WORKER_NAME, SPARE_NAME}:
        raise HandoverError(
            f"no daemon answers at {socket}, and its worker cannot be told from the processes that"
            f" have the lock: {holders or 'none can be seen'}",
            hint=for_capability("CAP_SYS_PTRACE"),
        )
    process = os.pidfd_open(workers[0])
    try:
        return copy_descriptors(workers[0], process), workers[0]
    finally:
        os.close(process)


def copy_descriptors(worker: int, process: int) -> dict[str, int]:
    """Return copies of a worker's open files by name.

    Args:
        worker: process id of the worker.
        process: a pidfd of the worker.

    Raises:
        HandoverError: the worker does not name its files, or they cannot be copied.
    """
    with contextlib.ExitStack() as undo:
        number, state = next(_states(worker, process), (-1, -1))
        if state < 0:
            raise HandoverError(f"worker {worker} has no shared state that this program knows")
        undo.callback(os.close, state)
        mapped = SharedState(os.dup(state))
        numbers = {
            name: mapped.words[Word.FILE_FUSE + place] - 1 for place, name in enumerate(NAMES)
        }
        is_sound = mapped.check_words(Word.FILES_CHECK)
        mapped.close()
        if numbers["state"] != number or not is_sound:
            raise HandoverError(
                f"worker {worker} does not name its files", hint="the worker is of an older version"
            )
        files = {"state": state}
        for name, theirs in numbers.items():
            if name not in files and theirs >= 0:
                files[name] = _copy(process, theirs)
                undo.callback(os.close, files[name])
        undo.pop_all()
    return files


def _states(worker: int, process: int) -> Iterator[tuple[int, int]]:
    """Yield each file that may be the shared state: its number in the worker, and a copy of it."""
    for number, target in _files(worker):
        # The shared state has no name. A read of a file on a disk or network could take for ever.
        if not target.endswith(" (deleted)") and not target.startswith("/memfd:"):
            continue
        copy = _copy(process, number)
        with contextlib.suppress(OSError):
            if os.pread(copy, len(MAGIC), 0) == MAGIC:
                yield number, copy
                continue
        os.close(copy)


def _copy(process: int, number: int) -> int:
    """Return a copy of another process's descriptor. Children do not inherit the copy."""
    copy: int = _libc.syscall(_PIDFD_GETFD, process, number, 0)
    if copy < 0:
        reason = os.strerror(ctypes.get_errno())
        raise HandoverError(
            f"the files of a worker that does not answer cannot be copied: {reason}",
            hint=for_capability("CAP_SYS_PTRACE"),
        )
    return copy


def _holders(path: str) -> list[int]:
    """Return the other processes that have a file open."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [
        pid
        for pid in pids
        if pid != os.getpid() and any(target == path for _, target in _files(pid))
    ]


def _files(pid: int) -> Iterator[tuple[int, str]]:
    """Yield number and target of each open file of a process; none if /proc hides them.

    The files themselves are not touched.
    """
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield int(link.name), str(link.readlink())


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    return ""
