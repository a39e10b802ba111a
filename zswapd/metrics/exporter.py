# SPDX-License-Identifier: GPL-2.0-or-later
"""Serves the metrics over HTTP, from a thread with an event loop of its own.

Why a thread: accepting a connection and sending a page of text take memory from the kernel, and on a box that is short of it
that waits for what only the daemon can free. A scraper comes all the time, also then. So nobody who serves pages does any of
it. The thread is there from the start, not on demand, since a clone(2) that waits does so with the GIL held.

It is a real-time thread, as whoever serves pages is while memory is scarce (service/scheduling.py): it holds the GIL when it
touches memory for the first time, and must not wait for it then. It wakes up too seldom to be in anybody's way.

What the page path notices: a snapshot, taken in its own loop so that all of it is of one moment (a third of a millisecond,
noting it for a successor included, whatever the size of the pool), and that the GIL is taken while text is made. That is done
in pieces of PIECE_S, with a pause after each. Many may ask, so how often that happens is not up to who
asks: the same text is told for TEXT_S, and no two requests are answered within GAP_S.

Limits: GET and HEAD of /metrics, one request a connection, CLIENTS at a time, CLIENT_S for each, whatever it does or does not;
one more takes the place of the one that has been without a request for longest, so that clients that say nothing keep nobody
out. No encryption and no password: it listens on the loopback interface unless told otherwise, and tells nothing to users of
this machine who are not named (peers.py). The socket is the worker's own:
the next worker listens again, and a scrape that falls in between fails. If the address is taken, that is said once, and tried
again every RETRY_S.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import h11
import outcome
import trio
from prometheus_client.exposition import generate_latest

from zswapd import service
from zswapd.metrics.families import collect
from zswapd.metrics.peers import EVERYBODY, may_read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prometheus_client.core import Metric

    from zswapd.snapshot import Snapshot

log = logging.getLogger(__name__)

CLIENTS = 8
CLIENT_S = 5.0
RETRY_S = 10.0
PIECE_S = 0.0003
"""Time for which text is made without a pause: some ten families."""
TEXT_S = 0.5
"""Age up to which a text is told again."""
GAP_S = 0.02
"""Least time between two requests that are answered."""


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
        self._users = tuple(users)
        self.address: tuple[str, int] | None = None
        self._clients = 0
        self._silent: dict[trio.CancelScope, None] = {}  # the longest first
        self._made: tuple[float, bytes] | None = None
        self._next = 0.0
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
        service.first_in_line()
        self._has_main.wait()
        try:
            trio.run(self._listen)
        except trio.RunFinishedError:
            pass
        except Exception:
            log.exception("metrics are not served any more")

    async def _listen(self) -> None:
        making = trio.Lock()
        await self._text(making)  # what it takes is loaded, and its memory there, before anybody is short of it
        may_read(("127.0.0.1", 0), ("127.0.0.1", 0), self._users)
        warned = False
        while True:
            try:
                listeners = await trio.open_tcp_listeners(self._port, host=self._host)
            except OSError as error:
                if not warned:
                    log.warning("metrics: cannot listen on %s port %d: %s", self._host, self._port, error.strerror)
                warned = True
                await trio.sleep(RETRY_S)
                continue
            name = listeners[0].socket.getsockname()
            self.address = (name[0], name[1])
            log.info("metrics: http://%s:%d/metrics", *self.address)
            await trio.serve_listeners(partial(self._serve, making), listeners)

    async def _take(self) -> Snapshot:
        """Have the other loop take a snapshot."""
        assert self._main is not None
        assert self._snapshot is not None
        snapshot = self._snapshot
        taken = trio.Event()
        here = trio.lowlevel.current_trio_token()
        results: list[outcome.Value[Snapshot] | outcome.Error] = []

        def take() -> None:
            results.append(outcome.capture(snapshot))
            with contextlib.suppress(trio.RunFinishedError):  # raised in here, it would end the loop that serves pages
                here.run_sync_soon(taken.set)

        self._main.run_sync_soon(take)
        await taken.wait()
        return results[0].unwrap()

    async def _text(self, making: trio.Lock) -> bytes:
        """Return a text, of which one at a time is made, or the last one while it is fresh."""
        async with making:
            if self._made is None or trio.current_time() - self._made[0] >= TEXT_S:
                self._made = (trio.current_time(), await self._make_text())
            return self._made[1]

    async def _make_text(self) -> bytes:
        piece = time.perf_counter()
        text = bytearray()
        for family in collect(await self._take()):
            text += generate_latest(_One(family))
            if time.perf_counter() - piece > PIECE_S:
                await trio.sleep(PIECE_S)
                piece = time.perf_counter()
        return bytes(text)

    async def _serve(self, making: trio.Lock, stream: trio.SocketStream) -> None:
        self._clients += 1
        try:
            if self._clients <= CLIENTS or self._show_one_out():
                with trio.move_on_after(CLIENT_S) as scope:
                    await self._converse(stream, making, scope)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.RunFinishedError):
            pass  # the client has left, or the daemon is leaving
        except Exception:
            log.exception("a scrape failed", extra={"rate_limit": 60})
        finally:
            self._clients -= 1
            await trio.aclose_forcefully(stream)

    def _show_one_out(self) -> bool:
        """End the client that has been without a request for longest; return False if all wait for their answers."""
        scope = next(iter(self._silent), None)
        if scope is None:
            return False
        del self._silent[scope]
        scope.cancel()
        return True

    async def _converse(self, stream: trio.SocketStream, making: trio.Lock, scope: trio.CancelScope) -> None:
        connection = h11.Connection(h11.SERVER)
        self._silent[scope] = None
        try:
            request = await _next_request(connection, stream)
        except h11.RemoteProtocolError:
            await _send(connection, stream, 400, b"this is not HTTP\n")
            return
        finally:
            self._silent.pop(scope, None)
        if request is None:
            return
        now = trio.current_time()
        begin = max(now, self._next)
        self._next = begin + GAP_S
        await trio.sleep(begin - now)
        path = request.target.split(b"?")[0]
        if path != b"/metrics":
            await _send(connection, stream, 404, b"metrics are at /metrics\n")
        elif not may_read(stream.socket.getpeername()[:2], stream.socket.getsockname()[:2], self._users):
            await _send(connection, stream, 403, b"permission denied; metrics.users names who may read the metrics\n")
        elif request.method not in {b"GET", b"HEAD"}:
            await _send(connection, stream, 405, b"metrics can be read only\n")
        else:
            text = await self._text(making)
            await _send(connection, stream, 200, text, head=request.method == b"HEAD")


class _One:
    """One family, as what generate_latest takes."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


async def _next_request(connection: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """Return the client's request, None if it left without one.

    Raises:
        RemoteProtocolError: what it sends is none, or longer than h11 takes (16 KiB).
    """
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(4096))
        elif isinstance(event, h11.Request):
            return event
        else:
            return None


async def _send(connection: h11.Connection, stream: trio.SocketStream, status: int, body: bytes, *, head: bool = False) -> None:
    kind = "text/plain; version=0.0.4; charset=utf-8" if status == 200 else "text/plain; charset=utf-8"
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Connection", "close")]
    answer = connection.send(h11.Response(status_code=status, headers=headers)) or b""
    if not head:
        answer += connection.send(h11.Data(data=body)) or b""
    await stream.send_all(answer)
    await stream.send_eof()
