# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of the control socket: one task for each client, in the worker's main thread.

Only root and the daemon's own user may connect. listener.py has the socket.

A client may send invalid or endless requests, or nothing, or may not read its answer. It then loses
its own connection, after a time limit or when another client needs its place. Other clients and the
page path are not affected. A handler's ZswapdError goes to its client. Any other exception goes to
the log, and the client gets "internal error". Neither ends the daemon.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from zswapd import counters
from zswapd.control.listener import Listener
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
    from collections.abc import Callable, Iterator, Mapping

    Handler = Callable[..., Any]
    """A plain or async function that takes the command's arguments by name and returns JSON values.

    If it has a parameter `report`, it gets an async function that sends a report of progress.
    """

IDLE_S = 60.0
"""Time in seconds after which a client that sends nothing is disconnected."""
SEND_S = 10.0
"""Longest time in seconds that a client may take to read a message."""
MAX_CLIENTS = 32
"""Limit of clients.

A further client replaces the client that is silent for the longest time. If all clients wait for
answers, it is refused.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WithDescriptors:
    """A handler's result that is sent together with open files (SCM_RIGHTS)."""

    value: object
    descriptors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ControlStatistics:
    """The counters since the server was made."""

    clients: int
    """Clients that are connected now."""
    requests: int
    """Valid requests, answered or in flight."""
    refused: int
    """Invalid requests."""
    turned_away: int
    """Clients that were refused, because of their user or their number."""
    internal_errors: int
    """Exceptions of handlers other than ZswapdError."""


counters.declare(ControlStatistics, cumulative="requests refused turned_away internal_errors")


class Server:
    """The control socket; a context manager around `serve`.

    Args:
        socket_: an open `Listener`, which stays open, or a path. The server opens and closes the
            listener of a path.
        handlers: the handlers by name of the command.
        commands: the arguments of the commands; each handler needs an entry.
        idle: time in seconds after which a silent client is disconnected.
        send: longest time in seconds that a client may take to read a message.
    """

    def __init__(
        self,
        socket_: Listener | Path,
        handlers: Mapping[str, Handler],
        *,
        commands: Mapping[str, tuple[Argument, ...]] = COMMANDS,
        idle: float = IDLE_S,
        send: float = SEND_S,
    ) -> None:
        self._listener = Listener(socket_) if isinstance(socket_, Path) else socket_
        self._is_own_listener = isinstance(socket_, Path)
        self._handlers = dict(handlers)
        self._commands = {name: commands[name] for name in handlers}
        self._reports = {
            name
            for name, handler in handlers.items()
            if "report" in inspect.signature(handler).parameters
        }
        self._idle, self._send_limit = idle, send
        self._silent: dict[trio.CancelScope, None] = {}  # the longest silence first
        self._clients = self._requests = self._refused = self._turned_away = (
            self._internal_errors
        ) = 0

    def __enter__(self) -> Server:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Open the server's own listener. Clients wait until `serve` runs.

        Raises:
            AlreadyRunningError, ControlError, PermissionsError: see `Listener.open`.
        """
        if self._is_own_listener:
            self._listener.open()

    def close(self) -> None:
        """Close the server's own listener."""
        if self._is_own_listener:
            self._listener.close()

    def statistics(self) -> ControlStatistics:
        """Return the counters."""
        return ControlStatistics(
            clients=self._clients,
            requests=self._requests,
            refused=self._refused,
            turned_away=self._turned_away,
            internal_errors=self._internal_errors,
        )

    async def serve(
        self, *, task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve clients until cancelled. `open` must come first."""
        assert self._listener.socket is not None, "open() comes before serve()"
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener.socket.dup()))
        await trio.serve_listeners(self._serve_client, [listener], task_status=task_status)

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        self._clients += 1
        try:
            with contextlib.suppress(
                trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError
            ):
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
            await self._reply(stream, await self._answer(stream, line))

    def _reason_to_turn_away(self, stream: trio.SocketStream) -> tuple[str, str, int] | None:
        credentials = stream.socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        _, uid, _ = struct.unpack("3i", credentials)
        if uid not in (0, os.geteuid()):
            log.warning(
                "user %d was turned away from the control socket", uid, extra={"rate_limit": 10}
            )
            return "permission denied", "run zswapctl as root", PermissionsError.exit_code
        if self._clients > MAX_CLIENTS and not self._show_one_out():
            return "too many clients at once", "try again later", ControlError.exit_code
        return None

    def _show_one_out(self) -> bool:
        """Disconnect the client with the longest silence.

        Return False if all clients wait for answers.
        """
        scope = next(iter(self._silent), None)
        if scope is None:
            return False
        del self._silent[scope]
        scope.cancel()
        return True

    async def _next_line(self, stream: trio.SocketStream, received: bytearray) -> bytes | None:
        """Return the line of the next request, or None to end the connection.

        The reasons for None are: the client has left, is silent for too long, or sends a request
        that is too long.
        """
        with trio.move_on_after(self._idle) as scope, self._counted_as_silent(scope):
            while (end := received.find(b"\n")) < 0:
                if len(received) >= MAX_REQUEST:
                    self._refused += 1
                    message = f"the request is longer than {MAX_REQUEST} bytes"
                    await self._send(
                        stream, encode_error(message, "send less", ControlError.exit_code)
                    )
                    return None
                data = await stream.receive_some(MAX_REQUEST - len(received))
                if not data:
                    return None
                received += data
            line = bytes(received[:end])
            del received[: end + 1]
            return line
        return None

    @contextlib.contextmanager
    def _counted_as_silent(self, scope: trio.CancelScope) -> Iterator[None]:
        self._silent[scope] = None
        try:
            yield
        finally:
            self._silent.pop(scope, None)

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> bytes | WithDescriptors:
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
            if isinstance(result, WithDescriptors):
                return WithDescriptors(encode_result(result.value), result.descriptors)
            return encode_result(result)
        except ZswapdError as error:
            return encode_error(error.message, error.hint, error.exit_code)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            raise  # the client has left during the progress
        except Exception:
            self._internal_errors += 1
            log.exception("control command %s failed", request.command, extra={"rate_limit": 10})
            return encode_error(
                f"internal error in {request.command}",
                "the daemon's log has the details",
                INTERNAL_ERROR,
            )

    async def _reply(self, stream: trio.SocketStream, reply: bytes | WithDescriptors) -> None:
        if isinstance(reply, bytes):
            await self._send(stream, reply)
            return
        assert isinstance(reply.value, bytes)
        rights = (
            socket.SOL_SOCKET,
            socket.SCM_RIGHTS,
            struct.pack(f"{len(reply.descriptors)}i", *reply.descriptors),
        )
        with trio.fail_after(self._send_limit):
            sent = await stream.socket.sendmsg([reply.value], [rights])
        await self._send(stream, reply.value[sent:])

    async def _send(self, stream: trio.SocketStream, data: bytes) -> None:
        with trio.fail_after(self._send_limit):
            await stream.send_all(data)
