# SPDX-License-Identifier: GPL-2.0-or-later
"""Take over from an orphan: a worker that goes on serving after its supervisor's death.

A new supervisor asks the worker for its open files, and then tells it to leave.

The descriptors come over the control socket (SCM_RIGHTS), as the answer to `inherit`. A worker
with a living supervisor refuses the command. So a second `zswapd run` learns that the first one
lives. The worker is told to leave only when all files were received and found to fit. If it does
not leave, it is killed, and its successor does again what it was doing.

A worker that does not answer is the subject of unresponsive.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import struct
import time
from typing import TYPE_CHECKING

from zswapd.control.protocol import Result, decode_reply, encode_request
from zswapd.errors import ControlError
from zswapd.handover.resources import NAMES
from zswapd.host.installation import look_into_log
from zswapd.supervisor.reaper import exit_status_if_dead

if TYPE_CHECKING:
    from pathlib import Path

ANSWER_S = 10.0
"""Time, s, that a worker has to answer, and to leave."""
LOOK_S = 0.1
"""Time, s, between two looks at a worker that was told to leave.

Its pidfd does not tell of its death while one of its threads is stuck. It is also the time between
two attempts to connect to a socket with a full queue.
"""
LEAVE = signal.SIGUSR2
"""Tells a worker to end at the next request boundary, for a successor."""


def inherit(path: Path, *, limit: float = ANSWER_S) -> tuple[dict[str, int], int]:
    """Ask the worker behind a control socket for its files.

    Args:
        path: the socket.
        limit: time to wait for the answer, s.

    Returns:
        The files by name, and the process id of the worker.

    Raises:
        TimeoutError: the worker does not answer.
        ControlError: no process has the socket, or the worker has a supervisor.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            _connect(connection, path, time.monotonic() + limit)
            connection.sendall(encode_request("inherit", {}))
            data, descriptors = _receive(connection)
        except (TimeoutError, BlockingIOError):
            raise TimeoutError(f"the daemon behind {path} does not answer") from None
        except OSError as error:
            raise ControlError(
                f"the daemon behind {path} does not answer: {error}", hint=look_into_log()
            ) from error
    with contextlib.ExitStack() as undo:
        for descriptor in descriptors:
            undo.callback(os.close, descriptor)
        reply = decode_reply(data)
        if (
            isinstance(reply, Result)
            and isinstance(reply.value, int)
            and len(descriptors) >= len(NAMES) - 1
        ):
            undo.pop_all()
            # The last name has no file without a backing.
            return dict(zip(NAMES, descriptors, strict=False)), reply.value
    raise ControlError("the daemon's answer is not valid", hint="use the same version")


def _connect(connection: socket.socket, path: Path, end: float) -> None:
    """Connect; if the queue of the socket is full, try again until `end`.

    On a socket with a timeout, connect(2) does not wait for a place in the queue.
    """
    while True:
        try:
            connection.connect(str(path))
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(LOOK_S)
        else:
            return


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors = b"", list[int]()
    size = struct.calcsize("i")
    while not data.endswith(b"\n"):
        part, ancillary, _flags, _address = connection.recvmsg(
            1 << 16, socket.CMSG_SPACE(len(NAMES) * size)
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                count = len(content) // size
                descriptors += struct.unpack(f"{count}i", content[: count * size])
        if not part:
            raise ControlError("the daemon closed the connection", hint=look_into_log())
        data += part
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call
    return data, descriptors


def retire(worker: int, *, ask: signal.Signals = LEAVE, limit: float = ANSWER_S) -> None:
    """Tell a worker to end, and wait for its end; kill it after a time limit.

    The worker need not be a child of this process.

    Args:
        worker: process id of the worker.
        ask: the signal that the worker gets first.
        limit: time that the worker then has to end, s.
    """
    try:
        process = os.pidfd_open(worker)
    except ProcessLookupError:
        return
    try:
        for number, patience in ((ask, limit), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            if _has_ended(worker, process, patience):
                break
    finally:
        os.close(process)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(worker, 0 if exit_status_if_dead(worker) is None else os.WNOHANG)


def _has_ended(worker: int, process: int, patience: float | None) -> bool:
    """Wait until only harmless threads of a process are left; return whether this came in time.

    Without `patience`, there is no time limit.
    """
    end = math.inf if patience is None else time.monotonic() + patience
    poll = select.poll()  # select(2) takes no descriptor above 1023
    poll.register(process, select.POLLIN)
    while time.monotonic() < end:
        if poll.poll(LOOK_S * 1000) or exit_status_if_dead(worker) is not None:
            return True
    return False
