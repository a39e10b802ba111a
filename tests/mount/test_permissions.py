# SPDX-License-Identifier: GPL-2.0-or-later
"""A user without rights gets "permission denied" at each interface of a running daemon.

A slow client delays no other client.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import io
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.swap import Stage, stage, wait_for
from tools.bench.harness.daemon import Daemon
from zswapd.cli import zswapctl
from zswapd.control.client import Client
from zswapd.errors import PermissionsError

__all__ = ["stage"]
pytestmark = pytest.mark.mount

NOBODY = 65534
PIDFD_OPEN, PIDFD_GETFD = 434, 438  # the same on every machine that is newer than they are


@pytest.fixture
def daemon(stage: Stage, tmp_path: Path) -> Iterator[Daemon]:
    """Return a daemon below directories that all users may enter.

    Only the daemon's own permissions keep other users out.
    """
    started = stage.daemon("64M", memory__reserve="8M")
    closed = [
        path
        for path in (started.directory, *tmp_path.parents)
        if path.stat().st_mode & 0o055 != 0o055
    ]
    for path in [*closed, tmp_path]:
        path.chmod(path.stat().st_mode | 0o055)
    yield started
    for path in closed:
        path.chmod(0o700)


def family(daemon: Daemon) -> list[int]:
    """Return the supervisor and those that it has forked."""
    supervisor = int(daemon.ask("status")["pid"])
    return [
        supervisor,
        *map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()),
    ]


def as_nobody(work: Callable[[], object]) -> Any:
    """Run `work` in a process of another user; return its result, or its exception's name."""

    def child(answers: Any) -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            answers.put(work())
        except OSError as error:
            answers.put(type(error).__name__)

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    answer = answers.get(timeout=20)
    process.join(20)
    return answer


def system_call(number: int, *arguments: int) -> int:
    """Make a system call; raise what it fails with."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *map(ctypes.c_long, arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def test_nobody_gets_into_the_mount(daemon: Daemon) -> None:
    inside = ("", "swap", "params", "params/pool.limit", "stats", "stats/loads", "cache")
    attempts: dict[str, Callable[[], object]] = {}
    for name in inside:
        path = daemon.mountpoint / name
        attempts[f"stat {name}"] = lambda path=path: os.stat(path)
        attempts[f"list {name}"] = lambda path=path: os.listdir(path)
        attempts[f"read {name}"] = lambda path=path: os.open(path, os.O_RDONLY)
        attempts[f"write {name}"] = lambda path=path: os.open(
            path / "x" if path == daemon.mountpoint else path, os.O_WRONLY
        )
    outcomes = as_nobody(lambda: {what: _outcome(attempt) for what, attempt in attempts.items()})
    assert outcomes == dict.fromkeys(attempts, "PermissionError")
    assert os.stat(daemon.mountpoint / "params/pool.limit").st_mode & 0o077 == 0
    assert daemon.directory.stat().st_mode & 0o005 == 0o005, "or else this has shown nothing"


def _outcome(attempt: Callable[[], object]) -> str:
    try:
        return f"did it: {attempt()!r:.40}"
    except OSError as error:
        return type(error).__name__


def test_nobody_gets_through_the_socket(daemon: Daemon) -> None:
    def connect() -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(daemon.socket))
            return "connected"

    def ask() -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = zswapctl.main(["--socket", str(daemon.socket), "set", "pool.limit=1M"])
        return code, said.getvalue()

    assert as_nobody(connect) == "PermissionError"
    code, said = as_nobody(ask)
    assert code == PermissionsError.exit_code
    error, hint = said.splitlines()
    assert error == f"zswapctl: error: permission denied at {daemon.socket}"
    assert hint.startswith("zswapctl: hint: run it as root: `su")
    assert daemon.ask("get")["pool.limit"]["value"] is None


def test_nobody_gets_at_the_pages_in_memory(daemon: Daemon) -> None:
    attempts: dict[str, Callable[[], object]] = {}
    for process in family(daemon):
        place = Path(f"/proc/{process}")
        attempts[f"memory of {process}"] = lambda place=place: (place / "mem").open("rb")
        attempts[f"map of {process}"] = lambda place=place: (place / "maps").read_text()
        attempts[f"files of {process}"] = lambda place=place: os.listdir(place / "fd")
        attempts[f"mapped files of {process}"] = lambda place=place: os.listdir(place / "map_files")
        attempts[f"signal to {process}"] = lambda process=process: os.kill(process, signal.SIGTERM)
        attempts[f"pidfd of {process}"] = lambda process=process: system_call(
            PIDFD_GETFD, system_call(PIDFD_OPEN, process, 0), 3, 0
        )
    arena = next(
        path
        for path in Path(f"/proc/{daemon.worker_pid()}/fd").iterdir()
        if _size(path) >= 64 << 20
    )
    attempts["the arena itself"] = lambda: os.open(arena, os.O_RDONLY)
    outcomes = as_nobody(lambda: {what: _outcome(attempt) for what, attempt in attempts.items()})
    assert outcomes == dict.fromkeys(attempts, "PermissionError")
    assert len(family(daemon)) >= 2


def metrics_of(daemon: Daemon, port: int) -> Callable[[str, str], tuple[int, str]]:
    """Return a function that asks for a daemon's metrics, once their listener is there."""
    wait_for(lambda: f":{port}/metrics" in daemon.log_text(), "no listener")

    def ask(method: str, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body="pool.limit=1M" if method == "POST" else None)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    return ask


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("users", ["prometheus", "", "1 2"])
def test_the_metrics_are_for_root_and_for_users_who_are_named(
    stage: Stage, port: int, users: str
) -> None:
    daemon = stage.daemon(
        "64M", memory__reserve="8M", metrics__listen=f"127.0.0.1:{port}", metrics__users=users
    )
    ask = metrics_of(daemon, port)
    status, text = as_nobody(lambda: ask("GET", "/metrics"))
    assert (status, text) == (
        403,
        "permission denied; metrics.users lists the users that may read the metrics\n",
    )
    assert ask("GET", "/metrics")[0] == 200


@pytest.mark.parametrize("users", ["*", "prometheus nobody", str(NOBODY)])
def test_nobody_gets_numbers_from_the_metrics_if_he_is_named_and_nothing_else(
    stage: Stage, port: int, users: str
) -> None:
    daemon = stage.daemon(
        "64M", memory__reserve="8M", metrics__listen=f"127.0.0.1:{port}", metrics__users=users
    )
    ask = metrics_of(daemon, port)
    before = daemon.ask("get")
    status, text = as_nobody(lambda: ask("GET", "/metrics"))
    assert status == 200
    values = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(values) > 50
    assert [
        line
        for line in values
        if not re.fullmatch(r'[a-z_]+(\{[a-z_]+="[\w.+-]*"\})? [\d.e+-]+', line)
    ] == []
    assert as_nobody(lambda: ask("POST", "/metrics"))[0] == 405
    assert as_nobody(lambda: ask("GET", "/params/pool.limit"))[0] == 404
    assert daemon.ask("get") == before


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def test_a_crowd_of_slow_and_silent_clients_holds_nobody_up(daemon: Daemon) -> None:
    crowd = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    try:
        for number, one in enumerate(crowd):
            one.connect(str(daemon.socket))
            one.sendall(
                b'{"v":1,"cmd":"pages"}\n'
                if number % 3 == 0
                else b'{"v":'
                if number % 3 == 1
                else b"\xff"
            )
        began = time.monotonic()
        for _ in range(5):
            with Client(daemon.socket) as client:
                assert client.call("freeze") == {"frozen": True}
                assert client.call("thaw") == {"frozen": False}
            for one in crowd[1::3]:  # a byte now and then, if it is still there
                with contextlib.suppress(BrokenPipeError):
                    one.sendall(b" ")
        with daemon.file.open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), bytes(4096), 0) == 4096
        assert time.monotonic() - began < 10
    finally:
        for one in crowd:
            one.close()
