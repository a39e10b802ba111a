# SPDX-License-Identifier: GPL-2.0-or-later
"""Locked segments of shared memory: found again by their file, gone with their last attachment."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TOP
from zswapd.core.allocators import segment as segment_module
from zswapd.core.allocators.arena import Arena, punch_hole
from zswapd.core.allocators.segment import Segment

SIZE = 1 << 20


def segments() -> set[int]:
    """Return the numbers of all segments of this machine."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {int(line.split()[1]) for line in lines}


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
    before = segments()
    first, fd = Segment.make(SIZE)
    (number,) = segments() - before
    second = Segment.find(fd)
    assert second is not None
    first.close()
    first.close()
    assert number in segments()
    del second
    gc.collect()
    assert number not in segments()
    assert Segment.find(fd) is None, "the file outlives it"
    os.pwrite(fd, b"still here", 0)
    os.close(fd)


def test_process_that_is_killed_leaves_no_segment() -> None:
    before = segments()
    code = """if True:
        import os
        from zswapd.core.allocators.arena import Arena
        arena = Arena(64, 4096, kind="memfd")
        assert arena.is_unevictable
        os.kill(os.getpid(), 9)
    """
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=False, timeout=30)
    assert segments() - before == set()


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
    before = segments()
    real = getattr(segment_module._libc, call)

    class Refusing:
        def __getattr__(self, name: str) -> object:
            return getattr(segment_module._libc_real, name)

    def refuse(number: int, command: int, *rest: object) -> int:
        if call == "shmctl" and command != 11:  # SHM_LOCK
            return int(real(number, command, *rest))
        return -1

    refusing = Refusing()
    setattr(refusing, call, refuse)
    monkeypatch.setattr(segment_module, "_libc_real", segment_module._libc, raising=False)
    monkeypatch.setattr(segment_module, "_libc", refusing)
    arena = Arena(64, 4096, kind="memfd")
    assert not arena.is_unevictable
    assert arena.kind == "memfd"
    arena.close()
    gc.collect()
    assert segments() - before == set()
