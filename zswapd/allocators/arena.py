# SPDX-License-Identifier: GPL-2.0-or-later
"""The arena: the one shared-memory file that holds every stored page and the table that describes its frames.

Why a file: its descriptor can be handed to a successor process, and holes can be punched into it, so memory goes back to the
system frame by frame. Two kinds, best first:

- `tmpfs`: an unlinked file on a tmpfs mounted with `noswap` (Linux 6.4). Its pages can never be swapped out, whoever maps them
  and whether or not anybody does, which is what a pool that *is* the swap device needs. The mount is detached (fsmount), so it
  has no path and vanishes with the last descriptor.
- `memfd`: for older kernels. The pages are safe from swap only while a process keeps them mapped and locked.

Layout, version 1 (offsets in frames; F = number of frames):

    0            superblock: magic, layout version, page size, F
    1 .. T       frame table, 16 bytes a frame (pageframes.py says what they mean)
    T .. F       frames that can be handed out

Frame 0 is never handed out, so byte offset 0 means "none" everywhere.

Limits: memory is asked for in `populate` only. Any other first touch of a page of the arena is a bug on the page path: the
kernel would have to find memory while it waits for us to free some. Nothing here is called on that path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct

from zswapd.errors import ArenaError
from zswapd.pages import round_up

LAYOUT_VERSION = 1
TABLE_ENTRY_BYTES = 16
_SUPERBLOCK = struct.Struct("<8sIIQ")
_MAGIC = b"zswapd\0A"

_MADV_POPULATE_WRITE = 23
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
# The mount API has the same numbers on every architecture (they were assigned after the tables were unified).
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC, _FSMOUNT_CLOEXEC, _FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = (
    1,
    1,
    0,
    1,
    6,
)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


def _syscall(number: int, *args: int | bytes | None) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in args]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _open_noswap_tmpfs() -> int:
    """Return the descriptor of an unlinked file on a detached tmpfs with `noswap`; OSError where the kernel has none."""
    context = _syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"noswap", None, 0)
        # size=0 lifts tmpfs' own default of half the memory: the pool has limits of its own.
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"size", b"0", 0)
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"mode", b"0700", 0)
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=mount)
    finally:
        os.close(mount)


def _open_backing(kind: str) -> tuple[int, str]:
    """Return (descriptor, kind reached) for the kind wished for: "tmpfs", "memfd" or "auto"."""
    if kind not in ("auto", "tmpfs", "memfd"):
        raise ArenaError(f"unknown kind of arena {kind!r}", hint='use "auto", "tmpfs" or "memfd"')
    if kind != "memfd":
        try:
            return _open_noswap_tmpfs(), "tmpfs"
        except OSError as error:
            if kind == "tmpfs":
                raise ArenaError(
                    f"cannot make a tmpfs with noswap: {error.strerror}",
                    hint='it needs Linux 6.4 and CAP_SYS_ADMIN; set memory.arena = "memfd" otherwise',
                ) from error
    return os.memfd_create("zswapd-arena", os.MFD_CLOEXEC), "memfd"


class Arena:
    """One shared mapping of `frames` frames behind a table that describes them.

    Args:
        frames: frames that can be handed out; superblock and table come on top.
        page_size: bytes in a frame, a power of two and a multiple of the system's page.
        kind: "tmpfs", "memfd", or "auto" for the first of the two that the kernel has.

    Attributes:
        fd: the file's descriptor.
        kind: "tmpfs" or "memfd".
        view: the whole mapping as bytes; a handle of an allocator is an offset into it.
        table: the frame table as 32-bit words, four a frame.
        first_frame: number of the first frame that can be handed out.
        total_frames: number of all frames, superblock and table included.

    Raises:
        ArenaError: the kernel gives neither file nor mapping.
    """

    def __init__(self, frames: int, page_size: int, *, kind: str = "auto") -> None:
        if frames < 1:
            raise ArenaError("an arena of no frames was asked for", hint="give the pool a limit of at least one page")
        self.page_size = page_size
        # The table describes itself as well: indexing by frame number then needs no subtraction.
        table_frames = round_up((frames + frames // 128 + 8) * TABLE_ENTRY_BYTES, page_size) // page_size
        self.first_frame = 1 + table_frames
        self.total_frames = self.first_frame + frames
        self.fd, self.kind = _open_backing(kind)
        length = self.total_frames * page_size
        try:
            os.ftruncate(self.fd, length)
            self._map = mmap.mmap(self.fd, length, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            os.close(self.fd)
            raise ArenaError(f"cannot map an arena of {length} bytes: {error}", hint="lower pool.limit or swap.size") from error
        self.view = memoryview(self._map)
        self.table = self.view[page_size : page_size + self.total_frames * TABLE_ENTRY_BYTES].cast("I")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.populate(0, page_size)
        _SUPERBLOCK.pack_into(self.view, 0, _MAGIC, LAYOUT_VERSION, page_size, self.total_frames)

    def populate(self, offset: int, length: int) -> None:
        """Make the kernel back a byte range with memory, and map it. May block for long, with the GIL released.

        First the file's pages, which needs no lock of the address space, then the page tables (one page for 2 MiB). Populating
        in one step would wait for memory under `mmap_lock`, and the page path could not even grow its heap meanwhile.

        Raises:
            ArenaError: no memory; nothing can be said about how much of the range is backed, populating again is harmless.
        """
        start = offset - offset % mmap.PAGESIZE
        length = round_up(offset + length, mmap.PAGESIZE) - start
        code = self._fallocate(0, start, length)
        if not code and _libc.madvise(self._address + start, length, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            # Before Linux 5.14 there is no such advice; the pages are there, only their first touch faults.
            code = 0 if code == errno.EINVAL else code
        if code:
            raise ArenaError(
                f"no memory for {length} more bytes of the pool: {os.strerror(code)}",
                hint="the pool stays as large as it is",
            )

    def _fallocate(self, mode: int, offset: int, length: int) -> int:
        """Call fallocate(2) until no signal interrupts it; return 0 or the errno."""
        while _libc.fallocate(self.fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                return code
        return 0

    def populate_table(self, frame: int, count: int) -> None:
        """Populate the part of the frame table that describes `count` frames from `frame` on."""
        self.populate(self.page_size + frame * TABLE_ENTRY_BYTES, count * TABLE_ENTRY_BYTES)

    def punch(self, offset: int, length: int) -> None:
        """Give the memory of a byte range back to the system; it reads as zeros afterwards, also when it was locked.

        Raises:
            ArenaError: the kernel refuses, which no tmpfs or memfd does.
        """
        code = self._fallocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)
        if code:
            raise ArenaError(f"cannot give {length} bytes back: {os.strerror(code)}")

    def backed_bytes(self) -> int:
        """Return how much memory the file holds now, in bytes, as the kernel counts it."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Let go of views, mapping and file; the memory is gone if no other process holds the descriptor."""
        if self.fd < 0:
            return
        self.table.release()
        self.view.release()
        # Somebody may still hold a slice; the mapping then ends with it.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self.fd = -1
