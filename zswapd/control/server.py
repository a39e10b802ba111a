# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's side of the control socket.

One task for each client, in the same thread as everything else.

Who may talk: root, or the daemon's own user; listener.py has the socket itself.

Who can hurt whom: a client that sends garbage, or no end, or nothing, or does not read its answer,
loses its own connection after a while, or as soon as others need its place; these and the pages
never notice. A handler's ZswapdError goes to its client, any other exception to the log and as
"internal error" to its client; neither ends the daemon.
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
    """A plain or async function that takes the command's arguments by name and returns what JSON can say. If it has a parameter `report`, it gets an async function there that sends a piece of progress.
    """

IDLE_S = 60.0
"""Seconds after which a client that sends nothing is shown out."""
SEND_S = 10.0
"""Seconds that a client may take to read a message."""
MAX_CLIENTS = 32
"""Clients at a time.

One more takes the place of the one silent for longest; if all wait for answers, it is turned away.
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WithDescriptors:
    """A handler's result that is sent together with open files (SCM_RIGHTS)."""

    value: object
    descriptors: tuple[int, ...]


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


counters.declare(ControlStatistics, cumulative="requests refused turned_away internal_errors")


class Server:
    """The control socket; a context manager around `serve`.

    Args:
        socket_: an open `Listener`, which stays when the server ends, or the path of one to be made
            and undone with the server.
        handlers: by command name.
        commands: the commands' arguments; every handler needs its row.
        idle: seconds after which a silent client is shown out.
        send: seconds that a client may take to read a message.
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
        self._silent: dict[trio.CancelScope, None] = {}  # the longest first
        self._clients = self._requests = self._refused = self._turned_away = (
            self._internal_errors
        ) = 0

    def __enter__(self) -> Server:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Listen, if that is left to do; clients wait until `serve` runs.

        Raises what `Listener.open` does.
        """
        if self._is_own_listener:
            self._listener.open()

    def close(self) -> None:
        """Stop listening, if `open` began it."""
        if self._is_own_listener:
            self._listener.close()

    def statistics(self) -> ControlStatistics:
        """Return the counts."""
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
        """Serve clients until cancelled; `open` comes before."""
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
        """End the client that has said nothing for longest.

        Return False if every one waits for an answer.
        """
        scope = next(iter(self._silent), None)
        if scope is None:
            return False
        del self._silent[scope]
        scope.cancel()
        return True

    async def _next_line(self, stream: trio.SocketStream, received: bytearray) -> bytes | None:
        """Return the next request's line, or None when the client has left, is silent for too long.

        Or sends no end.
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
            raise  # the client went away during progress
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
