# SPDX-License-Identifier: GPL-2.0-or-later
"""Locked segments of shared memory: found again by their file, gone with their last attachment."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TOP, capabilities
from zswapd.core.allocators import segment as segment_module
from zswapd.core.allocators.arena import Arena, punch_hole
from zswapd.core.allocators.segment import Segment

pytestmark = capabilities.requires_root()

SIZE = 1 << 20


def segments(maker: int) -> set[int]:
    """Return the numbers of the segments that a process has made: others make some meanwhile."""
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return {int(row[1]) for row in rows if int(row[4]) == maker}


def test_file_of_a_segment_is_as_any_file_in_memory() -> None:
    segment, fd = Segment.make(SIZE)
    assert os.fstat(fd).st_size == SIZE
    with mmap.mmap(fd, SIZE) as view:
        view[:SIZE] = b"x" * SIZE
        punch_hole(fd, mmap.PAGESIZE, mmap.PAGESIZE)
        assert os.lseek(fd, mmap.PAGESIZE, os.SEEK_DATA) == 2 * mmap.PAGESIZE
        assert view[mmap.PAGESIZE] == 0
    segment.close()
    os.close(fd)


def test_segment_is_found_while_it_is_attached_and_is_gone_after() -> None:
    before = segments(os.getpid())
    first, fd = Segment.make(SIZE)
    (number,) = segments(os.getpid()) - before
    second = Segment.find(fd)
    assert second is not None
    first.close()
    first.close()
    assert number in segments(os.getpid())
    del second
    gc.collect()
    assert number not in segments(os.getpid())
    assert Segment.find(fd) is None, "the file outlives it"
    os.pwrite(fd, b"still here", 0)
    os.close(fd)


def test_no_mapping_of_an_arena_is_in_a_core_dump() -> None:
    arena = Arena(64, 4096, kind="memfd")
    copy = Arena.adopt(os.dup(arena.fd))
    text = Path("/proc/self/smaps").read_text()
    flags = [
        block.split("VmFlags:")[1].split("\n")[0].split()
        for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text)
        if "/SYSV" in block.split("\n")[0]
    ]
    assert len(flags) >= 4, "each arena has a mapping and an attachment"
    assert all("dd" in each for each in flags)
    arena.close()
    copy.close()


def test_process_that_is_killed_leaves_no_segment() -> None:
    code = """if True:
        from zswapd.core.allocators.arena import Arena
        arena = Arena(64, 4096, kind="memfd")
        assert arena.is_unevictable
        print("made", flush=True)
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=TOP,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        assert len(segments(process.pid)) == 1
        process.kill()
    assert segments(process.pid) == set()


def test_other_files_have_no_segment(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert Segment.find(file.fileno()) is None
    fd = os.memfd_create("test")
    assert Segment.find(fd) is None
    os.close(fd)


def test_segment_of_another_file_under_the_same_number_is_not_attached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segment, fd = Segment.make(SIZE)
    monkeypatch.setattr(segment_module.os.path, "samestat", lambda _a, _b: False)
    attached = Path("/proc/self/maps").read_text().count("/SYSV")
    assert Segment.find(fd) is None
    assert Path("/proc/self/maps").read_text().count("/SYSV") == attached
    segment.close()
    os.close(fd)


@pytest.mark.parametrize("call", ["shmget", "shmat", "shmctl"])
def test_arena_is_a_memfd_where_the_kernel_refuses(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = segments(os.getpid())
    real = getattr(segment_module._libc, call)

    class Refusing:
        def __getattr__(self, name: str) -> object:
            return getattr(segment_module._libc_real, name)

    def refuse(number: int, command: int, *rest: object) -> int | None:
        if call == "shmctl" and command != 11:  # SHM_LOCK
            return int(real(number, command, *rest))
        return ctypes.c_void_p(-1).value if call == "shmat" else -1

    refusing = Refusing()
    setattr(refusing, call, refuse)
    monkeypatch.setattr(segment_module, "_libc_real", segment_module._libc, raising=False)
    monkeypatch.setattr(segment_module, "_libc", refusing)
    arena = Arena(64, 4096, kind="memfd")
    assert not arena.is_unevictable
    assert arena.kind == "memfd"
    arena.close()
    gc.collect()
    assert segments(os.getpid()) - before == set()
