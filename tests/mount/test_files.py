# SPDX-License-Identifier: GPL-2.0-or-later
"""What programs see of the mounted file, through the kernel."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.blockfile import BUG_PAGE, DAMAGED_PAGE, FROZEN_PAGE, FULL_PAGE, PAGE
from tests.support.mounting import (
    ALLOCATORS,
    COLLAPSE_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    FileServer,
    fallocate,
    serving,
)

SIZE = 1 << 20
NOBODY = 65534
over_all_allocators = pytest.mark.parametrize("server", ["memory", *ALLOCATORS], indirect=True)


def errno_of(call: Callable[..., object], *args: object) -> int:
    """The errno that a call fails with; 0 if it does not."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.fixture
def fd(server: FileServer) -> Iterator[int]:
    descriptor = os.open(server.path, os.O_RDWR)
    yield descriptor
    with contextlib.suppress(OSError):  # the test may have stopped the server
        os.close(descriptor)


@over_all_allocators
def test_any_byte_range_reads_back_as_written(fd: int) -> None:
    rng = random.Random(1)
    model = bytearray(SIZE)
    for _ in range(300):
        length = rng.choice((1, 511, PAGE, 3 * PAGE, 40 * PAGE, rng.randrange(1, SIZE // 4)))
        # Pages 100 to 103 are faulty: stay below.
        offset = rng.randrange(0, BUG_PAGE * PAGE)
        length = min(length, BUG_PAGE * PAGE - offset)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model[offset : offset + length] = data
        else:
            assert os.pread(fd, length, offset) == model[offset : offset + length]
    assert os.pread(fd, BUG_PAGE * PAGE, 0) == model[: BUG_PAGE * PAGE]


@over_all_allocators
def test_o_direct_works_with_aligned_buffers(server: FileServer) -> None:
    descriptor = os.open(server.path, os.O_RDWR | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, 64 * PAGE)
        buffer[:] = os.urandom(64 * PAGE)
        expected = bytes(buffer)
        assert os.pwritev(descriptor, [buffer], 8 * PAGE) == 64 * PAGE
        buffer[:] = bytes(64 * PAGE)
        assert os.preadv(descriptor, [buffer], 8 * PAGE) == 64 * PAGE
        assert bytes(buffer) == expected
    finally:
        os.close(descriptor)


@over_all_allocators
def test_nothing_is_kept_in_the_page_cache(server: FileServer, fd: int) -> None:
    """A second reader sees what the first one wrote at once, and each read reaches the daemon."""
    other = os.open(server.path, os.O_RDONLY)
    try:
        for i in range(5):
            os.pwrite(fd, bytes([i]) * PAGE, 0)
            assert os.pread(other, PAGE, 0) == bytes([i]) * PAGE
    finally:
        os.close(other)
    assert server.stop()["statistics"]["reads"] == 5


def test_requests_as_long_as_the_kernel_makes_them(server: FileServer) -> None:
    """A megabyte comes in one request, from several threads at once."""
    expected = {}
    with ThreadPoolExecutor(4) as threads:
        descriptor = os.open(server.path, os.O_RDWR)
        data = os.urandom(BUG_PAGE * PAGE)
        assert os.pwrite(descriptor, data, 0) == len(data)
        for i in range(64):
            offset = i * PAGE
            expected[threads.submit(os.pread, descriptor, 36 * PAGE, offset)] = data[
                offset : offset + 36 * PAGE
            ]
        for future, part in expected.items():
            assert future.result() == part
        os.close(descriptor)
    statistics = server.stop()["statistics"]
    assert (statistics["writes"], statistics["reads"]) == (1, 64)
    assert statistics["drained"] > 0


@over_all_allocators
def test_ends_are_those_of_a_block_device(fd: int) -> None:
    assert os.pread(fd, 100, SIZE) == b""
    assert os.pread(fd, 100, SIZE - 10) == bytes(10)
    assert os.pread(fd, 100, SIZE + PAGE) == b""
    assert os.pwrite(fd, b"x" * 100, SIZE - 10) == 10
    assert errno_of(os.pwrite, fd, b"x", SIZE) == errno.ENOSPC
    assert errno_of(os.pwrite, fd, b"x" * PAGE, SIZE + PAGE) == errno.ENOSPC
    assert os.fstat(fd).st_size == SIZE


def test_stat_and_statfs(server: FileServer) -> None:
    status = server.path.stat()
    assert stat.S_ISREG(status.st_mode)
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_size) == (0o600, 0, SIZE)
    assert stat.S_IMODE(server.mountpoint.stat().st_mode) == 0o700
    assert os.listdir(server.mountpoint) == ["swap", "params"]
    answer = os.statvfs(server.path)
    assert (answer.f_bsize, answer.f_blocks, answer.f_bfree) == (mmap.PAGESIZE, 0, 0)
    assert (answer.f_files, answer.f_ffree) == (0, 0)


def test_df_does_not_say_that_the_mount_is_full(server: FileServer) -> None:
    for inodes in ((), ("--inodes",)):
        said = subprocess.run(
            ["df", *inodes, server.mountpoint], capture_output=True, text=True, check=True
        ).stdout
        assert said.splitlines()[-1].split()[-2] == "-", said


def test_size_cannot_be_changed(server: FileServer, fd: int) -> None:
    assert errno_of(os.ftruncate, fd, SIZE) == 0
    assert errno_of(os.truncate, server.path, SIZE) == 0
    for size in (0, SIZE - 1, SIZE + 1):
        assert errno_of(os.ftruncate, fd, size) == errno.EPERM
    assert errno_of(os.open, server.path, os.O_RDWR | os.O_TRUNC) == errno.EPERM
    assert server.path.stat().st_size == SIZE


def test_names_and_attributes_cannot_be_changed(server: FileServer) -> None:
    path, new = server.path, server.mountpoint / "new"
    attempts: list[tuple[object, ...]] = [
        (os.rename, path, new),
        (os.unlink, path),
        (os.link, path, new),
        (os.symlink, "swap", new),
        (os.mkdir, new),
        (os.mknod, new),
        (os.mkfifo, new),
        (os.open, new, os.O_CREAT | os.O_RDWR),
        (os.chmod, path, 0o644),
        (os.chown, path, 1, 1),
        (os.utime, path),
        (os.utime, path, (5, 5)),
    ]
    for call, *args in attempts:
        assert errno_of(call, *args) == errno.EPERM, (call, args)  # type: ignore[arg-type]
    assert errno_of(os.stat, new) == errno.ENOENT
    assert errno_of(os.unlink, new) == errno.ENOENT
    assert errno_of(os.rmdir, path) == errno.ENOTDIR
    assert errno_of(os.readlink, path) == errno.EINVAL
    for call, *args in [
        (os.getxattr, path, "user.x"),
        (os.setxattr, path, "user.x", b"1"),
        (os.listxattr, path),
    ]:
        assert errno_of(call, *args) in {
            errno.EOPNOTSUPP,
            0 if call is os.listxattr else errno.EOPNOTSUPP,
        }, call
    assert os.listdir(server.mountpoint) == ["swap", "params"]


def test_existing_file_opens_with_o_creat(server: FileServer) -> None:
    os.close(os.open(server.path, os.O_CREAT | os.O_RDWR))
    assert errno_of(os.open, server.path, os.O_CREAT | os.O_EXCL) == errno.EEXIST


def test_sync_is_answered(fd: int) -> None:
    os.pwrite(fd, b"x", 0)
    os.fsync(fd)
    os.fdatasync(fd)


def test_hole_and_zero_range_reach_the_file_as_ranges(server: FileServer) -> None:
    descriptor = os.open(server.path, os.O_RDWR)
    try:
        os.pwrite(descriptor, b"x" * BUG_PAGE * PAGE, 0)
        assert fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 2 * PAGE, 50 * PAGE) == 0
        assert fallocate(descriptor, ZERO_RANGE, 5, 10) == 0
        assert fallocate(descriptor, ZERO_RANGE | KEEP_SIZE, SIZE - PAGE, 2 * PAGE) == 0
        assert os.pread(descriptor, 54 * PAGE, 0) == (
            b"x" * 5 + bytes(10) + b"x" * (2 * PAGE - 15) + bytes(50 * PAGE) + b"x" * 2 * PAGE
        )
        assert fallocate(descriptor, ZERO_RANGE, SIZE - PAGE, 2 * PAGE) == errno.EINVAL
        assert fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, SIZE, PAGE) == errno.EINVAL
        assert fallocate(descriptor, 0, 0, PAGE) == errno.EOPNOTSUPP
        assert fallocate(descriptor, COLLAPSE_RANGE, 0, PAGE) == errno.EOPNOTSUPP
        assert os.fstat(descriptor).st_size == SIZE
    finally:
        os.close(descriptor)
    assert server.stop()["discards"] == [[2 * PAGE, 50 * PAGE], [5, 10], [SIZE - PAGE, PAGE]]


def test_refusals_and_damage_reach_the_program_as_errnos(server: FileServer, fd: int) -> None:
    page = bytes(PAGE)
    assert errno_of(os.pwrite, fd, page, FULL_PAGE * PAGE) == errno.ENOSPC
    assert errno_of(os.pwrite, fd, page, FROZEN_PAGE * PAGE) == errno.EIO
    assert errno_of(os.pread, fd, PAGE, DAMAGED_PAGE * PAGE) == errno.EIO
    statistics = server.stop()["statistics"]
    assert (statistics["refused_writes"], statistics["failed_requests"]) == (2, 1)
    assert statistics["internal_errors"] == 0


def test_bug_in_the_daemon_costs_one_request_and_not_the_daemon(
    server: FileServer, fd: int
) -> None:
    for _ in range(20):
        assert errno_of(os.pread, fd, PAGE, BUG_PAGE * PAGE) == errno.EIO
    assert errno_of(os.pwrite, fd, b"x", BUG_PAGE * PAGE) == errno.EIO
    assert os.pwrite(fd, b"alive", 0) == 5
    assert os.pread(fd, 5, 0) == b"alive"
    statistics = server.stop()["statistics"]
    assert statistics["internal_errors"] == 21
    assert server.log.count("Traceback") == 1, "one a second"
    assert "RuntimeError: a bug, on purpose" in server.log


def test_other_users_are_locked_out() -> None:
    # Not below pytest's own directory, which other users may not enter to begin with.
    with tempfile.TemporaryDirectory(prefix="zswapd-test-mount-") as directory:
        Path(directory).chmod(0o755)
        with serving(Path(directory) / "mnt") as server:
            for arguments in (
                ["stat", server.mountpoint],
                ["stat", server.path],
                ["ls", server.mountpoint],
            ):
                result = subprocess.run(
                    arguments,
                    user=NOBODY,
                    group=NOBODY,
                    extra_groups=[],
                    capture_output=True,
                    text=True,
                    check=False,
                    env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
                )
                assert result.returncode != 0, arguments
                assert "Permission denied" in result.stderr
            assert server.path.stat().st_size == SIZE


def test_text_files_are_read_and_written_as_a_shell_does(server: FileServer) -> None:
    params = server.mountpoint / "params"
    assert sorted(entry.name for entry in params.iterdir()) == ["fixed", "knob"]
    assert (params / "knob").read_bytes() == b"0 read 1\n"
    subprocess.run(
        ["sh", "-c", 'echo 42 > "$1" && cat "$1" "$1"', "sh", params / "knob"],
        check=True,
        timeout=30,
    )
    assert (params / "knob").read_bytes() == b"42 read 4\n", "one content an open"
    assert stat.S_IMODE((params / "fixed").stat().st_mode) == 0o400
    assert errno_of((params / "knob").write_bytes, b"no number") == errno.EINVAL
    assert errno_of((params / "fixed").write_bytes, b"1") == errno.EACCES
    assert errno_of((params / "new").write_bytes, b"1") == errno.EPERM
    assert errno_of((params / "knob").unlink) == errno.EPERM
    assert params.stat().st_nlink == 2
    assert server.mountpoint.stat().st_nlink == 3
