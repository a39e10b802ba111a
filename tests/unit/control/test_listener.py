# SPDX-License-Identifier: GPL-2.0-or-later
"""One process may supervise, and all others can find it, whatever descriptors its workers have."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zswapd.control.listener import Listener, lock_path, supervisor_of
from zswapd.errors import AlreadyRunningError, ControlError


@contextmanager
def process(work: Callable[[], object]) -> Iterator[int]:
    """Fork a process that does some work and then waits to be killed."""
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            os.write(told, b"r")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"r"
    os.close(ready)
    try:
        yield pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def copies(listener: Listener) -> tuple[int, int]:
    """What another process would get of its descriptors."""
    listening, lock = listener.descriptors()
    return os.dup(listening), os.dup(lock)


def test_supervisor_is_known_and_its_workers_are_none(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert supervisor_of(path) == 0
    with process(Listener(path).open) as supervisor:
        assert supervisor_of(path) == supervisor
        with pytest.raises(AlreadyRunningError):
            Listener(path).open()
        assert supervisor_of(path) == supervisor, "to look and to be refused takes nothing away"
    assert supervisor_of(path) == 0


def test_worker_that_outlives_its_supervisor_has_none(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = Listener(path)
    with process(listener.open):  # for its directory entries
        pass
    listener.open()
    with process(lambda: None) as worker:  # it has all descriptors, and looks on
        assert os.path.samestat(
            os.stat(f"/proc/{worker}/fd/{listener.descriptors()[1]}"), lock_path(path).stat()
        )
        check = (
            "import sys, pathlib\nfrom zswapd.control.listener import"
            " *\nprint(supervisor_of(pathlib.Path(sys.argv[1])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", check, str(path)], check=True, capture_output=True, text=True
        )
        assert int(done.stdout) == os.getpid()
        listener.forget()
        assert supervisor_of(path) == 0
        with pytest.raises(AlreadyRunningError):
            Listener(path).open()  # the worker serves


def test_of_two_that_adopt_the_same_one_is_refused(tmp_path: Path) -> None:
    first = Listener(tmp_path / "socket")
    first.open()
    with process(lambda: os.close(0)):  # a worker that has its descriptors
        theirs = copies(first)
        # A lock of this kind goes with the first of its process' descriptors that is closed: here
        # begins the orphan's life.
        first.forget()
        with process(lambda: Listener(tmp_path / "socket").adopt(*theirs)) as other:
            assert supervisor_of(tmp_path / "socket") == other
            with pytest.raises(AlreadyRunningError, match="supervises"):
                Listener(tmp_path / "socket").adopt(*theirs)
        second = Listener(tmp_path / "socket")
        second.adopt(*theirs)  # the other one is dead
        second.close()


def test_who_adopts_what_was_made_anew_meanwhile_is_refused(tmp_path: Path) -> None:
    first = Listener(tmp_path / "socket")
    first.open()
    theirs = copies(first)
    first.forget()
    lock_path(tmp_path / "socket").unlink()
    with (
        process(lambda: (lock_path(tmp_path / "socket").touch(), None)),
        pytest.raises(AlreadyRunningError, match="has taken over"),
    ):
        Listener(tmp_path / "socket").adopt(*theirs)
    for descriptor in theirs:
        os.close(descriptor)


def test_what_the_dead_have_open_is_seized(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = Listener(path)
    first.open()
    with process(lambda: None):  # it keeps lock and socket for as long as it likes
        first.forget()
        second = Listener(path)
        with pytest.raises(AlreadyRunningError):
            second.open()
        second.seize()
        with pytest.raises(AlreadyRunningError), Listener(path):
            pass
        second.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_seized_from_a_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with process(Listener(path).open) as supervisor:
        with pytest.raises(AlreadyRunningError):
            Listener(path).seize()
        assert supervisor_of(path) == supervisor
        assert path.is_socket()
        assert lock_path(path).exists()


def test_seizing_where_nothing_is_there_is_opening(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "socket")
    listener.seize()
    assert (tmp_path / "socket").is_socket()
    listener.close()


def test_lock_that_cannot_be_looked_at_is_an_error(tmp_path: Path) -> None:
    lock_path(tmp_path / "socket").symlink_to("elsewhere")
    with pytest.raises(ControlError, match="cannot open"):
        supervisor_of(tmp_path / "socket")
