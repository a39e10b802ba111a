# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever a real daemon is told by its socket and its files.

It answers, changes all or nothing, and goes on as it was.

A few hundred cases in the normal run, 100,000 in the soak tier.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import junk
from tests.support.swap import Stage, stage, wait_for
from tools.bench.harness.daemon import Daemon
from zswapd.system.heap import LIBC_HEAP, PYTHON_HEAP, SMALL_HEAP

__all__ = ["stage"]
pytestmark = pytest.mark.mount

SHORT = settings(max_examples=250, suppress_health_check=list(HealthCheck), deadline=None)
LONG = settings(SHORT, max_examples=100_000)
GROWTH = 4 << 20
"""Memory that a worker may take more afterwards: what it has allocated by then it uses again."""


class Target:
    """A daemon, and a connection to it that is made anew when the daemon closes it."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.worker = daemon.worker_pid()
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(self.daemon.socket))
        self._file = self._socket.makefile("rb")

    def send(self, line: bytes) -> dict[str, Any]:
        """Send a line; return the last answer to it."""
        self._socket.sendall(line + b"\n")
        while True:
            answer = self._file.readline()
            assert answer.endswith(b"\n"), "no answer"
            message: dict[str, Any] = json.loads(answer)
            assert message["v"] == 1
            if "progress" not in message:
                return message

    def ask(self, command: str, **arguments: object) -> Any:
        """Return a result."""
        answer = self.send(json.dumps({"v": 1, "cmd": command, "args": arguments}).encode())
        assert answer["ok"], answer
        return answer["result"]

    def values(self) -> dict[str, Any]:
        """Return all settings."""
        return {name: row["value"] for name, row in self.ask("get").items()}

    def size(self) -> tuple[int, int]:
        """Return the worker's memory, bytes, and its open files."""
        resident = (
            int(Path(f"/proc/{self.worker}/statm").read_text().split()[1]) * resource.getpagesize()
        )
        return resident, len(os.listdir(f"/proc/{self.worker}/fd"))

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def use_for_the_first_time(target: Target, file: Path) -> None:
    """Have allocated what is allocated once.

    Messages, and the larger heaps of a worker that has had a cache volume.
    """
    for name in junk.RELOADABLE:
        target.send(json.dumps({"v": 1, "cmd": "set", "args": {"settings": {name: "no"}}}).encode())
    small, _ = target.size()
    file.write_bytes(bytes(1 << 20))
    target.ask("cache-add", name="first", path=str(file))
    larger = LIBC_HEAP + PYTHON_HEAP - 2 * SMALL_HEAP
    wait_for(lambda: target.size()[0] - small > larger * 9 // 10, "its heaps are not grown")
    target.ask("cache-remove", name="first")


@pytest.fixture
def target(stage: Stage, tmp_path: Path) -> Iterator[Target]:
    """A daemon that must be the same afterwards.

    The same worker, no bug, no more memory, and it keeps pages.
    """
    daemon = stage.daemon("64M", memory__reserve="8M", metrics__listen="")
    made = Target(daemon)
    use_for_the_first_time(made, tmp_path / "file")
    before = made.size()
    yield made
    assert daemon.worker_pid() == made.worker
    for row in made.ask("cache-list")["volumes"]:
        made.ask("cache-remove", name=row["name"])
    assert made.ask("stats")["control"]["internal_errors"] == 0
    after = made.size()
    assert after[0] <= before[0] + GROWTH
    assert after[1] <= before[1]
    made.ask("thaw")
    made.ask(
        "set",
        settings={
            "pool.limit": "",
            "pool.incompressible": "store",
            "pool.zv_page_count_policy_percent": 75,
        },
    )
    with daemon.file.open("r+b", buffering=0) as file:
        page = os.urandom(4096)
        assert os.pwrite(file.fileno(), page, 8192) == 4096
        assert os.pread(file.fileno(), 4096, 8192) == page
    made.close()


def socket_takes(target: Target) -> Callable[[bytes], None]:
    after = target.values()

    def one(line: bytes) -> None:
        nonlocal after
        before = after
        answer = target.send(line)
        after = target.values()
        changed = {name for name in before if before[name] != after[name]}
        if answer["ok"]:
            request = json.loads(line)
            assert not changed or request["cmd"] in ("set", "reset")
            assert request["cmd"] != "set" or changed <= set(request["args"]["settings"])
            assert (
                request["cmd"] != "reset"
                or not request["args"].get("keys")
                or changed <= set(request["args"]["keys"])
            )
            return
        assert not changed, "refused, and applied in part"
        assert answer["error"]["message"]
        assert answer["error"]["code"] != 70, "a bug"
        assert len(json.dumps(answer)) < 2000

    return one


def files_take(target: Target) -> Callable[[str, bytes], None]:
    params = target.daemon.mountpoint / "params"

    after = target.values()

    def one(change: tuple[str, str | bytes]) -> None:
        nonlocal after
        name, text = change
        data = text.encode(errors="replace") if isinstance(text, str) else text
        before = after
        descriptor = os.open(params / name, os.O_WRONLY)
        try:
            taken = os.write(descriptor, data)
        except OSError as error:
            taken = -1
            number = error.errno
        else:
            number = 0
        finally:
            os.close(descriptor)
        after = target.values()
        changed = {dest for dest in before if before[dest] != after[dest]}
        if number:
            assert number == errno.EINVAL
            assert not changed
        else:
            assert taken == len(data)
            assert changed <= {name}

    return one


WRITTEN = st.one_of(
    junk.CHANGES.map(lambda change: (change[0], change[1] + "\n")),
    st.tuples(st.sampled_from(junk.RELOADABLE), st.binary(min_size=1, max_size=50)),
)


NAMES = st.sampled_from(
    [
        *(f"params/{name}" for name in junk.RELOADABLE),
        "params/swap.size",
        "params/zv_max_zsize",
        "stats/loads",
        "stats/none",
    ]
)
STEPS = st.one_of(
    st.tuples(
        st.just("write"),
        st.one_of(junk.WORDS, st.binary(max_size=50)),
        st.sampled_from([0, 1, 7, 4096, 1 << 40]),
    ),
    st.tuples(st.just("append"), junk.WORDS, st.just(0)),
    st.tuples(st.just("read"), st.just(""), st.sampled_from([0, 1, 4096, 1 << 40])),
    st.tuples(st.just("truncate"), st.just(""), st.sampled_from([0, 5, 4096])),
    st.tuples(st.just("fsync"), st.just(""), st.just(0)),
)
SEQUENCES = st.lists(
    st.tuples(
        NAMES, st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]), st.lists(STEPS, max_size=5)
    ),
    min_size=1,
    max_size=3,
)
"""Files that are open together, and what is done with each, in turns."""
REFUSALS = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EBADF, errno.EFBIG}


def do(descriptor: int, step: tuple[str, str | bytes, int]) -> bool:
    """Do one step; return whether it wrote something that was taken."""
    kind, text, offset = step
    data = text.encode(errors="replace") if isinstance(text, str) else text
    try:
        if kind == "read":
            assert len(os.pread(descriptor, 100, offset)) <= 100
        elif kind == "truncate":
            os.ftruncate(descriptor, offset)
        elif kind == "fsync":
            os.fsync(descriptor)
        elif kind == "append":
            return os.write(descriptor, data) == len(data) > 0
        else:
            return os.pwrite(descriptor, data, offset) == len(data) > 0
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
    return False


def files_take_sequences(target: Target) -> Callable[[list[Any]], None]:
    mountpoint = target.daemon.mountpoint
    after = target.values()

    def one(sequence: list[Any]) -> None:
        nonlocal after
        opened, taken, before = [], set(), after
        try:
            for name, flags, steps in sequence:
                try:
                    opened.append((name, os.open(mountpoint / name, flags), list(steps)))
                except OSError as error:
                    if error.errno not in REFUSALS:
                        raise
            while any(steps for _, _, steps in opened):
                for name, descriptor, steps in opened:
                    if steps and do(descriptor, steps.pop(0)):
                        taken.add(
                            name.removeprefix("params/").replace(
                                "zv_max_zsize", "pool.zv_max_zsize"
                            )
                        )
        finally:
            for _, descriptor, _ in opened:
                os.close(descriptor)
        after = target.values()
        taken = {name.replace("pool.pool.", "pool.") for name in taken}
        assert {dest for dest in before if before[dest] != after[dest]} <= taken
        assert not taken - set(junk.RELOADABLE), "what is read-only was written"

    return one


def test_the_socket_takes_anything(target: Target) -> None:
    SHORT(given(junk.lines())(socket_takes(target)))()


def test_settings_as_files_take_anything(target: Target) -> None:
    SHORT(given(WRITTEN)(files_take(target)))()


def test_several_files_take_any_sequence_of_writes_and_reads(target: Target) -> None:
    SHORT(given(SEQUENCES)(files_take_sequences(target)))()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_several_files_take_any_sequence_a_hundred_thousand_times(target: Target) -> None:
    LONG(given(SEQUENCES)(files_take_sequences(target)))()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_socket_takes_anything_a_hundred_thousand_times(target: Target) -> None:
    LONG(given(junk.lines())(socket_takes(target)))()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_settings_as_files_take_anything_a_hundred_thousand_times(target: Target) -> None:
    LONG(given(WRITTEN)(files_take(target)))()
