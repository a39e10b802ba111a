# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker whose supervisor is dead and that does not answer either, being stopped or in a loop.

It is ended.

Nobody else would, and whoever needs a page waits. That its supervisor is dead is certain before
anything happens to it: the lock that only a living supervisor holds is free (control/listener.py).
A worker that is slow under a living supervisor is that one's business.

What it serves comes from one of two places:

- the service manager's store. Then the shared state says which process it is, and since when;
- the worker itself, for want of any other: whoever has its lock file open is found in /proc, and
  its files are copied out of it (pidfd_getfd(2), Linux 5.6) before it is ended. The shared state is
  told by how it begins, and knows the others' numbers.

Limits: the second takes CAP_SYS_PTRACE, which the shipped unit does not have; it has the store. A
worker that waits in the kernel for something that only it could bring cannot be ended by anybody.
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

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

WORKER_NAME, SPARE_NAME = "zswapd-worker", "zswapd-spare"
"""What the kernel calls a worker, and one in waiting."""
ABORT_S = 0.5
"""What it gets to write its stack into the log, if it loops."""
_PIDFD_GETFD = 438

_libc = ctypes.CDLL(None, use_errno=True)


def end(worker: int) -> None:
    """End a worker that does not answer, whatever it is at: its successor does that again.

    Returns when it is dead.
    """
    log.error("worker %d has lost its supervisor and does not answer: ending it", worker)
    retire(worker, ask=signal.SIGABRT, limit=ABORT_S)


def worker_in(descriptor: int) -> int:
    """Return the process id of the worker that a shared state names.

    0 if that process lives no more.

    Raises:
        HandoverError: it names none, being of an older version.
    """
    state = SharedState(os.dup(descriptor))
    try:
        if not state.words[Word.WORKER]:
            raise HandoverError(
                "the worker does not answer, and does not say which process it is",
                hint=f"`ps -C {WORKER_NAME}` shows its process id: `kill -KILL PID` ends it",
            )
        if not state.check_words(Word.WORKER_CHECK):
            raise HandoverError(
                "the worker does not answer, and what says which process it is was damaged",
                hint=f"`ps -C {WORKER_NAME}` shows its process id: `kill -KILL PID` ends it",
            )
        return living_worker(state)
    finally:
        state.close()


def living_worker(state: SharedState) -> int:
    """Return the process id of the worker that a shared state names.

    0 if it names none, or that lives no more.
    """
    pid = state.words[Word.WORKER]
    return pid if pid and born_ticks(pid) == state.words[Word.WORKER_BORN] else 0


def take_descriptors(socket: Path) -> tuple[dict[str, int], int]:
    """Copy the open files of the worker that has a control socket.

    Return them by name, and its process id.

    Raises:
        HandoverError: there is no such worker, more than one, or it cannot be looked into.
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
            f"nobody answers at {socket}, and which worker that should be is not clear:"
            f" {holders or 'none can be seen'}",
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
        worker: its process id.
        process: a pidfd of it.

    Raises:
        HandoverError: it does not say which they are, or they cannot be had.
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
                f"worker {worker} does not say which its files are",
                hint="it is of an older version",
            )
        files = {"state": state}
        for name, theirs in numbers.items():
            if name not in files and theirs >= 0:
                files[name] = _copy(process, theirs)
                undo.callback(os.close, files[name])
        undo.pop_all()
    return files


def _states(worker: int, process: int) -> Iterator[tuple[int, int]]:
    """Yield what may be the worker's shared state: its number there, and a copy of the descriptor."""
    for number, target in _files(worker):
        # Nameless, all of them: to ask a file on some disk or network may take for ever.
        if not target.endswith(" (deleted)") and not target.startswith("/memfd:"):
            continue
        copy = _copy(process, number)
        with contextlib.suppress(OSError):
            if os.pread(copy, len(MAGIC), 0) == MAGIC:
                yield number, copy
                continue
        os.close(copy)


def _copy(process: int, number: int) -> int:
    """Return a copy of another process' descriptor, which no child inherits."""
    copy: int = _libc.syscall(_PIDFD_GETFD, process, number, 0)
    if copy < 0:
        reason = os.strerror(ctypes.get_errno())
        raise HandoverError(
            f"the files of a worker that does not answer cannot be had: {reason}",
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
    """Yield number and target of each open file of a process, without touching the files.

    None of one that may not be seen.
    """
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield int(link.name), str(link.readlink())


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    return ""
