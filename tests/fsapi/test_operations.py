# SPDX-License-Identifier: GPL-2.0-or-later
"""The handlers, called as pyfuse3 and the hook call them, without a mount."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from tests.support.blockfile import BUG_PAGE, DAMAGED_PAGE, FROZEN_PAGE, FULL_PAGE, PAGE, MemoryFile
from tests.support.textfile import SettingFile
from zswapd.errors import CorruptedPageError, InvariantError
from zswapd.fuse import failures
from zswapd.fuse import operations as operations_module
from zswapd.fuse.inodes import ROOT_INODE, Directory
from zswapd.fuse.operations import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    Operations,
)
from zswapd.fuse.texts import inode_of

SIZE = 200 * PAGE
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO_KEEP = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
CTX: Any = None


@pytest.fixture
def file() -> MemoryFile:
    return MemoryFile(size=SIZE, faulty=True, faults_inside=True)


@pytest.fixture
def ops(file: MemoryFile) -> Operations:
    directory = Directory()
    assert directory.add_block_file(file) == SWAP
    return Operations(directory, page_size=PAGE)


SWAP = ROOT_INODE + 1
MISSING = 77


def read(ops: Operations, offset: int, size: int) -> bytes | int:
    out = bytearray(b"\xee" * size)
    n = ops.serve_read(SWAP, offset, memoryview(out))
    if n >= 0:
        assert out[n:] == b"\xee" * (size - n), "nothing may be written behind what was read"
        return bytes(out[:n])
    return n


# Data.


@pytest.mark.parametrize(
    "offset",
    [(DAMAGED_PAGE - 2) * PAGE, (DAMAGED_PAGE - 2) * PAGE + 1, (DAMAGED_PAGE - 7) * PAGE - 5],
)
@pytest.mark.parametrize("takes_part", [True, False])
def test_read_ends_in_front_of_a_page_that_cannot_be_read(
    file: MemoryFile, offset: int, takes_part: bool, expect_log: Callable[..., None]
) -> None:
    expect_log("page 101 does not match its checksum", level=logging.ERROR)
    directory = Directory()
    directory.add_block_file(file)
    ops = Operations(directory, page_size=PAGE, takes_part=lambda: takes_part)
    file.data[:] = os.urandom(SIZE)
    length = 16 * PAGE
    front = bytes(file.data[offset : DAMAGED_PAGE * PAGE])
    assert read(ops, offset, length) == (front if takes_part else -errno.EIO)
    assert ops.statistics().failed_requests == (0 if takes_part else 1)
    assert read(ops, DAMAGED_PAGE * PAGE, length) == -errno.EIO
    behind = (DAMAGED_PAGE + 1) * PAGE
    assert read(ops, behind, length) == bytes(file.data[behind : behind + length])


@pytest.mark.parametrize("front", [3, 7])
def test_write_with_a_refused_page_is_refused_as_a_whole(
    ops: Operations, file: MemoryFile, front: int
) -> None:
    """To the loop device, any number of bytes is a write that is done."""
    assert (
        ops.serve_write(SWAP, (FULL_PAGE - front) * PAGE, memoryview(b"x" * 8 * PAGE))
        == -errno.ENOSPC
    )


def test_bug_in_the_middle_of_a_read_is_no_part_of_an_answer(
    ops: Operations, expect_log: Callable[..., None]
) -> None:
    expect_log("internal error", level=logging.ERROR)
    error = InvariantError("a bug")
    error.filled = PAGE

    def fails(_offset: int, _out: memoryview) -> None:
        raise error

    ops.directory.block_files[SWAP].read_into = fails  # type: ignore[method-assign]
    assert read(ops, 0, 2 * PAGE) == -errno.EIO


def test_write_then_read_gives_the_same_bytes(ops: Operations) -> None:
    data = os.urandom(3 * PAGE + 5)
    assert ops.serve_write(SWAP, 123, memoryview(data)) == len(data)
    assert read(ops, 123, len(data)) == data
    assert read(ops, 0, 123) == bytes(123)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, 0, 0),
        (SIZE - PAGE, PAGE, PAGE),
        (SIZE - 1, 1, 1),
        (SIZE - 1, 2, 1),
        (SIZE - 100, PAGE, 100),
        (SIZE, 1, 0),
        (SIZE, PAGE, 0),
        (SIZE + 1, PAGE, 0),
        (2**62, PAGE, 0),
    ],
)
def test_read_at_the_end_is_short(ops: Operations, offset: int, size: int, expected: int) -> None:
    assert read(ops, offset, size) == bytes(expected)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (SIZE - PAGE, PAGE, PAGE),
        (SIZE - 1, 2, 1),
        (SIZE - 100, PAGE, 100),
        (SIZE, 1, -errno.ENOSPC),
        (SIZE + PAGE, PAGE, -errno.ENOSPC),
        (2**62, PAGE, -errno.ENOSPC),
    ],
)
def test_write_at_the_end_is_short_or_has_no_space(
    ops: Operations, file: MemoryFile, offset: int, size: int, expected: int
) -> None:
    assert ops.serve_write(SWAP, offset, memoryview(b"x" * size)) == expected
    assert file.data.count(b"x") == max(expected, 0)


@pytest.mark.parametrize("mode", [PUNCH, FALLOC_FL_ZERO_RANGE, ZERO_KEEP])
def test_fallocate_that_discards_reaches_the_file_as_one_range(
    ops: Operations, file: MemoryFile, mode: int
) -> None:
    file.data[:] = b"x" * SIZE
    assert ops.serve_fallocate(SWAP, mode, 5, 50 * PAGE) == 0
    assert file.discards == [(5, 50 * PAGE)]
    assert file.data.count(b"x") == SIZE - 50 * PAGE


def test_fallocate_over_the_end_is_clipped_or_refused(ops: Operations, file: MemoryFile) -> None:
    for mode in (PUNCH, ZERO_KEEP):
        assert ops.serve_fallocate(SWAP, mode, SIZE - PAGE, 2**62) == 0
    assert file.discards == [(SIZE - PAGE, PAGE)] * 2
    assert ops.serve_fallocate(SWAP, FALLOC_FL_ZERO_RANGE, SIZE - PAGE, PAGE + 1) == -errno.EINVAL
    assert len(file.discards) == 2


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, -1), (-1, 5), (SIZE, 1), (SIZE + PAGE, PAGE)]
)
@pytest.mark.parametrize("mode", [PUNCH, FALLOC_FL_ZERO_RANGE, ZERO_KEEP])
def test_fallocate_of_no_range_is_invalid(
    ops: Operations, file: MemoryFile, mode: int, offset: int, length: int
) -> None:
    assert ops.serve_fallocate(SWAP, mode, offset, length) == -errno.EINVAL
    assert not file.discards


@pytest.mark.parametrize(
    "mode", [0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, 0x08, 0x20, 0x40, PUNCH | 0x10]
)
def test_fallocate_of_another_mode_is_not_supported(
    ops: Operations, file: MemoryFile, mode: int
) -> None:
    assert ops.serve_fallocate(SWAP, mode, 0, PAGE) == -errno.EOPNOTSUPP
    assert not file.discards


@pytest.mark.parametrize(
    ("page", "expected"), [(FULL_PAGE, errno.ENOSPC), (FROZEN_PAGE, errno.EIO)]
)
async def test_refused_write_gets_the_errno_of_its_reason(
    ops: Operations, page: int, expected: int
) -> None:
    assert ops.serve_write(SWAP, page * PAGE, memoryview(bytes(PAGE))) == -expected
    assert ops.statistics().refused_writes == 1
    assert ops.statistics().internal_errors == 0


async def test_coroutines_serve_no_block_file(ops: Operations) -> None:
    """The hook answers its requests, whatever they are."""
    for request in (ops.write(SWAP, 0, b"x"), ops.read(SWAP, 0, 10)):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await request
        assert raised.value.errno == errno.EISDIR


def test_requests_across_the_end_are_short(ops: Operations) -> None:
    assert ops.serve_write(SWAP, SIZE - 3, memoryview(b"abcdef")) == 3
    assert read(ops, SIZE - 4, 10) == b"\0abc"
    assert read(ops, SIZE, 10) == b""
    assert ops.serve_write(SWAP, SIZE, memoryview(b"x")) == -errno.ENOSPC


# The directory.


async def test_lookup_finds_the_file_the_root_and_nothing_else(ops: Operations) -> None:
    entry = await ops.lookup(ROOT_INODE, b"swap", CTX)
    assert (entry.st_ino, entry.st_mode, entry.st_size) == (SWAP, stat.S_IFREG | 0o600, SIZE)
    assert (entry.st_uid, entry.st_gid, entry.st_nlink) == (0, 0, 1)
    for name in (b".", b".."):
        root = await ops.lookup(ROOT_INODE, name, CTX)
        assert (root.st_ino, root.st_mode) == (ROOT_INODE, stat.S_IFDIR | 0o700)
    for parent, name in (
        (ROOT_INODE, b"other"),
        (SWAP, b"swap"),
        (MISSING, b".."),
        (MISSING, b"."),
    ):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await ops.lookup(parent, name, CTX)
        assert raised.value.errno == errno.ENOENT


async def test_getattr_of_root_and_of_an_unknown_inode(ops: Operations) -> None:
    root = await ops.getattr(ROOT_INODE, CTX)
    assert (root.st_mode, root.st_nlink) == (stat.S_IFDIR | 0o700, 2)
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await ops.getattr(MISSING, CTX)
    assert raised.value.errno == errno.ESTALE


async def test_readdir_lists_each_file_once_however_small_the_buffer(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a"):
        ops.directory.add_block_file(MemoryFile(name))
    listed: list[tuple[bytes, int]] = []
    room = 0

    def reply(
        token: object, name: bytes, attributes: pyfuse3.EntryAttributes, next_id: int
    ) -> bool:
        nonlocal room
        if not room:
            return False
        room -= 1
        listed.append((name, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    handle = await ops.opendir(ROOT_INODE, CTX)
    for _ in range(4):
        room = 1
        await ops.readdir(handle, listed[-1][1] if listed else 0, CTX)
    await ops.releasedir(handle)
    assert [name for name, _ in listed] == [b"swap", b"b", b"a"]


async def test_open_is_direct_and_only_for_files(ops: Operations) -> None:
    info = await ops.open(SWAP, os.O_RDWR, CTX)
    assert (inode_of(info.fh), info.direct_io, info.keep_cache) == (SWAP, True, False)
    assert (await ops.open(SWAP, os.O_RDONLY, CTX)).fh == SWAP
    await ops.flush(info.fh)
    await ops.fsync(info.fh, True)
    await ops.fsyncdir(ROOT_INODE, False)
    await ops.release(info.fh)
    await ops.forget([(SWAP, 1)])
    cases = [(ops.open(SWAP, os.O_RDWR | os.O_TRUNC, CTX), errno.EPERM)]
    cases += [
        (ops.open(ROOT_INODE, os.O_RDONLY, CTX), errno.EISDIR),
        (ops.open(MISSING, 0, CTX), errno.ENOENT),
    ]
    cases += [(ops.opendir(SWAP, CTX), errno.ENOTDIR), (ops.opendir(MISSING, CTX), errno.ENOENT)]
    for coroutine, expected in cases:
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await coroutine
        assert raised.value.errno == expected


async def test_statfs_reports_pages_for_the_loop_driver_and_nothing_that_can_be_full(
    ops: Operations,
) -> None:
    data = await ops.statfs(CTX)
    assert (data.f_bsize, data.f_frsize, data.f_namemax) == (PAGE, PAGE, 255)
    assert (data.f_blocks, data.f_bfree, data.f_bavail) == (0, 0, 0)
    assert (data.f_files, data.f_ffree, data.f_favail) == (0, 0, 0)


def change(**wanted: int) -> tuple[Any, Any]:
    """The attributes and the field flags of a setattr request."""
    attributes = pyfuse3.EntryAttributes()
    names = ("size", "mode", "uid", "gid", "atime", "mtime", "ctime")
    fields = SimpleNamespace(**{f"update_{name}": name in wanted for name in names})
    for name, value in wanted.items():
        setattr(attributes, f"st_{name}_ns" if name.endswith("time") else f"st_{name}", value)
    return attributes, fields


@pytest.mark.parametrize(
    "wanted",
    [
        {"size": SIZE},
        {"size": SIZE, "mtime": 5, "ctime": 5},  # ftruncate
        {"mode": stat.S_IFREG | 0o600},
        {"uid": 0, "gid": 0},
        {},
    ],
)
async def test_setattr_that_changes_nothing_succeeds(
    ops: Operations, wanted: dict[str, int]
) -> None:
    entry = await ops.setattr(SWAP, *change(**wanted), None, CTX)
    assert (entry.st_size, entry.st_mode) == (SIZE, stat.S_IFREG | 0o600)


@pytest.mark.parametrize(
    "wanted",
    [
        {"size": 0},
        {"size": SIZE - 1},
        {"size": SIZE + PAGE},
        {"mode": stat.S_IFREG | 0o644},
        {"mode": stat.S_IFREG | 0o4600},
        {"uid": 1},
        {"gid": 1},
        {"atime": 5},
        {"mtime": 5},
        {"ctime": 5},
        {"size": SIZE, "mode": stat.S_IFREG | 0o644},
    ],
)
async def test_setattr_that_changes_something_is_not_permitted(
    ops: Operations, wanted: dict[str, int]
) -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await ops.setattr(SWAP, *change(**wanted), SWAP, CTX)
    assert raised.value.errno == errno.EPERM
    assert (await ops.getattr(SWAP, CTX)).st_size == SIZE


async def test_directory_changes_are_not_permitted(ops: Operations) -> None:
    attempts = [
        ops.create(ROOT_INODE, b"new", 0o600, os.O_RDWR, CTX),
        ops.mknod(ROOT_INODE, b"new", stat.S_IFREG, 0, CTX),
        ops.mkdir(ROOT_INODE, b"new", 0o700, CTX),
        ops.symlink(ROOT_INODE, b"new", b"swap", CTX),
        ops.link(SWAP, ROOT_INODE, b"new", CTX),
        ops.rename(ROOT_INODE, b"swap", ROOT_INODE, b"new", 0, CTX),
        ops.unlink(ROOT_INODE, b"swap", CTX),
        ops.rmdir(ROOT_INODE, b"swap", CTX),
    ]
    for attempt in attempts:
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await attempt
        assert raised.value.errno == errno.EPERM
    assert len(ops.directory) == 2


async def test_xattrs_poll_and_access_are_left_to_the_kernel(ops: Operations) -> None:
    """ENOSYS makes it stop asking; to the caller it becomes EOPNOTSUPP (tests/mount)."""
    attempts: list[Any] = [
        ops.getxattr(SWAP, b"user.x", CTX),
        ops.setxattr(SWAP, b"user.x", b"1", CTX),
        ops.listxattr(SWAP, CTX),
        ops.removexattr(SWAP, b"user.x", CTX),
        ops.access(SWAP, os.R_OK, CTX),
    ]
    for attempt in attempts:
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await attempt
        assert raised.value.errno == errno.ENOSYS


async def test_readlink_is_invalid(ops: Operations) -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await ops.readlink(SWAP, CTX)
    assert raised.value.errno == errno.EINVAL


# Text files.


def knob(ops: Operations, *, writable: bool = True) -> tuple[SettingFile, int]:
    """Put a knob into a directory; return it and its inode."""
    text = SettingFile(writable=writable)
    return text, ops.directory.add_text_file(ops.directory.add_directory("params"), "knob", text)


async def test_text_is_made_at_open_and_read_in_pieces(ops: Operations) -> None:
    text, inode = knob(ops)
    first, second = [(await ops.open(inode, os.O_RDONLY, CTX)) for _ in range(2)]
    assert (first.direct_io, first.keep_cache) == (True, False)
    assert first.fh != second.fh
    assert [await ops.read(first.fh, off, 4) for off in (0, 4, 8, 12)] == [
        b"0 re",
        b"ad 1",
        b"\n",
        b"",
    ]
    assert await ops.read(second.fh, 0, 100) == b"0 read 2\n"
    assert text.reads == 2
    entry = await ops.getattr(inode, CTX)
    assert (entry.st_mode, entry.st_size) == (stat.S_IFREG | 0o600, 0)
    assert (await ops.getattr(ROOT_INODE, CTX)).st_nlink == 3


async def test_text_takes_what_is_written_or_says_why_not(ops: Operations, expect_log: Any) -> None:
    expect_log("write failed: b'seven' is no number", level=logging.ERROR)
    text, inode = knob(ops)
    await ops.setattr(inode, *change(size=0, mtime=5, ctime=5), None, CTX)  # `>` of a shell
    info = await ops.open(inode, os.O_WRONLY | os.O_TRUNC, CTX)
    assert text.reads == 0
    assert await ops.write(info.fh, 0, b"7\n") == 2
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await ops.write(info.fh, 2, b"seven")
    assert raised.value.errno == errno.EINVAL
    assert text.value == 7
    await settle()


async def test_text_that_cannot_be_written_is_not_opened_for_it(ops: Operations) -> None:
    text, inode = knob(ops, writable=False)
    assert (await ops.getattr(inode, CTX)).st_mode == stat.S_IFREG | 0o400
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await ops.open(inode, flags, CTX)
        assert raised.value.errno == errno.EACCES
    assert text.reads == 0


async def test_text_opened_in_another_worker_is_read_from_its_start_or_not_at_all(
    ops: Operations,
) -> None:
    text, inode = knob(ops)
    handle = (await ops.open(inode, os.O_RDONLY, CTX)).fh
    successor = Operations(ops.directory, page_size=PAGE)
    assert await successor.read(handle, 20, 10) == b"", "all was read before: this is the end"
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await successor.read(handle, 3, 10)
    assert raised.value.errno == errno.EIO
    assert await successor.read(handle, 0, 3) == b"0 r"
    reads = text.reads
    assert await successor.read(handle, 3, 10) == b"ead %d\n" % reads
    await successor.release(handle)
    assert await successor.write(handle, 0, b"3") == 1
    assert text.value == 3


async def test_directories_have_no_data(ops: Operations) -> None:
    stats = ops.directory.add_directory("stats")
    for attempt in (
        ops.read(stats, 0, 10),
        ops.write(stats, 0, b"x"),
        ops.open(stats, os.O_RDONLY, CTX),
    ):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await attempt
        assert raised.value.errno == errno.EISDIR
    assert await ops.opendir(stats, CTX) == stats


# Cached files.


class Cached:
    """A cached file that remembers what it was asked."""

    size, mtime_ns, attribute_s = 3 * PAGE + 5, 10**18 + 7, 0.5

    def __init__(self, *, writable: bool = True) -> None:
        self.writable = writable
        self.asked: list[Any] = []

    async def refresh(self) -> None:
        """Note it."""
        self.asked.append("refresh")

    async def opened(self) -> None:
        """Note it."""
        self.asked.append("opened")

    def closed(self) -> None:
        """Note it."""
        self.asked.append("closed")

    async def read(self, offset: int, size: int) -> bytes:
        """Note it."""
        self.asked.append((offset, size))
        return b"data"

    async def write(self, offset: int, data: bytes) -> int:
        """Take two bytes."""
        self.asked.append((offset, data))
        return 2

    async def sync(self) -> None:
        """Note it."""
        self.asked.append("sync")


def cached(ops: Operations, *, writable: bool = True) -> tuple[Cached, int, int]:
    """Put a cached file into a directory; return it, its inode and that of the directory."""
    file, parent = Cached(writable=writable), ops.directory.add_directory("cache")
    ops.directory.add_cached_file(parent, "disk", 1 << 41, file)
    return file, 1 << 41, parent


async def test_cached_file_goes_through_the_page_cache_and_tells_what_it_knows(
    ops: Operations,
) -> None:
    file, inode, parent = cached(ops)
    info = await ops.open(inode, os.O_RDWR, CTX)
    assert (info.direct_io, info.keep_cache) == (False, True)
    assert await ops.read(info.fh, 7, 100) == b"data"
    assert await ops.write(info.fh, 9, b"abc") == 2
    await ops.fsync(info.fh, True)
    entry = await ops.lookup(parent, b"disk", CTX)
    assert (entry.st_ino, entry.st_size, entry.st_mtime_ns) == (inode, Cached.size, Cached.mtime_ns)
    assert (entry.attr_timeout, entry.entry_timeout, entry.st_mode & 0o777) == (0.5, 0.5, 0o600)
    await ops.getattr(inode, CTX)
    await ops.flush(info.fh)
    await ops.release(info.fh)
    assert file.asked == ["opened", (7, 100), (9, b"abc"), "sync", "refresh", "refresh", "closed"]
    for attributes in (change(size=5), change(mode=0o644)):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await ops.setattr(inode, *attributes, None, CTX)
        assert raised.value.errno == errno.EPERM


async def test_read_only_cached_file_is_not_opened_for_writing(ops: Operations) -> None:
    file, inode, _parent = cached(ops, writable=False)
    assert (await ops.getattr(inode, CTX)).st_mode & 0o777 == 0o400
    for flags, expected in (
        (os.O_RDWR, errno.EROFS),
        (os.O_WRONLY, errno.EROFS),
        (os.O_RDONLY | os.O_TRUNC, errno.EPERM),
    ):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await ops.open(inode, flags, CTX)
        assert raised.value.errno == expected
    assert "opened" not in file.asked


async def test_removed_cached_file_is_stale_for_whoever_has_it_open(ops: Operations) -> None:
    file, inode, parent = cached(ops)
    ops.directory.remove(inode)
    assert not ops.directory.entries(parent)
    # Nothing is known of the data that was written, so fsync must not say that it is durable.
    for attempt in (
        ops.read(inode, 0, 10),
        ops.write(inode, 0, b"x"),
        ops.getattr(inode, CTX),
        ops.fsync(inode, False),
    ):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await attempt
        assert raised.value.errno == errno.ESTALE
    await ops.release(inode)
    assert not file.asked


# Failures.


async def settle() -> None:
    """Let what waits for the next turn of the event loop happen."""
    await trio.testing.wait_all_tasks_blocked()


async def test_bug_in_a_function_is_eio_counted_and_logged_with_its_traceback(
    ops: Operations, caplog: pytest.LogCaptureFixture, expect_log: Any
) -> None:
    expect_log(r"internal error in serve_read, answered with EIO", level=logging.ERROR)
    assert read(ops, BUG_PAGE * PAGE, PAGE) == -errno.EIO
    assert ops.statistics().internal_errors == 1
    assert not caplog.records, "formatted on the page path"
    await settle()
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[0] is RuntimeError


async def test_failure_with_a_name_gets_its_errno_and_no_traceback(
    ops: Operations, caplog: pytest.LogCaptureFixture, expect_log: Any
) -> None:
    expect_log(r"serve_read failed: page 101 does not match", level=logging.ERROR)
    assert read(ops, DAMAGED_PAGE * PAGE, PAGE) == -CorruptedPageError.errno_
    await settle()
    assert caplog.records[0].exc_info is None
    assert (ops.statistics().failed_requests, ops.statistics().internal_errors) == (1, 0)


class GivenUp(BaseException):
    """What a worker does that cannot go on: nothing comes after it."""


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), MemoryError("none left"), InvariantError("a list is wrong")]
)
@pytest.mark.parametrize("call", ["read", "write", "fallocate"])
def test_whoever_can_be_succeeded_gives_up_when_the_core_is_broken_instead_of_answering(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    told: list[str] = []

    def give_up(handler: str, broken: Exception) -> None:
        told.append(f"{handler}: {failures.way_of(broken)}")
        raise GivenUp

    def fails(*_: Any) -> None:
        raise error

    ops.failures.when_broken = give_up
    for name in ("read_into", "write", "discard"):
        monkeypatch.setattr(ops.directory.block_files[SWAP], name, fails)
    requests: dict[str, Any] = {
        "read": lambda: ops.serve_read(SWAP, 0, memoryview(bytearray(PAGE))),
        "write": lambda: ops.serve_write(SWAP, 0, memoryview(bytes(PAGE))),
        "fallocate": lambda: ops.serve_fallocate(SWAP, PUNCH, 0, PAGE),
    }
    with pytest.raises(GivenUp):
        requests[call]()
    assert told[0].startswith(f"serve_{call}: {type(error).__name__}: {error} (test_operations.py:")
    assert " fails < operations.py:" in told[0]


async def test_failure_with_a_name_breaks_nothing(ops: Operations, expect_log: Any) -> None:
    expect_log(r"serve_read failed: page 101 does not match", level=logging.ERROR)
    ops.failures.when_broken = lambda handler, error: pytest.fail(f"{handler}: {error}")
    assert read(ops, DAMAGED_PAGE * PAGE, PAGE) == -CorruptedPageError.errno_
    await settle()


async def test_list_that_is_wrong_is_a_bug(
    ops: Operations, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    def fails(*_: Any) -> None:
        raise InvariantError("a list is wrong")

    expect_log(r"internal error in serve_read, answered with EIO", level=logging.ERROR)
    monkeypatch.setattr(ops.directory.block_files[SWAP], "read_into", fails)
    assert read(ops, 0, PAGE) == -errno.EIO
    assert (ops.statistics().failed_requests, ops.statistics().internal_errors) == (0, 1)
    await settle()


@pytest.mark.parametrize("call", ["write", "fallocate"])
async def test_bug_in_any_function_of_the_page_path_is_eio(
    ops: Operations, call: str, expect_log: Any
) -> None:
    expect_log(rf"internal error in serve_{call}", level=logging.ERROR)
    if call == "write":
        assert ops.serve_write(SWAP, BUG_PAGE * PAGE, memoryview(bytes(PAGE))) == -errno.EIO
    else:
        assert ops.serve_fallocate(SWAP, PUNCH, BUG_PAGE * PAGE, PAGE) == -errno.EIO
    await settle()


def test_unknown_inode_on_the_page_path_is_eio_even_without_an_event_loop(
    ops: Operations, expect_log: Any
) -> None:
    expect_log(r"internal error in serve_read", level=logging.ERROR)
    assert ops.serve_read(MISSING, 0, memoryview(bytearray(PAGE))) == -errno.EIO


async def test_many_failures_are_counted_but_logged_once_a_second(
    ops: Operations,
    caplog: pytest.LogCaptureFixture,
    expect_log: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_log(r"internal error", level=logging.ERROR, count=2)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(failures.time, "monotonic", lambda: clock.now)
    for _ in range(50):
        assert read(ops, BUG_PAGE * PAGE, PAGE) == -errno.EIO
        clock.now += 0.001
    clock.now += 1
    read(ops, BUG_PAGE * PAGE, PAGE)
    await settle()
    assert ops.statistics().internal_errors == 51
    assert "(49 more since the last report)" in caplog.records[1].getMessage()


async def test_bug_in_a_coroutine_is_eio_counted_and_logged(
    ops: Operations, expect_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log(r"internal error in getattr", level=logging.ERROR)
    monkeypatch.setattr(ops.directory, "node", lambda inode: 1 // 0)
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await ops.getattr(SWAP, CTX)
    assert raised.value.errno == errno.EIO
    assert ops.statistics().internal_errors == 1
    await settle()


async def test_cancellation_passes_through(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    @operations_module.answering
    async def slow(self: Operations) -> None:
        await trio.sleep_forever()

    with trio.move_on_after(0.01) as scope:
        await slow(ops)
    assert scope.cancelled_caught
    assert ops.statistics().internal_errors == 0


def test_keyboard_interrupt_is_not_taken_for_a_bug(
    ops: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(offset: int, out: memoryview) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops.directory.block_files[SWAP], "read_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ops.serve_read(SWAP, 0, memoryview(bytearray(PAGE)))
    assert ops.statistics().internal_errors == 0


def test_init_tells_who_waits_for_it(ops: Operations) -> None:
    ops.init()
    calls: list[int] = []
    ops.on_init = lambda: calls.append(1)
    ops.init()
    assert calls == [1]


async def test_block_files_cannot_be_opened_while_the_daemon_closes(ops: Operations) -> None:
    first = await ops.open(SWAP, os.O_RDWR, CTX)
    assert ops.writers.is_any_open()
    ops.is_closing = True
    for flags in (os.O_RDONLY, os.O_RDWR):
        assert await errno_of_open(ops, flags) == errno.EBUSY
    assert ops.serve_read(SWAP, 0, memoryview(bytearray(PAGE))) == PAGE  # an open file is served
    await ops.release(first.fh)
    await ops.release(first.fh)
    assert not ops.writers.is_any_open()
    ops.is_closing = False
    await ops.open(SWAP, os.O_RDONLY, CTX)


# One open file at a time may change a block file.


async def errno_of_open(ops: Operations, flags: int) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await ops.open(SWAP, flags, CTX)
    return int(caught.value.errno)


@pytest.mark.parametrize("first", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_DIRECT])
@pytest.mark.parametrize(
    "second", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_ACCMODE]
)
async def test_second_writer_is_refused_until_the_first_has_closed(
    ops: Operations, autojump_clock: trio.testing.MockClock, first: int, second: int
) -> None:
    one = await ops.open(SWAP, first, CTX)
    assert await errno_of_open(ops, second) == errno.ETXTBSY
    await ops.release((await ops.open(SWAP, os.O_RDONLY, CTX)).fh)
    await ops.flush(one.fh)  # of a copy of the descriptor: the loop device's stays
    assert await errno_of_open(ops, second) == errno.ETXTBSY
    assert ops.statistics().refused_writers == 2
    await ops.release(one.fh)
    other = await ops.open(SWAP, second, CTX)
    assert other.fh != one.fh
    await ops.release(one.fh)  # once more, as a request that was sent again: it is not the other's
    assert await errno_of_open(ops, first) == errno.ETXTBSY


async def test_open_for_writing_waits_for_a_close_that_is_under_way(
    ops: Operations, autojump_clock: trio.testing.MockClock
) -> None:
    one = await ops.open(SWAP, os.O_RDWR, CTX)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ops.open, SWAP, os.O_RDWR, CTX)
        await trio.sleep(operations_module.CLOSING_S / 2)
        await ops.release(one.fh)
    assert ops.statistics().refused_writers == 0
    assert ops.writers.is_any_open()


async def test_daemon_that_closes_meanwhile_refuses_who_waits(
    ops: Operations, autojump_clock: trio.testing.MockClock
) -> None:
    await ops.open(SWAP, os.O_RDWR, CTX)
    async with trio.open_nursery() as nursery:

        async def close() -> None:
            await trio.sleep(operations_module.CLOSING_S / 2)
            ops.is_closing = True

        nursery.start_soon(close)
        assert await errno_of_open(ops, os.O_RDWR) == errno.EBUSY


async def test_changes_through_another_handle_are_refused(ops: Operations) -> None:
    info = await ops.open(SWAP, os.O_RDWR, CTX)
    assert ops.admit(SWAP, info.fh) == 0
    assert ops.admit(SWAP, SWAP) == ops.admit(SWAP, info.fh + (1 << 42)) == -errno.ETXTBSY
    assert ops.statistics().refused_writers == 2
