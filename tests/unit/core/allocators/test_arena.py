# SPDX-License-Identifier: GPL-2.0-or-later
"""The arena: memory is asked for and given back only where the code says so."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from zswapd.core.allocators import arena as arena_module
from zswapd.core.allocators.arena import TABLE_ENTRY_BYTES, Arena
from zswapd.errors import ArenaError

KINDS = ("memfd", "tmpfs")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Both kinds, where the kernel has them."""
    name: str = request.param
    if name == "tmpfs":
        try:
            Arena(1, 4096, kind="tmpfs").close()
        except ArenaError as error:
            pytest.skip(str(error))
    return name


@pytest.fixture
def arena(kind: str, page_size: int) -> Iterator[Arena]:
    made = Arena(64, page_size, kind=kind)
    yield made
    made.close()


def test_new_arena_holds_nothing_but_its_superblock(arena: Arena) -> None:
    assert arena.backed_bytes() <= max(arena.page_size, mmap.PAGESIZE)
    assert arena.kind in KINDS


def test_populate_backs_exactly_what_is_asked(arena: Arena) -> None:
    before = arena.backed_bytes()
    arena.populate(arena.first_frame * arena.page_size, 3 * arena.page_size)
    assert arena.backed_bytes() - before == 3 * arena.page_size


def test_populate_twice_keeps_the_data(arena: Arena) -> None:
    offset = arena.first_frame * arena.page_size
    arena.populate(offset, arena.page_size)
    arena.view[offset : offset + 5] = b"hello"
    backed = arena.backed_bytes()
    arena.populate(offset, arena.page_size)
    assert bytes(arena.view[offset : offset + 5]) == b"hello"
    assert arena.backed_bytes() == backed


def test_populated_memory_is_touched_without_a_fault(arena: Arena) -> None:
    offset = arena.first_frame * arena.page_size
    length = 32 * arena.page_size
    arena.populate(offset, length)
    import resource

    # Once unmeasured: the loop's own code and ints may fault.
    for at in (0, 0, *range(offset, offset + length, mmap.PAGESIZE)):
        if at == 0:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            continue
        arena.view[at] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults <= 2


def test_punch_gives_the_memory_back_and_reads_as_zeros(arena: Arena) -> None:
    offset = arena.first_frame * arena.page_size
    arena.populate(offset, 4 * arena.page_size)
    arena.view[offset : offset + 4 * arena.page_size] = b"x" * (4 * arena.page_size)
    before = arena.backed_bytes()
    arena.punch(offset + arena.page_size, 2 * arena.page_size)
    assert before - arena.backed_bytes() == 2 * arena.page_size
    page = arena.page_size
    assert (
        bytes(arena.view[offset : offset + 4 * page]) == b"x" * page + bytes(2 * page) + b"x" * page
    )


@pytest.mark.parametrize("frames", [1, 2, 63, 64, 255, 256, 257, 1000, 4096, 65_537, 1 << 20])
def test_table_describes_every_frame(frames: int, page_size: int) -> None:
    arena = Arena(frames, page_size, kind="memfd")
    try:
        assert arena.total_frames - arena.first_frame == frames
        assert len(arena.table) == arena.total_frames * TABLE_ENTRY_BYTES // 4
        table_end = page_size + arena.total_frames * TABLE_ENTRY_BYTES
        assert table_end <= arena.first_frame * page_size, "the table reaches into the frames"
        assert os.fstat(arena.fd).st_size == len(arena.view) == arena.total_frames * page_size
    finally:
        arena.close()


def test_descriptor_is_not_inherited_by_programs(arena: Arena) -> None:
    assert not os.get_inheritable(arena.fd)


def test_close_frees_the_memory_even_while_a_slice_is_held(kind: str) -> None:
    arena = Arena(4, 4096, kind=kind)
    held = arena.view[:16]
    fd = arena.fd
    arena.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert arena.fd < 0
    arena.close()  # a second time does nothing
    held.release()


def test_arena_of_no_frames_is_refused() -> None:
    with pytest.raises(ArenaError) as caught:
        Arena(0, 4096)
    assert caught.value.hint


def test_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ArenaError, match='"memfd"'):
        Arena(1, 4096, kind="disc")


def test_too_large_an_arena_is_refused_and_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ArenaError) as caught:
        Arena(1 << 40, 65536, kind="memfd")
    assert caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_noswap_tmpfs_is_had_where_the_kernel_has_it() -> None:
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if os.geteuid() != 0 or release < (6, 4):
        pytest.skip("needs root and Linux 6.4")
    arena = Arena(1, 4096)
    assert arena.kind == "tmpfs"
    assert os.fstat(arena.fd).st_nlink == 0, "it has a name"
    arena.close()


def test_close_unmaps(kind: str) -> None:
    arena = Arena(16, 4096, kind=kind)
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        len(arena._map)


def test_auto_falls_back_to_memfd_where_there_is_no_noswap(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(arena_module, "_open_noswap_tmpfs", refuse)
    arena = Arena(1, 4096)
    assert arena.kind == "memfd"
    arena.close()
    with pytest.raises(ArenaError, match="memfd"):
        Arena(1, 4096, kind="tmpfs")


def test_no_memory_is_an_arena_error_with_the_amount(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena_module, "populate", lambda *_: (errno.ENOMEM, 0))
    monkeypatch.setattr(Arena, "_fallocate", lambda *_: errno.ENOMEM)
    with pytest.raises(ArenaError, match=f"{2 * arena.page_size} more bytes"):
        arena.populate(arena.first_frame * arena.page_size, 2 * arena.page_size)
    with pytest.raises(ArenaError):
        arena.punch(arena.first_frame * arena.page_size, arena.page_size)


class _FakeLibc:
    """libc with calls that fail: each entry is the errno of one call, 0 for the real thing."""

    def __init__(self, **script: list[int]) -> None:
        self._script = script
        self._real = arena_module._libc

    def __getattr__(self, name: str) -> object:
        real = getattr(self._real, name)

        def call(*args: object) -> int:
            code = self._script[name].pop(0) if self._script.get(name) else 0
            if code:
                ctypes.set_errno(code)
                return -1
            return int(real(*args))

        return call


def test_interrupted_punch_is_repeated(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    arena.populate(arena.first_frame * arena.page_size, arena.page_size)
    monkeypatch.setattr(arena_module, "_libc", _FakeLibc(fallocate=[errno.EINTR, errno.EINTR]))
    before = arena.backed_bytes()
    arena.punch(arena.first_frame * arena.page_size, arena.page_size)
    assert before - arena.backed_bytes() == arena.page_size


def test_kernel_without_the_mount_calls_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_libc", _FakeLibc(syscall=[errno.ENOSYS]))
    arena = Arena(1, 4096)
    assert arena.kind == "memfd"
    arena.close()


@pytest.mark.parametrize("failing", range(1, 6))
def test_tmpfs_that_fails_half_way_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a tmpfs needs root")
    before = len(os.listdir("/proc/self/fd"))
    script = [0] * failing + [errno.EINVAL]
    monkeypatch.setattr(arena_module, "_libc", _FakeLibc(syscall=script))
    with pytest.raises(ArenaError, match="noswap"):
        Arena(1, 4096, kind="tmpfs")
    assert len(os.listdir("/proc/self/fd")) == before
