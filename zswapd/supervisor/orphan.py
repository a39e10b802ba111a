# SPDX-License-Identifier: GPL-2.0-or-later
"""A worker whose supervisor is dead goes on serving.

Here a new supervisor gets its files and asks it to make room.

The descriptors come over the control socket (SCM_RIGHTS), as the answer to `inherit`, which a
worker that still has its supervisor refuses: that is how a second `zswapd run` learns that the
first one lives. Only when everything was received and found to fit is the worker told to leave, and
if it does not, killed: what it was doing is done again by its successor.

One that does not answer is another matter (unresponsive.py).
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
"""How long a worker may take to answer, and to leave."""
LOOK_S = 0.1
"""Time between two looks at whether one that is to leave is dead.

Which its pidfd does not tell while a thread is stuck; and between two attempts at a full queue.
"""
LEAVE = signal.SIGUSR2
"""Tells a worker to end at the next request boundary, for a successor."""


def inherit(path: Path, *, limit: float = ANSWER_S) -> tuple[dict[str, int], int]:
    """Ask the worker behind a control socket for its files.

    Return them by name, and its process id.

    Args:
        path: the socket.
        limit: patience with the answer, s.

    Raises:
        TimeoutError: there is no answer.
        ControlError: nobody has the socket, or the worker has a supervisor.
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
            return dict(
                zip(NAMES, descriptors, strict=False)
            ), reply.value  # the last of them may be missing
    raise ControlError("the daemon's answer makes no sense", hint="use the same version")


def _connect(connection: socket.socket, path: Path, end: float) -> None:
    """Connect, and wait for a place in the queue if that is full.

    Which the kernel does not do here.
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
    """Have a worker end and wait until it has; kill it when it does not. It need not be a child.

    Args:
        worker: its process id.
        ask: the signal that it gets first.
        limit: how long it may take then, s.
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
    """Wait until a process has ended, or is as good as dead; for ever without `patience`."""
    end = math.inf if patience is None else time.monotonic() + patience
    poll = select.poll()  # select(2) takes no descriptor above 1023
    poll.register(process, select.POLLIN)
    while time.monotonic() < end:
        if poll.poll(LOOK_S * 1000) or exit_status_if_dead(worker) is not None:
            return True
    return False
