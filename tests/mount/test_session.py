# SPDX-License-Identifier: GPL-2.0-or-later
"""Mounting and unmounting: each way to be refused and each way to end leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import TOP, capabilities
from tests.support.blockfile import MemoryFile
from tests.support.mounting import TIMEOUT, FileServer, is_mounted, loop_device, serving
from zswapd.errors import MountError, PermissionsError
from zswapd.fuse import mount
from zswapd.fuse import session as session_module
from zswapd.fuse.inodes import Directory
from zswapd.fuse.mount import Mount
from zswapd.fuse.operations import Operations
from zswapd.fuse.session import Session
from zswapd.swapdevice.state import left_on

PAGE = 4096


def session(mountpoint: Path, device: Path = Path("/dev/fuse")) -> Session:
    """A session in this process, for the refusals that come before a mount."""
    directory = Directory()
    directory.add_block_file(MemoryFile())
    return Session(Operations(directory), mountpoint, device=device)


def refusal(mountpoint: Path, device: Path = Path("/dev/fuse")) -> MountError | PermissionsError:
    """Return the error that opening a session raises; close a session that opens all the same."""
    attempt = session(mountpoint, device)
    try:
        with pytest.raises((MountError, PermissionsError)) as raised:
            attempt.open()
    finally:
        attempt.close()
    assert raised.value.hint
    return raised.value


def answer(mountpoint: Path) -> int:
    """Return the errno of a question that the kernel cannot answer by itself, 0 for none."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno or 0
    return 0


def wait_for(condition: object, what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + TIMEOUT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.01)


# Ends.


def test_sigterm_unmounts_and_removes_the_directories_that_it_made(tmp_path: Path) -> None:
    mountpoint = tmp_path / "a" / "b"
    with serving(mountpoint) as server:
        assert is_mounted(mountpoint)
        assert server.stop()["statistics"]["internal_errors"] == 0
        assert (server.exit_code, server.log) == (0, "")
        assert not is_mounted(mountpoint)
        assert list(tmp_path.iterdir()) == []


def test_directory_that_was_there_stays(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir(mode=0o750)
    with serving(mountpoint) as server:
        server.stop()
    assert mountpoint.stat().st_mode & 0o777 == 0o750
    assert list(mountpoint.iterdir()) == []


def test_mountpoint_that_is_made_is_closed_to_others(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt"):
        # The directory under the mount, seen from beside it.
        bound = tmp_path / "beside"
        bound.mkdir()
        subprocess.run(["mount", "--bind", str(tmp_path), str(bound)], check=True, timeout=TIMEOUT)
        try:
            assert (bound / "mnt").stat().st_mode & 0o777 == 0o700
        finally:
            subprocess.run(["umount", str(bound)], check=True, timeout=TIMEOUT)


def test_mountpoint_may_be_reached_through_links_and_have_odd_names(tmp_path: Path) -> None:
    real = tmp_path / "with space\tand \\ ü"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    with serving(link) as server:
        assert os.listdir(real) == ["swap", "params"]
        server.stop()
        assert server.log == ""
        assert os.listdir(real) == []
    assert link.is_symlink()


def test_unmounted_by_somebody_else_ends_the_service(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt") as server:
        subprocess.run(["umount", str(server.mountpoint)], check=True, timeout=TIMEOUT)
        server.process.wait(TIMEOUT)
        server.stop()
        assert server.exit_code == 0
        assert "was unmounted by another program" in server.log


def test_sigterm_with_the_file_open_detaches_and_says_so(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt") as server:
        descriptor = os.open(server.path, os.O_RDWR)
        try:
            server.stop()
            assert server.exit_code == 0
            assert "Device or resource busy; detached it instead" in server.log
            assert not is_mounted(server.mountpoint)
            with pytest.raises(OSError, match="Transport endpoint is not connected"):
                os.pread(descriptor, PAGE, 0)
        finally:
            with contextlib.suppress(OSError):  # closing asks a daemon that is gone
                os.close(descriptor)


def test_reader_that_is_killed_in_the_middle_costs_nothing(tmp_path: Path) -> None:
    """Its requests are interrupted, or their replies no longer wanted."""
    program = (
        "import os,sys\nf=os.open(sys.argv[1],os.O_RDONLY)\nprint(1,flush=True)\nwhile 1:"
        " os.pread(f,1<<18,0)"
    )
    with serving(tmp_path / "mnt") as server:
        for _ in range(10):
            with subprocess.Popen(
                [sys.executable, "-c", program, server.path], stdout=subprocess.PIPE
            ) as reader:
                assert reader.stdout is not None
                reader.stdout.readline()
                time.sleep(0.02)
                reader.send_signal(signal.SIGKILL)
        with server.path.open("rb") as file:
            assert file.read(5) == bytes(5)
        statistics = server.stop()["statistics"]
    assert statistics["internal_errors"] == 0
    assert statistics["reads"] > 10


# Refusals.


def test_second_daemon_on_a_mountpoint_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt") as first:
        second = FileServer(tmp_path / "mnt")
        second.stop()
        assert second.first["error"] == "MountError"
        assert "another zswapd serves" in second.first["message"]
        assert second.first["hint"]
        assert second.exit_code == MountError.exit_code
        assert first.path.stat().st_size == 1 << 20


def test_of_daemons_started_at_once_one_serves(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.support.fileserver", str(mountpoint)]
    starts = [
        subprocess.Popen(
            command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        lines = [start.stdout.readline() for start in starts if start.stdout is not None]
        assert sum('"ready"' in line for line in lines) == 1, lines
        assert sum('"MountError"' in line for line in lines) == 3, lines
    finally:
        for start in starts:
            start.terminate()
        for start in starts:
            start.communicate(timeout=TIMEOUT)
    assert not is_mounted(mountpoint)


def test_mountpoint_that_another_daemon_has_just_locked_is_refused(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        descriptor = os.open(tmp_path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert "another zswapd is starting or stopping" in str(refusal(tmp_path))


def test_mountpoint_that_is_covered_between_the_check_and_the_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def covered_first(descriptor: int, operation: int) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True, timeout=TIMEOUT)

    monkeypatch.setattr(mount.fcntl, "flock", covered_first)
    try:
        assert "a file system of type tmpfs is mounted" in str(refusal(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=TIMEOUT)


@contextlib.contextmanager
def dead(mountpoint: Path, *, looked_at: bool = False) -> Iterator[FileServer]:
    """A mount whose server was killed, for as long as the context lasts."""
    with serving(mountpoint) as server:
        if looked_at:
            mountpoint.stat()  # as a shell does; the kernel remembers the answer for an hour
        server.process.kill()
        server.process.wait(TIMEOUT)
        wait_for(lambda: answer(mountpoint) == errno.ENOTCONN, "the mount did not die")
        assert is_mounted(mountpoint)
        server.last = {"killed": True}
        yield server


@pytest.mark.parametrize(
    ("looked_at", "user"),
    [(False, "none"), (True, "none"), (True, "a directory"), (True, "a bind mount")],
)
def test_dead_mount_is_unmounted_by_the_next_start(
    tmp_path: Path, looked_at: bool, user: str, expect_log: Callable[..., None]
) -> None:
    mountpoint, bound = tmp_path / "mnt", tmp_path / "bound"
    bound.mkdir()
    with contextlib.ExitStack() as undo, dead(mountpoint, looked_at=looked_at):
        if user == "a directory":  # umount(2) finds it busy
            descriptor = os.open(mountpoint, os.O_PATH)
            undo.callback(os.close, descriptor)
        elif user == "a bind mount":
            subprocess.run(["mount", "--bind", mountpoint, bound], check=True, timeout=TIMEOUT)
            undo.callback(subprocess.run, ["umount", "--lazy", bound], check=True, timeout=TIMEOUT)
        expect_log("was the mount of a zswapd that has died: unmounted", level=logging.WARNING)
        with Mount(mountpoint):
            assert is_mounted(mountpoint)
        assert not is_mounted(mountpoint)
    with serving(mountpoint) as server:
        assert server.path.stat().st_size == 1 << 20


def test_dead_mount_with_a_loop_device_on_it_is_refused_and_the_hint_cures_it(
    tmp_path: Path, expect_log: Callable[..., None]
) -> None:
    mountpoint = tmp_path / "mnt"
    with serving(mountpoint) as server:
        command = [
            "losetup",
            "--find",
            "--show",
            "--direct-io=on",
            "--sector-size=4096",
            server.path,
        ]
        device = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=TIMEOUT
        ).stdout.strip()
        try:
            server.process.kill()
            server.process.wait(TIMEOUT)
            wait_for(lambda: answer(mountpoint) == errno.ENOTCONN, "the mount did not die")
            with pytest.raises(MountError, match=f"the data on {device} is lost") as caught:
                Mount(mountpoint, left_on=left_on).open()
            assert caught.value.hint == f"run `losetup --detach {device}`, then start zswapd again"
            assert is_mounted(mountpoint), "left as it was"
        finally:
            subprocess.run(["losetup", "--detach", device], check=True, timeout=TIMEOUT)
        wait_for(lambda: not left_on(mountpoint), "the loop device stays")
        expect_log("was the mount of a zswapd that has died: unmounted", level=logging.WARNING)
        with Mount(mountpoint, left_on=left_on):
            assert is_mounted(mountpoint)
        server.last = {"killed": True}


def test_dead_mount_of_somebody_else_is_left_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may need the mount: its daemon may start again."""
    mountpoint = tmp_path / "mnt"
    with dead(mountpoint):
        monkeypatch.setattr(mount, "_FILESYSTEM", b"fuse.other")
        error = refusal(mountpoint)
        assert "a daemon that has died, of type fuse.zswapd" in str(error)
        assert f"`umount -l {mountpoint}`" in (error.hint or "")
        assert is_mounted(mountpoint), "left as it was"


def test_device_that_cannot_be_opened_is_no_traceback(tmp_path: Path) -> None:
    """As where a cgroup does not allow the device, or nothing is behind the node."""
    device = tmp_path / "fuse"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(10, 199))
    with pytest.raises(PermissionsError, match="cannot be opened") as caught:
        Mount(tmp_path / "mnt", device=device).open()
    assert "modprobe fuse" in (caught.value.hint or "")
    assert not (tmp_path / "mnt").exists()


def test_mountpoint_of_another_file_system_is_refused(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True, timeout=TIMEOUT)
    try:
        assert "a file system of type tmpfs is mounted" in str(refusal(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=TIMEOUT)


def test_mountpoint_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert "is not a directory" in str(refusal(path))
    assert "Not a directory" in str(refusal(path / "below"))
    assert path.read_text() == "mine"


def test_mountpoint_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not empty" in str(refusal(tmp_path))
    assert os.listdir(tmp_path) == ["file"]


def test_missing_device_node_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    error = refusal(tmp_path / "mnt", device=tmp_path / "no-fuse")
    assert isinstance(error, PermissionsError)
    assert "no-fuse does not exist" in str(error)
    assert "modprobe fuse" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_device_node_that_is_none_is_refused_and_undone(tmp_path: Path) -> None:
    assert "failed: Invalid argument" in str(refusal(tmp_path / "mnt", device=Path("/dev/null")))
    assert list(tmp_path.iterdir()) == []


def test_ordinary_user_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    error = refusal(tmp_path / "mnt")
    assert isinstance(error, PermissionsError)
    assert "start zswapd as root" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not shutil.which("setpriv"), reason="setpriv is not installed; install util-linux"
)
def test_root_without_the_capability_is_refused_and_undone(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt", prefix=["setpriv", "--bounding-set=-sys_admin"]) as server:
        assert server.first["error"] == "PermissionsError"
        assert "CAP_SYS_ADMIN" in server.first["hint"]
    assert list(tmp_path.iterdir()) == []


def test_after_a_refusal_the_process_may_try_again(tmp_path: Path) -> None:
    assert "is not a directory" in str(refusal(Path("/dev/null")))
    assert "is not a directory" in str(refusal(Path("/dev/null"))), (
        "not: this process serves a mount already"
    )


def test_closing_a_session_that_was_never_opened_does_nothing(tmp_path: Path) -> None:
    never = session(tmp_path / "mnt")
    never.close()
    never.close()
    assert never.statistics().reads == 0


def test_one_session_per_process(tmp_path: Path, expect_log: Any) -> None:
    with session(tmp_path / "one") as first:
        assert is_mounted(first.mountpoint)
        assert "serves a mount already" in str(refusal(tmp_path / "two"))
    assert list(tmp_path.iterdir()) == []


async def test_terminate_before_the_first_request_ends_serve(
    tmp_path: Path, expect_log: Any
) -> None:
    with session(tmp_path / "mnt") as opened:
        with trio.fail_after(TIMEOUT):
            async with trio.open_nursery() as nursery:
                await nursery.start(opened.serve)
                opened.terminate()
    assert os.listdir(tmp_path) == []


# The hook.


def test_pyfuse3_loaded_first_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt", "--pyfuse3-first") as server:
        assert "the FUSE hook cannot be used: pyfuse3 was loaded before" in str(server.first)
    assert not is_mounted(tmp_path / "mnt")


def test_idle_session_sleeps(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt", "--poll-us", "200") as server:
        descriptor = os.open(server.path, os.O_RDWR)
        for _ in range(2000):
            os.pread(descriptor, PAGE, 0)
        os.close(descriptor)
        time.sleep(0.1)

        def processor_time() -> float:
            fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = processor_time()
        time.sleep(1)
        assert processor_time() - before <= 0.03
        statistics = server.stop()["statistics"]
    assert statistics["drained"] > 1000, (
        "taken one after the other, with few turns of the event loop between them"
    )


@contextlib.contextmanager
def on_two_processors(pid: int) -> Iterator[None]:
    """Give a server and this process two processors: on one they take turns and never wait."""
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        pytest.skip("one processor: the reader and the server take turns on it, and neither waits")
    first, second = sorted(mine)[:2]
    os.sched_setaffinity(pid, {first})
    os.sched_setaffinity(0, {second})
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def test_busy_reader_is_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt") as server:
        with on_two_processors(server.process.pid), server.path.open("rb", buffering=0) as file:
            for _ in range(5000):
                os.pread(file.fileno(), PAGE, 0)
        statistics = server.stop()["statistics"]
    # On a machine that is busy with something else, it stops waiting, as the next test asks of it.
    assert statistics["poll_hits"] > 500 or statistics["crowded_polls"] >= 1
    assert statistics["max_background"] == session_module.MAX_BACKGROUND


def test_slow_trickle_is_not_waited_for(tmp_path: Path) -> None:
    """Requests 2 ms apart: each wait would be in vain, so fewer and fewer are tried."""
    with serving(tmp_path / "mnt", "--poll-us", "200") as server:
        descriptor = os.open(server.path, os.O_RDWR)
        for _ in range(300):
            os.pread(descriptor, PAGE, 0)
            time.sleep(0.002)
        os.close(descriptor)
        statistics = server.stop()["statistics"]
    assert statistics["reads"] == 300
    assert statistics["polls"] < 30


def test_waiting_gives_way_to_another_process(tmp_path: Path) -> None:
    """Else every request would cost the server's time slice, and then the other's."""
    with serving(tmp_path / "mnt") as server, on_two_processors(server.process.pid):
        (processor,) = os.sched_getaffinity(server.process.pid)
        with subprocess.Popen(
            ["taskset", "-c", str(processor), sys.executable, "-c", "while 1: pass"]
        ) as busy:
            try:
                with server.path.open("rb", buffering=0) as file:
                    for _ in range(2000):
                        os.pread(file.fileno(), PAGE, 0)
            finally:
                busy.kill()
        statistics = server.stop()["statistics"]
    assert statistics["crowded_polls"] >= 1
    assert statistics["polls"] < 1000


def test_without_polling_it_sleeps_but_not_in_the_event_loop(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt", "--poll-us", "0") as server:
        with on_two_processors(server.process.pid), server.path.open("rb", buffering=0) as file:
            for _ in range(2000):
                os.pread(file.fileno(), PAGE, 0)
        statistics = server.stop()["statistics"]
    assert statistics["polls"] == 0
    assert statistics["nap_hits"] > 200


@pytest.mark.skipif(bool(capabilities.loop().missing), reason=capabilities.loop().missing)
def test_loop_device_offers_discard_and_passes_it_on_as_a_range(tmp_path: Path) -> None:
    with serving(tmp_path / "mnt") as server:
        with loop_device(server.path) as device:
            queue = Path("/sys/block") / device.name / "queue"
            assert int((queue / "discard_max_bytes").read_text()) > 0
            assert int((queue / "discard_granularity").read_text()) == os.sysconf("SC_PAGE_SIZE")
            assert int((queue / "logical_block_size").read_text()) == 4096
            assert (queue.parent / "loop" / "dio").read_text().strip() == "1"
            descriptor = os.open(device, os.O_RDWR)
            os.pwrite(descriptor, b"x" * 64 * PAGE, 0)
            os.fsync(descriptor)
            os.close(descriptor)
            command = [
                "blkdiscard",
                "--offset",
                str(8 * PAGE),
                "--length",
                str(32 * PAGE),
                str(device),
            ]
            subprocess.run(command, check=True, timeout=TIMEOUT)
            subprocess.run(
                ["blkdiscard", "--zeroout", "--length", str(PAGE), str(device)],
                check=True,
                timeout=TIMEOUT,
            )
        with server.path.open("rb") as file:
            assert (
                file.read(64 * PAGE)
                == bytes(PAGE) + b"x" * 7 * PAGE + bytes(32 * PAGE) + b"x" * 24 * PAGE
            )
        last = server.stop()
    assert last["discards"][0] == [8 * PAGE, 32 * PAGE]
    assert last["statistics"]["discards"] >= 1
    assert last["statistics"]["internal_errors"] == 0
