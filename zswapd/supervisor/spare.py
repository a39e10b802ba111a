# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker in waiting: forked ahead of its time.

With all the memory in hand that taking over needs.

A worker may die when the box has no memory left, because everything that could be freed waits to be
swapped out, through the worker that died. Whoever is forked then has to find some tens of MiB:
copies of pages shared with the supervisor, heaps that are grown. So they are found beforehand,
while a worker serves and reclaim works: the spare takes its memory like any ordinary program, then
locks it and waits. To be promoted takes one byte on a socket, and no memory.

There may be no spare: shortly after a takeover, or because it cannot get its memory. Then a worker
is forked on the spot, as a real-time task (system/scheduling.py).

Limit: it costs its memory all the time, some 40 MiB (`service.spare = false` saves it).
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
    """One such process. It ends with its parent.

    Args:
        prepare: called in the new process at once.
        become: called there with what that returned, on promotion; must not return.

    Attributes:
        pid: its number.

    Raises:
        OSError: it cannot be forked.
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
        """Whether it has all it needs."""
        if not self._is_ready:
            with contextlib.suppress(OSError):  # BlockingIOError: it is still being prepared
                self._is_ready = self._line.recv(1, socket.MSG_DONTWAIT) == _READY
        return self._is_ready

    def promote(self) -> bool:
        """Have it become what it waits for; return False if it cannot, being dead or not ready."""
        if not self.is_ready:
            return False
        try:
            os.kill(self.pid, signal.SIGCONT)  # it may have been stopped
            self._line.send(_GO, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        self._line.close()
        return True

    def has_ended(self) -> bool:
        """Say whether it has ended by itself; it is forgotten then."""
        if not os.waitpid(self.pid, os.WNOHANG)[0]:
            return False
        self._line.close()
        return True

    def end(self, *, wait: bool) -> bool:
        """Kill it; return whether it is gone.

        Args:
            wait: until it is. One that waits for memory goes only when it has got it: not to be
                waited for where that may depend on the caller, who has to bury it later.
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
    """Live the life of a spare."""
    code = 1
    try:
        prepared = prepare()
        go = b""
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # the parent is dead; or died before it read our word
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
