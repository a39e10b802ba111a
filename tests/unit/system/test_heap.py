# SPDX-License-Identifier: GPL-2.0-or-later
"""A forked process takes the pages that it shares, and no others, and all that are in swap."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TOP
from zswapd.system import heap

PAGE = mmap.PAGESIZE


class FakeLibc:
    """A libc whose madvise notes its calls."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[int, int, int]] = []

    def madvise(self, start: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
        self.calls.append((start.value or 0, size.value, advice))
        return self.code


def as_libc(fake: FakeLibc) -> ctypes.CDLL:
    return fake  # type: ignore[return-value]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A process with six private pages: unused, present, swapped, swapped, present, unused."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/maps").write_text(
        "00001000-00007000 rw-p 00000000 00:00 0\n"
        "00007000-00008000 rw-s 00000000 00:01 7 /memfd:arena (deleted)\n"
        "00008000-0000a000 rw-p 00000000 00:00 0 [heap]\n"
    )
    present, swapped = 1 << 63 | 5, 1 << 62 | 1 << 55
    entries = [0, 0, present, swapped, swapped, present, 0, present, 0, 1 << 55]
    (tmp_path / "proc/self/pagemap").write_bytes(
        b"".join(entry.to_bytes(8, sys.byteorder) for entry in entries)
    )
    return tmp_path


def test_pages_in_use_are_copied(root: Path) -> None:
    libc = FakeLibc()
    assert heap.own_memory(as_libc(libc), root) == 4 * PAGE
    assert libc.calls == [(0x2000, 4 * PAGE, 23)]


def test_pages_in_swap_are_read(root: Path) -> None:
    libc = FakeLibc()
    assert heap.swap_in(as_libc(libc), root) == 2 * PAGE
    assert libc.calls == [(0x3000, 2 * PAGE, 22)]


def test_without_a_pagemap_all_private_pages_are_copied_and_none_is_read(root: Path) -> None:
    (root / "proc/self/pagemap").unlink()
    libc = FakeLibc()
    assert heap.own_memory(as_libc(libc), root) == 8 * PAGE
    libc.calls.clear()
    assert heap.swap_in(as_libc(libc), root) == 0
    assert libc.calls == []


def test_old_kernel_says_so(root: Path) -> None:
    assert heap.own_memory(as_libc(FakeLibc(-1)), root) == -1
    assert heap.swap_in(as_libc(FakeLibc(-1)), root) == -1


def test_shared_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert heap.shared_bytes(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/smaps_rollup").write_text("Rss: 9 kB\nShared_Dirty:      120 kB\n")
    assert heap.shared_bytes(tmp_path) == 120 << 10
    assert "Shared_Dirty:" in Path("/proc/self/smaps_rollup").read_text()


def test_copy_takes_what_is_shared_and_leaves_stacks_of_threads_untouched() -> None:
    code = """if True:
        import ctypes, mmap, os, threading
        from zswapd.system import heap
        def kib(name):
            lines = open("/proc/self/smaps_rollup").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
        shared = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE)
        shared[:] = b"x" * len(shared)
        if not os.fork():
            for _ in range(8):
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            libc = ctypes.CDLL(None)
            before, was_shared = kib("Anonymous"), kib("Shared_Dirty")
            copied = heap.own_memory(libc)
            print(was_shared >> 10, kib("Shared_Dirty"), kib("Anonymous") - before, flush=True)
            assert copied >> 10 >= before - 1024
            os._exit(0)
        os.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    was_shared_mib, shared_kib, more_kib = map(int, done.stdout.split())
    assert was_shared_mib >= 8
    assert shared_kib < 256
    assert more_kib < 1024
