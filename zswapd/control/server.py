# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of the control socket: one task for each client, in the same thread as everything else.

Who may talk: the socket has mode 0600, directories made for it 0700, and every peer's uid is checked (root or
the daemon's own). Who may be a second daemon: nobody. A lock beside the socket is held as long as the daemon
lives and vanishes with it in whatever way it dies, so whoever holds the lock may replace a socket that a dead
daemon left. (Connecting to see whether somebody answers would leave a gap in which two daemons replace each
other's socket.)

Who can hurt whom: a client that sends garbage, or no end, or nothing, or does not read its answer, loses its
own connection after a while, and the other clients and the pages never notice. A handler's ZswapdError goes
to its client, any other exception to the log and as "internal error" to its client; neither ends the daemon.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import inspect
import logging
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from zswapd import carry
from zswapd.control.protocol import (
    COMMANDS,
    INTERNAL_ERROR,
    MAX_REQUEST,
    Argument,
    decode_request,
    encode_error,
    encode_progress,
    encode_result,
)
from zswapd.errors import ControlError, PermissionsError, ZswapdError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Handler = Callable[..., Any]
    """A plain or async function that takes the command's arguments by name and returns what JSON can say. If it has a
    parameter `report`, it gets an async function there that sends a piece of progress."""

IDLE_S = 60.0
"""Seconds after which a client that sends nothing is shown out."""
SEND_S = 10.0
"""Seconds that a client may take to read a message."""
MAX_CLIENTS = 32
"""Clients at a time; more are turned away."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControlStatistics:
    """Counts since the server was made."""

    clients: int
    """Connected now."""
    requests: int
    """Valid ones, answered or being answered."""
    refused: int
    """Requests that were not valid."""
    turned_away: int
    """Clients without the right to be there, or too many."""
    internal_errors: int
    """Handlers that raised something else than a ZswapdError."""


carry.declare(
    ControlStatistics,
    cumulative="requests refused turned_away internal_errors",
)


class Server:
    """The control socket; a context manager around `serve`.

    Args:
        path: where the socket appears.
        handlers: by command name.
        commands: the commands' arguments; every handler needs its row.
        idle: seconds after which a silent client is shown out.
        send: seconds that a client may take to read a message.
    """

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        *,
        commands: Mapping[str, tuple[Argument, ...]] = COMMANDS,
        idle: float = IDLE_S,
        send: float = SEND_S,
    ) -> None:
        self._path = path
        self._handlers = dict(handlers)
        self._commands = {name: commands[name] for name in handlers}
        self._reports = {name for name, handler in handlers.items() if "report" in inspect.signature(handler).parameters}
        self._idle, self._send_limit = idle, send
        self._lock: int | None = None
        self._listener: socket.socket | None = None
        self._clients = self._requests = self._refused = self._turned_away = self._internal_errors = 0

    def __enter__(self) -> Server:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Take the lock and listen; clients wait until `serve` runs.

        Raises:
            ControlError: another daemon has this socket, or something else stands at its path.
            PermissionsError: the directory or the socket cannot be made.
        """
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _take_lock(self._lock_path)
            _clear_path(self._path)
            self._listener = _listen(self._path)
        except OSError as error:
            self.close()
            raise PermissionsError(
                f"cannot make the control socket {self._path}: {error.strerror}",
                hint="run zswapd as root, or choose another place with --set control.socket=PATH",
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening and leave neither socket nor lock behind."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def statistics(self) -> ControlStatistics:
        """Return the counts."""
        return ControlStatistics(
            clients=self._clients,
            requests=self._requests,
            refused=self._refused,
            turned_away=self._turned_away,
            internal_errors=self._internal_errors,
        )

    async def serve(self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients until cancelled; `open` comes before."""
        assert self._listener is not None, "open() comes before serve()"
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener.dup()))
        await trio.serve_listeners(self._serve_client, [listener], task_status=task_status)

    @property
    def _lock_path(self) -> Path:
        return self._path.with_name(self._path.name + ".lock")

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        self._clients += 1
        try:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                await self._converse(stream)
        finally:
            self._clients -= 1

    async def _converse(self, stream: trio.SocketStream) -> None:
        complaint = self._reason_to_turn_away(stream)
        if complaint:
            self._turned_away += 1
            await self._send(stream, encode_error(*complaint))
            return
        received = bytearray()
        while (line := await self._next_line(stream, received)) is not None:
            await self._send(stream, await self._answer(stream, line))

    def _reason_to_turn_away(self, stream: trio.SocketStream) -> tuple[str, str, int] | None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (0, os.geteuid()):
            log.warning("user %d was turned away from the control socket", uid, extra={"rate_limit": 10})
            return "permission denied", "run zswapctl as root", PermissionsError.exit_code
        if self._clients > MAX_CLIENTS:
            return "too many clients at once", "try again later", ControlError.exit_code
        return None

    async def _next_line(self, stream: trio.SocketStream, received: bytearray) -> bytes | None:
        """Return the next request's line, or None when the client has left, is silent for too long, or sends no end."""
        with trio.move_on_after(self._idle):
            while (end := received.find(b"\n")) < 0:
                if len(received) >= MAX_REQUEST:
                    self._refused += 1
                    message = f"the request is longer than {MAX_REQUEST} bytes"
                    await self._send(stream, encode_error(message, "send less", ControlError.exit_code))
                    return None
                data = await stream.receive_some(MAX_REQUEST - len(received))
                if not data:
                    return None
                received += data
            line = bytes(received[:end])
            del received[: end + 1]
            return line
        return None

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> bytes:
        try:
            request = decode_request(line, self._commands)
        except ControlError as error:
            self._refused += 1
            return encode_error(error.message, error.hint, error.exit_code)
        self._requests += 1
        arguments = dict(request.arguments)
        if request.command in self._reports:
            arguments["report"] = lambda value: self._send(stream, encode_progress(value))
        try:
            result = self._handlers[request.command](**arguments)
            if inspect.isawaitable(result):
                result = await result
            return encode_result(result)
        except ZswapdError as error:
            return encode_error(error.message, error.hint, error.exit_code)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            raise  # the client went away during progress
        except Exception:
            self._internal_errors += 1
            log.exception("control command %s failed", request.command, extra={"rate_limit": 10})
            return encode_error(f"internal error in {request.command}", "the daemon's log has the details", INTERNAL_ERROR)

    async def _send(self, stream: trio.SocketStream, data: bytes) -> None:
        with trio.fail_after(self._send_limit):
            await stream.send_all(data)


def _take_lock(path: Path) -> int:
    """Return a descriptor that holds the lock file's lock; the lock goes when it is closed, or the process dies."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ControlError(
                f"another zswapd runs with the control socket {path.with_suffix('')}",
                hint="stop it, or give this one its own with --set control.socket=PATH",
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.lstat()):
                return lock
        os.close(lock)  # its last holder removed the file between our open and our lock: take the new one


def _clear_path(path: Path) -> None:
    """Remove a socket that a dead daemon left; refuse anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"{path} exists and is no socket", hint="remove it, or set control.socket to another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise ControlError(f"something else listens at {path}", hint="stop it, or set control.socket to another path")
    path.unlink()


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(MAX_CLIENTS)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(old)
    return listener
