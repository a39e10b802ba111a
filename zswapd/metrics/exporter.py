# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP server of the metrics, in a thread of its own.

Why a thread: to accept a connection and to send a page of text takes memory from the kernel. On a
machine that is short of memory, that waits for memory that only the daemon can free. Scrapers
connect at any time, so the thread that serves pages does none of this. The thread starts with the
worker, not on demand, because a clone(2) that waits for memory waits with the GIL held.

Any user of the machine can connect, so the thread must protect the page path from a flood:

- It is an ordinary task with nice value 0, below the page path. It is a real-time task only until
  it listens, because before that it touches all its memory for the first time. It is not an idle
  task: it takes the GIL, and a holder of the GIL without a processor would stop the page path.
- SHARE bounds its processor time (allowance.py), for connections, requests and texts together.
  Other connections wait in the queue of the listening socket. The queue holds QUEUE connections,
  with RECEIVE_BYTES each. The kernel drops further connections, and the client's kernel tries
  again. A scraper therefore gets in beside a flood that is not much faster than the thread accepts.
- The first check is the user of the client's socket (peers.py). A user that may not read gets
  a 403 at once and occupies no place. The kernel reports a connection only when its request has
  arrived (TCP_DEFER_ACCEPT), so the thread need not wait for the request.
- Users that may read share CLIENTS connections, with CLIENT_S for each, HEAD_BYTES for a request,
  and one request a connection. A further connection replaces the oldest one. If a client does not
  read its answer, its connection is reset, so that the kernel does not keep the answer. The kernel
  thus holds the answers of CLIENTS connections, or those of CLIENT_S if clients close first.

The page path notices two things. The first is the snapshot: its own loop takes it, so that all
values belong to one moment. That takes a third of a millisecond, independent of the size of the
pool, including the copy for a successor. The second is the GIL, which the thread holds while it
makes text. It makes text in pieces of PIECE_S and pauses after each. It serves a text for TEXT_S.

Limits:

- It serves GET and HEAD of /metrics.
- It has no encryption and no password. It listens on the loopback interface by default, and denies
  users of this machine that are not named.
- The socket belongs to the worker. The next worker listens again, and a scrape in between fails.
- If the address is in use, the thread logs that once and tries again every RETRY_S.
- A flood of many thousand connections a second keeps scrapers out while it lasts. The page path
  does not notice it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from prometheus_client.exposition import generate_latest

from zswapd import system
from zswapd.metrics.allowance import Allowance
from zswapd.metrics.families import collect
from zswapd.metrics.peers import EVERYBODY, Doorkeeper, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.core import Metric

    from zswapd.metrics.snapshot import Snapshot

log = logging.getLogger(__name__)

SHARE = 0.01
"""Share of a processor that the thread may use. With 1 %, 99 of 100 page-ins find the GIL free."""
SAVED_S = 0.05
"""Processor time in seconds that the thread may use at once, enough for about ten texts."""
QUEUE = 32
"""Connections that may wait to be accepted. SHARE allows about 100 connections a second."""
RECEIVE_BYTES = 8 << 10
CLIENTS = 8
CLIENT_S = 5.0
HEAD_BYTES = 8 << 10
"""Length of the longest request that is read."""
RETRY_S = 10.0
PIECE_S = 0.0003
"""Time in seconds for which the thread makes text without a pause, enough for ten families."""
TEXT_S = 0.5
"""Age in seconds up to which a text is served again."""
_PAUSE_S = 0.1
"""Pause in seconds after accept(2) fails for lack of memory or descriptors."""

_REQUEST_LINE = re.compile(rb"[A-Z]{1,16} [!-~]+ HTTP/1\.[0-9]\r?\n")
_LINE_BEGIN = re.compile(rb"[A-Z]{0,16}|[A-Z]{1,16} [!-~]*(?: [!-~]*\r?)?")
_HEADERS_END = re.compile(rb"\n\r?\n")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 s
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
}


def _answer(status: int, body: bytes, *, head: bool = False) -> bytes:
    kind = (
        "text/plain; version=0.0.4; charset=utf-8" if status == 200 else "text/plain; charset=utf-8"
    )
    lines = [
        f"HTTP/1.1 {status} {_PHRASES[status]}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (b"" if head else body)


_DENIED = _answer(
    403, b"permission denied; metrics.users lists the users that may read the metrics\n"
)


class _Client:
    """A connection of a user that may read: read the request, send the answer, wait for the end."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.until = time.monotonic() + CLIENT_S
        self._received = b""
        self._unsent: memoryview | None = None

    @property
    def events(self) -> int:
        """The events of poll(2) to wait for."""
        return select.POLLOUT if self._unsent else select.POLLIN

    def step(self, make_text: Callable[[], bytes]) -> bool:
        """Make one step without waiting; return whether the connection goes on.

        Args:
            make_text: returns the text of the metrics.

        Raises:
            OSError: the connection is broken.
        """
        if self._unsent is None:
            data = self.socket.recv(HEAD_BYTES, socket.MSG_DONTWAIT)
            if not data:
                return False
            self._received += data
            answer = self._reply(make_text)
            if answer is None:
                return True
            self._unsent = memoryview(answer)
        if self._unsent:
            self._unsent = self._unsent[
                self.socket.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :
            ]
            if not self._unsent:
                self.socket.shutdown(socket.SHUT_WR)
            return True
        return bool(self.socket.recv(HEAD_BYTES, socket.MSG_DONTWAIT))

    def _reply(self, make_text: Callable[[], bytes]) -> bytes | None:
        """Return the answer to the received bytes, or None until they are a whole request."""
        line, newline, headers = self._received.partition(b"\n")
        may_be_http = (
            _REQUEST_LINE.fullmatch(line + newline) if newline else _LINE_BEGIN.fullmatch(line)
        )
        if not may_be_http or len(self._received) >= HEAD_BYTES:
            return _answer(400, b"this is not HTTP\n")
        if not newline or not _HEADERS_END.search(b"\n" + headers):
            return None
        method, target, _ = line.split(b" ")
        if target.partition(b"?")[0] != b"/metrics":
            return _answer(404, b"metrics are at /metrics\n")
        if method not in {b"GET", b"HEAD"}:
            return _answer(405, b"metrics can be read only\n")
        return _answer(200, make_text(), head=method == b"HEAD")

    def close(self, *, by_reset: bool) -> None:
        """End the connection.

        Args:
            by_reset: drop the bytes that the client has not read. Otherwise the kernel keeps them
                for CLIENT_S.
        """
        if by_reset and self._unsent is not None:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()


class Exporter:
    """The thread that serves the metrics. It ends with the process.

    Args:
        host: IP address to listen on.
        port: TCP port; 0 for any free port.
        users: local users that may read, besides root and the daemon's own user, or EVERYBODY.

    Attributes:
        address: host and port once the thread listens, None before.
    """

    def __init__(self, host: str, port: int, users: Sequence[str] = (EVERYBODY,)) -> None:
        self._host, self._port = host, port
        self._doorkeeper = Doorkeeper(users)
        self.address: tuple[str, int] | None = None
        # by descriptor, the oldest first
        self._clients: dict[int, _Client] = {}
        self._made: tuple[float, bytes] | None = None
        self._snapshot: Callable[[], Snapshot] | None = None
        self._main: trio.lowlevel.TrioToken | None = None
        self._has_main = threading.Event()
        threading.Thread(target=self._thread, name="metrics", daemon=True).start()

    def start(self, snapshot: Callable[[], Snapshot]) -> None:
        """Make the thread listen.

        Args:
            snapshot: returns a snapshot; it is called in the event loop of the caller.
        """
        self._snapshot = snapshot
        self._main = trio.lowlevel.current_trio_token()
        self._has_main.set()

    def _thread(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/thread-self/comm").write_text("metrics")
        self._has_main.wait()
        try:
            self._warm_up()
            system.set_nice(needed=False)
            with self._listen() as listener:
                self._serve(listener)
        except trio.RunFinishedError:
            pass  # the daemon is leaving
        except Exception:
            log.exception("metrics: the server has ended after an internal error")

    def _warm_up(self) -> None:
        """Make a text, so that its modules are loaded and its memory is populated."""
        try:
            self._text()
        except trio.RunFinishedError:
            raise
        except Exception:
            log.exception("metrics: the first text has failed")

    def _listen(self) -> socket.socket:
        """Return a listening socket. Try every RETRY_S until the address is free."""
        warned = False
        while True:
            try:
                listener = _listen(self._host, self._port)
            except OSError as error:
                if not warned:
                    log.warning(
                        "metrics: cannot listen on %s port %d: %s",
                        self._host,
                        self._port,
                        error.strerror,
                    )
                warned = True
                time.sleep(RETRY_S)
            else:
                host, port = listener.getsockname()[:2]
                if not self._doorkeeper.begin((host, port)):
                    log.info(
                        "metrics: the kernel cannot look up the user of one socket (tcp_diag);"
                        " reading the list of all sockets"
                    )
                self.address = (host, port)
                log.info("metrics: http://%s:%d/metrics", *self.address)
                return listener

    def _serve(self, listener: socket.socket) -> None:
        allowance = Allowance(SHARE, SAVED_S)
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while True:
            left = (
                min((client.until for client in self._clients.values()), default=0.0)
                - time.monotonic()
            )
            for descriptor, _ in poll.poll(max(left, 0.0) * 1000 + 1 if self._clients else None):
                allowance.wait()
                if descriptor == listener.fileno():
                    self._accept(listener, poll)
                elif descriptor in self._clients:
                    self._advance(self._clients[descriptor], poll)
            now = time.monotonic()
            for client in [client for client in self._clients.values() if client.until <= now]:
                self._end(client, poll)

    def _accept(self, listener: socket.socket, poll: select.poll) -> None:
        try:
            connection, peer = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # the connection was reset while it waited
        except OSError as error:
            log.warning("metrics: cannot accept: %s", error.strerror, extra={"rate_limit": 60})
            time.sleep(_PAUSE_S)
            return
        try:
            verdict = self._doorkeeper.judge(peer[:2], connection.getsockname()[:2])
            if verdict is not Verdict.ALLOWED:
                _turn_away(connection, verdict)
                return
        except OSError:
            connection.close()
            return
        if len(self._clients) >= CLIENTS:
            self._end(next(iter(self._clients.values())), poll)
        client = self._clients[connection.fileno()] = _Client(connection)
        poll.register(connection, client.events)
        self._advance(client, poll)

    def _advance(self, client: _Client, poll: select.poll) -> None:
        is_over = False
        try:
            if client.step(self._text):
                poll.modify(client.socket, client.events)
                return
            is_over = True
        except BlockingIOError:
            return
        except OSError:
            pass  # the client has left
        except trio.RunFinishedError:
            raise
        except Exception:
            log.exception("metrics: a scrape has failed", extra={"rate_limit": 60})
        self._end(client, poll, by_reset=not is_over)

    def _end(self, client: _Client, poll: select.poll, *, by_reset: bool = True) -> None:
        poll.unregister(client.socket)
        del self._clients[client.socket.fileno()]
        client.close(by_reset=by_reset)

    def _text(self) -> bytes:
        """Return a text of the metrics that is at most TEXT_S old."""
        if self._made is None or time.monotonic() - self._made[0] >= TEXT_S:
            self._made = (time.monotonic(), self._make_text())
        return self._made[1]

    def _make_text(self) -> bytes:
        piece = time.perf_counter()
        text = bytearray()
        for family in collect(self._take()):
            text += generate_latest(_One(family))
            if time.perf_counter() - piece > PIECE_S:
                time.sleep(PIECE_S)
                piece = time.perf_counter()
        return bytes(text)

    def _take(self) -> Snapshot:
        """Return a snapshot that the loop that serves pages takes.

        Raises:
            RunFinishedError: the loop has ended.
        """
        assert self._main is not None
        assert self._snapshot is not None
        snapshot = self._snapshot
        taken = threading.Event()
        results: list[Snapshot | Exception] = []

        def take() -> None:
            try:
                results.append(snapshot())
            except Exception as error:  # noqa: BLE001 - an exception here would end that loop
                results.append(error)
            taken.set()

        self._main.run_sync_soon(take)
        taken.wait()
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]


class _One:
    """A registry of one family, for generate_latest."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket that does not block.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # the accepted connections inherit these options
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(CLIENT_S * 1000))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(CLIENT_S))
        listener.bind((host, port))
        listener.listen(QUEUE)
        listener.settimeout(0)
    except BaseException:
        listener.close()
        raise
    return listener


def _turn_away(connection: socket.socket, verdict: Verdict) -> None:
    """End the connection of a user that may not read."""
    with connection:
        if verdict is Verdict.DENIED:
            with contextlib.suppress(BlockingIOError):
                # close(2) with unread bytes would reset the connection and drop the answer
                connection.recv(HEAD_BYTES, socket.MSG_DONTWAIT)
            connection.send(_DENIED, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
