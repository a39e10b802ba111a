# SPDX-License-Identifier: GPL-2.0-or-later
"""zswapctl's side of the control socket: a request, its progress, its result.

It does not use trio, whose import would delay the start of zswapctl.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from typing import TYPE_CHECKING

from zswapd.control.protocol import MAX_REPLY, Progress, decode_reply, encode_request
from zswapd.errors import ControlError, PermissionsError
from zswapd.host import installation
from zswapd.host.hints import for_failure
from zswapd.host.installation import look_into_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TIMEOUT_S = 30.0
"""Longest wait in seconds for a message of the daemon."""
_QUEUE_S = 0.02


class Client:
    """A connection to the daemon; a context manager.

    Args:
        path: the control socket.
        timeout: longest wait in seconds for a message of the daemon.

    Raises:
        ControlError: no daemon listens at the path.
        PermissionsError: this user may not connect.
    """

    def __init__(self, path: Path, *, timeout: float = TIMEOUT_S) -> None:
        self._path = path
        self._timeout = timeout
        self._received = bytearray()
        self._socket = _connect(path, timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def call(
        self, command: str, *, progress: Callable[[object], None] | None = None, **arguments: object
    ) -> object:
        """Run a command in the daemon and return its result.

        Args:
            command: name of the command.
            progress: called with each report of progress.
            arguments: arguments of the command.

        Raises:
            ZswapdError: the command failed; the class is the one that the daemon raised.
            ControlError: the daemon does not answer, or its answer is invalid.
        """
        try:
            self._socket.settimeout(self._timeout)
            # EPIPE: the daemon has refused this client, and its reason can be read.
            with contextlib.suppress(BrokenPipeError):
                self._socket.sendall(encode_request(command, arguments))
        except OSError as error:
            raise self._silent(error) from error
        while isinstance(reply := decode_reply(self._read_line()), Progress):
            if progress:
                progress(reply.value)  # outside of the try: its OSErrors are not the connection's
        return reply.value

    def _read_line(self) -> bytes:
        deadline = time.monotonic() + self._timeout
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_REPLY:
                raise ControlError(
                    "the daemon's reply has no end",
                    hint=f"is it zswapd that listens at {self._path}?",
                )
            data = self._receive(deadline)
            if not data:
                raise ControlError("the daemon closed the connection", hint=look_into_log())
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _receive(self, deadline: float) -> bytes:
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            return self._socket.recv(1 << 16)
        except OSError as error:
            raise self._silent(error) from error

    def _silent(self, error: OSError) -> ControlError:
        if isinstance(error, TimeoutError):
            return ControlError(
                f"zswapd does not answer within {self._timeout:g} s",
                hint=f"it hangs or is very busy: {look_into_log()}",
            )
        return ControlError(
            f"the connection to zswapd broke: {error.strerror}", hint=look_into_log()
        )


def _connect(path: Path, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                connection.connect(str(path))
                break
            except BlockingIOError:  # the queue is full, and connect(2) does not wait for it
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_QUEUE_S)
    except OSError as error:
        connection.close()
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = for_failure(error, path, "name the daemon's socket with --socket")
            raise PermissionsError(f"permission denied at {path}", hint=hint) from error
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.ENOTDIR):
            raise ControlError(
                f"zswapd does not run: there is no listener at {path}",
                hint=(
                    f"start it with {installation.found().start()}, or name its socket with"
                    " --socket"
                ),
            ) from error
        raise ControlError(
            f"cannot connect to {path}: {error}", hint="name the daemon's socket with --socket"
        ) from error
    return connection
