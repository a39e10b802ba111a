# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves the metrics over HTTP, from a thread of its own.

Why a thread: accepting a connection and sending a page of text take memory from the kernel, and on
a box that is short of it that waits for memory that only the daemon can free. Scrapers come all the
time, also then. So the thread that serves pages does none of it. The thread is there from the
start, not on demand, since a clone(2) that waits does so with the GIL held.

What others can take from the page path by asking: any user of the machine can connect, so the
thread is built for a flood.

- It is an ordinary task with nice value 0 (below the page path), and a real-time one only until it
  listens: then it touches the memory that it will need for the first time. It is not an idle task
  either: it holds the GIL at times, and a holder that gets no processor would stop the page path.
- SHARE bounds its processor time (allowance.py), whatever is asked: connecting, asking, texts. What
  it does not get to stays in the listening socket's queue, at most QUEUE connections, each with
  RECEIVE_BYTES at most; the kernel drops what is more, and a client's kernel tries again. So a
  scraper gets in beside a flood that is not much faster than the thread accepts.
- The owner of the client's socket is asked first (peers.py). A user who may not read gets a line
  with 403 at once, and neither a place nor time. The kernel tells of a connection only when a
  request has come (TCP_DEFER_ACCEPT), so there is nothing to wait for.
- Of users who may read: CLIENTS at a time, CLIENT_S for each, HEAD_BYTES for a request, one request
  a connection. One more takes the place of the one that is there for longest. A client that does
  not read its answer has its connection reset, so the kernel does not keep answers either: it holds
  those of CLIENTS connections, or of CLIENT_S where clients close their end first.

What the page path notices: a snapshot, taken in its own loop so that all of it is of one moment (a
third of a millisecond, noting it for a successor included, whatever the size of the pool), and that
the GIL is taken while text is made. That is done in pieces of PIECE_S, with a pause after each. The
same text is told for TEXT_S.

Limits: GET and HEAD of /metrics. No encryption and no password: it listens on the loopback
interface unless told otherwise, and tells nothing to users of this machine who are not named. The
socket is the worker's own: the next worker listens again, and a scrape that falls in between fails.
If the address is taken, that is said once, and tried again every RETRY_S. A flood of many thousand
connections a second keeps scrapers out as long as it lasts; the page path does not notice it.
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
"""Part of a processor that the thread may use: with 1 %, the GIL is free for 99 of 100 page-ins."""
SAVED_S = 0.05
"""Processor time that it may use at once: some ten texts."""
QUEUE = 32
"""Connections that may wait to be accepted; SHARE allows some 100 a second."""
RECEIVE_BYTES = 8 << 10
CLIENTS = 8
CLIENT_S = 5.0
HEAD_BYTES = 8 << 10
"""Longest request that is read."""
RETRY_S = 10.0
PIECE_S = 0.0003
"""Time for which text is made without a pause: some ten families."""
TEXT_S = 0.5
"""Age up to which a text is told again."""
_PAUSE_S = 0.1
"""Wait after the kernel has refused to accept, for memory or descriptors."""

_REQUEST_LINE = re.compile(rb"[A-Z]{1,16} [!-~]+ HTTP/1\.[0-9]\r?\n")
_LINE_BEGIN = re.compile(rb"[A-Z]{0,16}|[A-Z]{1,16} [!-~]*(?: [!-~]*\r?)?")
_HEADERS_END = re.compile(rb"\n\r?\n")
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time
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


_DENIED = _answer(403, b"permission denied; metrics.users names who may read the metrics\n")


class _Client:
    """A connection of a user that may read.

    Its request is read, an answer is sent, and the client's end is waited for.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.until = time.monotonic() + CLIENT_S
        self._received = b""
        self._unsent: memoryview | None = None

    @property
    def events(self) -> int:
        """What to wait for."""
        return select.POLLOUT if self._unsent else select.POLLIN

    def step(self, make_text: Callable[[], bytes]) -> bool:
        """Do what can be done without waiting; return whether the connection goes on.

        Args:
            make_text: makes the metrics.

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
        """Return the answer to what was received; None if that is no whole request yet."""
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
            by_reset: forget what the client has not read; otherwise the kernel keeps it for
                CLIENT_S.
        """
        if by_reset and self._unsent is not None:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()


class Exporter:
    """The thread. Ends with the process.

    Args:
        host: IP address to listen on.
        port: TCP port; 0 for any.
        users: of this machine who may read them, besides root and our own; EVERYBODY for all.

    Attributes:
        address: where it listens, once it does; host and port.
    """

    def __init__(self, host: str, port: int, users: Sequence[str] = (EVERYBODY,)) -> None:
        self._host, self._port = host, port
        self._doorkeeper = Doorkeeper(users)
        self.address: tuple[str, int] | None = None
        # by descriptor, the one that is there for longest first
        self._clients: dict[int, _Client] = {}
        self._made: tuple[float, bytes] | None = None
        self._snapshot: Callable[[], Snapshot] | None = None
        self._main: trio.lowlevel.TrioToken | None = None
        self._has_main = threading.Event()
        threading.Thread(target=self._thread, name="metrics", daemon=True).start()

    def start(self, snapshot: Callable[[], Snapshot]) -> None:
        """Have the thread listen.

        Args:
            snapshot: takes one; it will be called in the event loop that this is called from.
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
            log.exception("metrics are not served any more")

    def _warm_up(self) -> None:
        """Make a text, so that the modules and the memory for it are there."""
        try:
            self._text()
        except trio.RunFinishedError:
            raise
        except Exception:
            log.exception("metrics cannot be made")

    # Connections.

    def _listen(self) -> socket.socket:
        """Return a listening socket, as soon as there can be one."""
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
                        "metrics: the kernel does not tell the user of one socket (tcp_diag); its"
                        " list of all is read"
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
            return  # it was reset while it waited
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
            log.exception("a scrape failed", extra={"rate_limit": 60})
        self._end(client, poll, by_reset=not is_over)

    def _end(self, client: _Client, poll: select.poll, *, by_reset: bool = True) -> None:
        poll.unregister(client.socket)
        del self._clients[client.socket.fileno()]
        client.close(by_reset=by_reset)

    # The text.

    def _text(self) -> bytes:
        """Return a text, or the last one while it is fresh."""
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
        """Have the loop that serves pages take a snapshot.

        Raises:
            RunFinishedError: it has ended.
        """
        assert self._main is not None
        assert self._snapshot is not None
        snapshot = self._snapshot
        taken = threading.Event()
        results: list[Snapshot | Exception] = []

        def take() -> None:
            try:
                results.append(snapshot())
            except Exception as error:  # noqa: BLE001 - it would end the loop that serves pages
                results.append(error)
            taken.set()

        self._main.run_sync_soon(take)
        taken.wait()
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]


class _One:
    """One family, as what generate_latest takes."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket that does not block.

    Raises:
        OSError: there cannot be one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # its connections inherit it
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
    """End the connection of a user who may not read; the client may still be there."""
    with connection:
        if verdict is Verdict.DENIED:
            with contextlib.suppress(BlockingIOError):
                # what is unread would have the answer dropped
                connection.recv(HEAD_BYTES, socket.MSG_DONTWAIT)
            connection.send(_DENIED, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
