# SPDX-License-Identifier: GPL-2.0-or-later
"""The spare: the next worker, forked early, with all that a takeover needs but a few pages.

A worker may die when the machine has no free memory. All reclaimable pages then wait to be swapped
out through the dead worker. A worker that is forked at that moment needs tens of MiB and threads.
So the spare takes its heaps, threads and buffers beforehand, while a worker serves and reclaim
works. It takes them like an ordinary program, locks them, and waits. Its promotion takes one byte
on a socket.

The spare shares the 25 MiB of the interpreter and its modules with the supervisor, for as long as
both only wait. On promotion, it copies them at once (`Prepared.owned`), before it touches the
arena. The memory for that comes from the worker that has just died: 40 MiB, which the kernel frees
before it tells the supervisor of the death. The spare is real-time, so it runs first, and may
allocate below the min watermark (system/scheduling.py). With a disk behind the pool or cache
volumes, a thread of the dead worker may wait for a file and keep all its memory. Then the spare
copies the pages in advance.

There may be no spare shortly after a takeover, or because memory is short. Then the supervisor
forks a worker at once, as a real-time task.

Limit: the spare always costs its memory, about 15 MiB, or 40 MiB with a disk or volumes
(`service.spare = false` saves it).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

log = logging.getLogger(__name__)

_READY, _GO = b"r", b"g"


class Spare:
    """One spare process. It ends with its parent.

    Args:
        prepare: called in the new process at once.
        become: called in the new process on promotion, with the result of `prepare`. It must not
            return.

    Attributes:
        pid: process id of the spare.

    Raises:
        OSError: the process cannot be forked.
    """

    def __init__(self, prepare: Callable[[], T], become: Callable[[T], NoReturn]) -> None:
        ours, theirs = socket.socketpair()
        try:
            self.pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if not self.pid:
            ours.close()
            _wait(theirs, prepare, become)
        theirs.close()
        self._line = ours
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        """Whether the spare is prepared."""
        if not self._is_ready:
            with contextlib.suppress(OSError):  # BlockingIOError: the spare is not yet prepared
                self._is_ready = self._line.recv(1, socket.MSG_DONTWAIT) == _READY
        return self._is_ready

    def promote(self) -> bool:
        """Turn the spare into a worker; return False if it is dead or not ready."""
        if not self.is_ready:
            return False
        try:
            os.kill(self.pid, signal.SIGCONT)  # SIGSTOP may have stopped the spare
            self._line.send(_GO, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        self._line.close()
        return True

    def has_ended(self) -> bool:
        """Say whether the spare has ended by itself; reap it then."""
        if not os.waitpid(self.pid, os.WNOHANG)[0]:
            return False
        self._line.close()
        return True

    def end(self, *, wait: bool) -> bool:
        """Kill the spare; return whether it was reaped.

        Args:
            wait: wait until the spare is dead. A spare that waits for memory dies only when it has
                got the memory. Where that may depend on the caller, the caller must not wait, and
                reaps the spare later.
        """
        self._line.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(self.pid, 0 if wait else os.WNOHANG)[0] != 0
        return True


def _wait(
    line: socket.socket, prepare: Callable[[], T], become: Callable[[T], NoReturn]
) -> NoReturn:
    """Prepare, wait for the promotion or for the parent's end, and never return."""
    code = 1
    try:
        prepared = prepare()
        go = b""
        # The parent may be dead, or may have died before it read our byte.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.send(_READY, socket.MSG_NOSIGNAL)
            go = line.recv(1)
        if go == _GO:
            line.close()
            become(prepared)
        code = 0
    except BaseException:
        log.exception("the spare worker %d ends", os.getpid())
    finally:
        os._exit(code)
