# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket with real sockets: which clients it admits; no client hurts another one."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from zswapd.control import server as server_module
from zswapd.control.client import Client
from zswapd.control.protocol import COMMANDS, MAX_REQUEST, Argument, encode_error
from zswapd.control.server import Server
from zswapd.errors import ConfigError, ControlError, PermissionsError, ZswapdError

TEST_COMMANDS = {
    **COMMANDS,
    "fail": (),
    "crash": (),
    "slow": (),
    "count": (Argument("keys", "names", "anything"),),
    "unsayable": (),
}


async def count(report: Callable[[object], Awaitable[None]], keys: list[str] = []) -> int:  # noqa: B006
    for number, key in enumerate(keys):
        await report({"done": number, "key": key})
    return len(keys)


async def slow() -> str:
    await trio.sleep(0.2)
    return "slow"


def fail() -> None:
    raise ConfigError("pool.limit is 7", hint="write 1G")


def crash() -> None:
    raise KeyError("oops")


HANDLERS: dict[str, Callable[..., Any]] = {
    "status": lambda: {"state": "serving"},
    "get": lambda keys=(): {"keys": list(keys)},
    "fail": fail,
    "crash": crash,
    "slow": slow,
    "count": count,
    "unsayable": object,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run/zswapd.sock"


@asynccontextmanager
async def serving(path: Path, **limits: float) -> AsyncIterator[Server]:
    with Server(path, HANDLERS, commands=TEST_COMMANDS, **limits) as server:  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            yield server
            nursery.cancel_scope.cancel()


async def ask(
    path: Path, command: str, progress: list[object] | None = None, **arguments: object
) -> object:
    def run() -> object:
        with Client(path, timeout=5) as client:
            return client.call(
                command, progress=None if progress is None else progress.append, **arguments
            )

    return await trio.to_thread.run_sync(run)


async def exchange(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Send bytes and the end, return all replies."""
    async with await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        received = b"".join([chunk async for chunk in stream])
    return [json.loads(line) for line in received.splitlines()]


async def nobody_left(server: Server) -> None:
    with trio.fail_after(5):
        while server.statistics().clients:
            await trio.sleep(0.01)


async def test_client_gets_the_handlers_result(path: Path) -> None:
    async with serving(path) as server:
        assert await ask(path, "status") == {"state": "serving"}
        assert await ask(path, "get", keys=["a", "b"]) == {"keys": ["a", "b"]}
        assert await ask(path, "slow") == "slow"
        statistics = server.statistics()
        assert (statistics.requests, statistics.refused, statistics.internal_errors) == (3, 0, 0)


async def test_one_connection_carries_many_requests(path: Path) -> None:
    def run() -> list[object]:
        with Client(path) as client:
            return [client.call("get", keys=[str(number)]) for number in range(50)]

    async with serving(path):
        assert await trio.to_thread.run_sync(run) == [
            {"keys": [str(number)]} for number in range(50)
        ]


async def test_progress_comes_before_the_result(path: Path) -> None:
    seen: list[object] = []
    async with serving(path):
        assert await ask(path, "count", progress=seen, keys=["a", "b"]) == 2
    assert seen == [{"done": 0, "key": "a"}, {"done": 1, "key": "b"}]


async def test_a_handlers_refusal_reaches_the_client_as_it_was(path: Path) -> None:
    async with serving(path):
        with pytest.raises(ConfigError) as caught:
            await ask(path, "fail")
    assert (caught.value.message, caught.value.hint) == ("pool.limit is 7", "write 1G")


@pytest.mark.parametrize("command", ["crash", "unsayable"])
async def test_a_handlers_bug_is_logged_and_the_server_goes_on(
    path: Path, expect_log: Callable[..., object], command: str
) -> None:
    expect_log(f"control command {command} failed")
    async with serving(path) as server:
        with pytest.raises(ZswapdError, match="internal error") as caught:
            await ask(path, command)
        assert caught.value.exit_code == 70
        assert await ask(path, "status") == {"state": "serving"}
        assert server.statistics().internal_errors == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n",
        b"hello\n",
        b"\xff\x00\n",
        b'{"v":1,"cmd":"nothing"}\n',
        b'{"v":9}\n',
        b"[" * 50000 + b"\n",
    ],
)
async def test_garbage_is_answered_and_the_same_client_may_go_on(
    path: Path, garbage: bytes
) -> None:
    async with serving(path) as server:
        replies = await exchange(path, garbage + b'{"v":1,"cmd":"status"}\n')
        assert [reply["ok"] for reply in replies] == [False, True]
        assert replies[0]["error"]["hint"]
        assert server.statistics().refused == 1


async def test_a_line_without_end_is_refused_and_the_client_shown_out(path: Path) -> None:
    async with serving(path) as server:
        async with await trio.open_unix_socket(str(path)) as stream:
            with trio.fail_after(5):
                await stream.send_all(b"x" * MAX_REQUEST)
                received = b"".join([chunk async for chunk in stream])
        assert b"longer than" in received
        assert await ask(path, "status") == {"state": "serving"}
        await nobody_left(server)


async def test_half_a_request_and_goodbye_is_forgotten(path: Path) -> None:
    async with serving(path) as server:
        assert await exchange(path, b'{"v":1,"cmd":"sta') == []
        assert server.statistics().requests == 0


async def test_a_silent_client_is_shown_out_and_holds_nobody_up(path: Path) -> None:
    async with serving(path, idle=0.3) as server, await trio.open_unix_socket(str(path)) as silent:
        await silent.send_all(b'{"v":1')
        assert await ask(path, "status") == {"state": "serving"}
        with trio.fail_after(5):
            assert await silent.receive_some() == b""
        await nobody_left(server)


async def test_a_client_that_does_not_read_is_shown_out_and_holds_nobody_up(path: Path) -> None:
    async with serving(path, send=0.3) as server, await trio.open_unix_socket(str(path)) as deaf:
        keys = (
            json.dumps({"v": 1, "cmd": "get", "args": {"keys": ["x" * 100] * 300}}).encode() + b"\n"
        )
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await deaf.send_all(keys * 200)
        assert await ask(path, "status") == {"state": "serving"}
        await nobody_left(server)


async def test_one_client_more_takes_the_place_of_the_one_silent_for_longest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 2)
    async with serving(path) as server:
        held = [await trio.open_unix_socket(str(path)) for _ in range(2)]
        for stream in held[::-1]:  # answered, so they are inside; the first one spoke last
            await stream.send_all(b'{"v":1,"cmd":"status"}\n')
            await stream.receive_some()
        assert await ask(path, "status") == {"state": "serving"}
        with trio.fail_after(5):
            assert await held[1].receive_some() == b""
        await held[0].send_all(b'{"v":1,"cmd":"status"}\n')
        assert b"serving" in await held[0].receive_some()
        for stream in held:
            await stream.aclose()
        await nobody_left(server)
        assert server.statistics().turned_away == 0


async def test_clients_are_turned_away_when_all_others_wait_for_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 2)
    async with serving(path) as server:
        held = [await trio.open_unix_socket(str(path)) for _ in range(2)]
        for stream in held:
            await stream.send_all(b'{"v":1,"cmd":"slow"}\n')
        while server.statistics().requests < 2:
            await trio.sleep(0.01)
        with pytest.raises(ControlError, match="too many clients"):
            await ask(path, "status")
        for stream in held:
            assert b"slow" in await stream.receive_some()
            await stream.aclose()
        await nobody_left(server)
        assert await ask(path, "status") == {"state": "serving"}
        assert server.statistics().turned_away == 1


async def test_another_user_is_turned_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Callable[..., object]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("not root: cannot become another user")
    expect_log("user 65534 was turned away")
    async with serving(path) as server:
        for parent in [path, *list(path.parents)[:3]]:  # what an administrator's mistake could open
            os.chmod(parent, 0o777)
        reply = await trio.to_thread.run_sync(_ask_as_nobody, str(path))
        assert reply["error"]["message"] == "permission denied"
        assert reply["error"]["code"] == PermissionsError.exit_code
        assert server.statistics().turned_away == 1


def _ask_as_nobody(path: str) -> Any:
    def child(replies: Any) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            os.chdir(Path(path).parent)
            os.setresuid(65534, 65534, 65534)
            connection.connect(Path(path).name)
            with contextlib.suppress(BrokenPipeError):  # turned away before the question was out
                connection.sendall(b'{"v":1,"cmd":"status"}\n')
            replies.put(connection.recv(4096))

    context = multiprocessing.get_context("fork")
    replies = context.Queue()
    process = context.Process(target=child, args=(replies,))
    process.start()
    reply = replies.get(timeout=10)
    process.join(10)
    return json.loads(reply)


def test_open_makes_a_socket_for_its_owner_only_and_close_leaves_nothing(path: Path) -> None:
    with Server(path, HANDLERS, commands=TEST_COMMANDS):
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == []


def test_open_while_a_daemon_lives_is_refused_and_leaves_it_alone(path: Path) -> None:
    with Server(path, HANDLERS, commands=TEST_COMMANDS):
        inode = path.stat().st_ino
        with pytest.raises(
            ControlError, match=r"another zswapd runs with the control socket .*/zswapd\.sock \("
        ) as caught:
            Server(path, HANDLERS, commands=TEST_COMMANDS).open()
        assert "control.socket=PATH" in (caught.value.hint or "")
        assert path.stat().st_ino == inode
    assert not path.exists()


def test_open_replaces_what_a_killed_daemon_left(path: Path) -> None:
    def child() -> None:
        Server(path, HANDLERS, commands=TEST_COMMANDS).open()
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(10)
    assert path.exists()
    inode = path.stat().st_ino, path.stat().st_ctime_ns
    with Server(path, HANDLERS, commands=TEST_COMMANDS):
        assert (path.stat().st_ino, path.stat().st_ctime_ns) != inode
    assert list(path.parent.iterdir()) == []


def test_open_refuses_what_is_no_socket_and_what_somebody_else_listens_at(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("my diary")
    with pytest.raises(ControlError, match="no socket"):
        Server(path, HANDLERS, commands=TEST_COMMANDS).open()
    assert path.read_text() == "my diary"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ControlError, match="another program listens"):
            Server(path, HANDLERS, commands=TEST_COMMANDS).open()
        assert path.exists()


def test_open_where_no_directory_can_be_made_is_a_permissions_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionsError, match="cannot make the control socket") as caught:
        Server(tmp_path / "file/zswapd.sock", HANDLERS, commands=TEST_COMMANDS).open()
    assert "--set control.socket" in (caught.value.hint or "")


def test_a_handler_without_a_row_in_the_table_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Server(Path("/nowhere"), {"no such command": fail})


def test_client_without_a_daemon_says_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / "nothing/below"):
        with pytest.raises(ControlError, match="zswapd does not run") as caught:
            Client(path)
        assert "zswapd run" in (caught.value.hint or "")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(ControlError, match="zswapd does not run"):
        Client(tmp_path / "dead")


def test_client_without_the_right_is_a_permissions_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(PermissionsError, match="permission denied") as caught:
        Client(tmp_path / "sock")
    assert "as root, too" in (caught.value.hint or "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["/usr/bin/zswapctl", "status"])
    with pytest.raises(PermissionsError, match="permission denied") as caught:
        Client(tmp_path / "sock")
    assert "zswapctl status" in (caught.value.hint or "")


def test_client_that_was_turned_away_before_it_asked_hears_why(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Client(path) as client:
            connection, _ = listener.accept()
            connection.sendall(encode_error("too many clients at once", "try again later", 5))
            connection.close()
            with pytest.raises(ControlError, match="too many clients"):
                client.call("status")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection"),
        (b"hello\n", "not JSON"),
        (b'{"v":1', "closed the connection"),
        (None, "does not answer within"),
    ],
)
def test_client_of_something_that_is_no_daemon_gets_a_control_error(
    path: Path, answer: bytes | None, message: str
) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Client(path, timeout=0.3) as client:
            connection, _ = listener.accept()
            with connection:
                if answer is not None:
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                with pytest.raises(ControlError, match=message) as caught:
                    client.call("status")
        assert caught.value.hint


def test_a_client_waits_for_its_place_in_a_full_queue(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as undo:
        listening.bind(str(path))
        listening.listen(0)
        first = undo.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(path))
        with pytest.raises(ControlError, match="cannot connect"):
            Client(path, timeout=0.1)
        later = threading.Timer(0.3, lambda: undo.enter_context(listening.accept()[0]))
        later.start()
        Client(path, timeout=10).close()
        later.join()
