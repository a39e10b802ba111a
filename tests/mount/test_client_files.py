# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap files that come, go and change their size while a daemon runs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounting import KEEP_SIZE, PUNCH_HOLE, fallocate
from tests.support.swap import Stage, next_worker, stage
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import HarnessError

__all__ = ["stage"]
pytestmark = pytest.mark.mount

PAGE = os.urandom(4096)
MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "zswapd.toml"
    path.write_text('[pool]\ncompressor = "lz4"\n')
    return path


@pytest.fixture
def daemon(stage: Stage, file: Path) -> Daemon:
    return stage.daemon("16M", ["--config", str(file)], memory__reserve="8M")


def beside(daemon: Daemon, name: str) -> Path:
    return daemon.file.parent / name


def rows(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in daemon.ask("status")["files"]}


def write(path: Path, *numbers: int, data: bytes = PAGE) -> None:
    with path.open("r+b", buffering=0) as file:
        for number in numbers:
            assert os.pwrite(file.fileno(), data, number * 4096) == 4096


def read(path: Path, number: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), 4096, number * 4096)


def kill_worker(daemon: Daemon) -> None:
    old = daemon.worker_pid()
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)


def test_file_comes_with_its_limit_and_its_successors_know_it(daemon: Daemon) -> None:
    daemon.ctl("files", "add", "guest", "--size", "8M", "--limit", "1M", "--weight", "7")
    path = beside(daemon, "guest")
    write(path, 1, 2000)
    write(daemon.file, 1, data=PAGE[::-1])
    for end in (kill_worker, kill_worker, lambda one: one.ctl("upgrade")):
        old = daemon.worker_pid()
        end(daemon)
        if daemon.worker_pid() == old:
            next_worker(daemon, old)
        assert (read(path, 1), read(path, 2000), read(path, 3)) == (PAGE, PAGE, bytes(4096))
        assert read(daemon.file, 1) == PAGE[::-1]
        row = rows(daemon)["guest"]
        assert (row["size"], row["limit_bytes"], row["weight"]) == (8 * MIB, MIB, 7)
        assert row["stored_pages"] == 2
    write(path, 5)
    daemon.ctl("files", "remove", "guest")
    assert not path.exists()
    kill_worker(daemon)
    assert list(rows(daemon)) == ["swap"]
    assert not path.exists()
    assert read(daemon.file, 1) == PAGE[::-1]


def test_number_of_a_removed_file_leads_to_no_other_file(daemon: Daemon) -> None:
    daemon.ctl("files", "add", "first", "--size", "8M")
    path = beside(daemon, "first")
    write(path, 1)
    numbers = [path.stat().st_ino]
    daemon.ctl("files", "remove", "first")
    for name in ("second", "first"):
        daemon.ctl("files", "add", name, "--size", "8M")
        numbers.append(beside(daemon, name).stat().st_ino)
        assert read(beside(daemon, name), 1) == bytes(4096)
    assert len(set(numbers)) == 3


def test_file_in_use_is_not_removed_and_the_refusal_names_who_uses_it(daemon: Daemon) -> None:
    daemon.ctl("files", "add", "guest", "--size", "8M")
    path = beside(daemon, "guest")
    for mode in ("rb", "r+b"):
        with path.open(mode, buffering=0) as held:
            for command in (("remove", "guest"), ("resize", "guest", "--size", "4M")):
                with pytest.raises(HarnessError, match=rf"process {os.getpid()}"):
                    daemon.ctl("files", *command)
            assert os.pread(held.fileno(), 4096, 0) == bytes(4096)
    assert daemon.ask("stats")["files"]["refused"] == 4
    daemon.ctl("files", "remove", "guest")
    assert daemon.ask("stats")["files"] == {"added": 1, "removed": 1, "resized": 0, "refused": 4}


def test_five_hundred_files_leave_nothing(daemon: Daemon) -> None:
    def state() -> tuple[int, int, int]:
        worker = daemon.worker_pid()
        shared = []
        for fd in Path(f"/proc/{worker}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # one that was open for a moment
                shared.append(fd.stat().st_blocks)
        stats = daemon.ask("stats")
        return len(shared), sum(shared), stats["core"]["frames"]["used_frames"]

    def memory() -> int:
        # Pages of programs are left out: a daemon of another test takes a part of them.
        text = Path(f"/proc/{daemon.worker_pid()}/status").read_text()
        return int(next(row.split()[1] for row in text.splitlines() if row.startswith("RssAnon:")))

    def cycle(number: int) -> None:
        name = f"guest{number % 7}"
        daemon.ask("files-add", name=name, size="64M", settings={"limit": "8M"})
        path = beside(daemon, name)
        write(path, *range(64))
        assert read(path, 63) == PAGE
        daemon.ask("files-remove", name=name)

    for number in range(20):
        cycle(number)
    before, used = state(), memory()
    for number in range(500):
        cycle(number)
    deadline = time.monotonic() + 20
    while state() != before and time.monotonic() < deadline:
        time.sleep(0.2)
    after = state()
    # One or two are open for a moment, such as a connection of the control socket.
    assert after[0] <= before[0] + 2, "descriptors"
    assert after[2] == before[2], "frames"
    assert after[1] <= before[1] + 2 * MIB // 512, "shared memory"
    # Connections of the control socket leave garbage, which is collected when it is quiet.
    assert memory() < used + 6000, "memory of the worker in KiB"
    assert list(rows(daemon)) == ["swap"]


def test_size_changes_with_the_pages_in_it(daemon: Daemon) -> None:
    daemon.ctl("files", "add", "guest", "--size", "8M")
    path = beside(daemon, "guest")
    write(path, 0, 1000)
    daemon.ctl("files", "resize", "guest", "--size", "32M")
    assert path.stat().st_size == 32 * MIB
    assert (read(path, 0), read(path, 1000), read(path, 8000)) == (PAGE, PAGE, bytes(4096))
    write(path, 8000)
    kill_worker(daemon)
    assert (path.stat().st_size, read(path, 8000)) == (32 * MIB, PAGE)
    with pytest.raises(HarnessError, match="data beyond"):
        daemon.ctl("files", "resize", "guest", "--size", "16M")
    assert path.stat().st_size == 32 * MIB
    with path.open("r+b", buffering=0) as file:
        punch(file.fileno(), 8000 * 4096, 4096)
    daemon.ctl("files", "resize", "guest", "--size", "16M")
    assert (path.stat().st_size, read(path, 1000)) == (16 * MIB, PAGE)
    with (
        path.open("r+b", buffering=0) as file,
        pytest.raises(OSError, match=os.strerror(errno.ENOSPC)),
    ):
        os.pwrite(file.fileno(), PAGE, 20 * MIB)


def punch(fd: int, offset: int, length: int) -> None:
    assert fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "swap", "--size", "8M"), "there is a file swap already"),
        (("add", "stats", "--size", "8M"), "already"),
        (("add", "a/b", "--size", "8M"), "name"),
        (("add", "guest", "--size", "1K"), "not a multiple"),
        (("add", "guest", "--size", "1000T"), "swap area|too large"),
        (("add", "guest", "--size", "8M", "--limit", "-1"), "limit"),
        (("add", "guest", "--size", "8M", "--writeback", "tape"), "not known"),
        (("remove", "swap"), "swap.size"),
        (("remove", "guest"), "no swap file"),
        (("resize", "guest", "--size", "8M"), "no swap file"),
    ],
)
def test_what_is_not_right_changes_nothing(
    daemon: Daemon, arguments: tuple[str, ...], message: str
) -> None:
    before = daemon.ask("get")
    with pytest.raises(HarnessError, match=message):
        daemon.ctl("files", *arguments)
    assert list(rows(daemon)) == ["swap"]
    assert daemon.ask("get") == before


def test_drop_in_adds_a_file_at_a_reload(daemon: Daemon, file: Path) -> None:
    daemon.ctl("files", "add", "here", "--size", "8M")
    write(beside(daemon, "here"), 1)
    drop_ins = file.parent / f"{file.name}.d"
    drop_ins.mkdir()
    drop_in = drop_ins / "guest.toml"
    drop_in.write_text('[swap.files.guest]\nsize = "8M"\nlimit = "2M"\n')
    reload(daemon)
    deadline = time.monotonic() + 10
    while "guest" not in rows(daemon) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rows(daemon)["guest"]["limit_bytes"] == 2 * MIB
    write(beside(daemon, "guest"), 2)
    assert read(beside(daemon, "here"), 1) == PAGE
    drop_in.write_text('[swap.files.guest]\nsize = "8M"\nlimit = "3M"\n')
    reload(daemon)
    assert rows(daemon)["guest"]["limit_bytes"] == 3 * MIB
    assert read(beside(daemon, "guest"), 2) == PAGE
    drop_in.write_text('[swap.files.guest]\nsize = "16M"\n')
    with pytest.raises(HarnessError, match="guest"):
        daemon.ctl("upgrade")
    drop_in.unlink()
    daemon.ctl("files", "remove", "guest")
    reload(daemon)
    assert set(rows(daemon)) == {"swap", "here"}


def reload(daemon: Daemon) -> None:
    old = daemon.worker_pid()
    daemon.ctl("upgrade")
    next_worker(daemon, old)
