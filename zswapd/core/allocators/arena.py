# SPDX-License-Identifier: GPL-2.0-or-later
"""The arena: one shared-memory file with every stored page and the frame table.

Why a file: its descriptor can be handed to a successor process. Holes can be punched into it, so
memory goes back to the system frame by frame. There are two kinds, the better one first:

- `tmpfs`: an unlinked file on a tmpfs mounted with `noswap` (Linux 6.4). Its pages are never
  swapped out, whether a process maps them or not. A pool that *is* the swap device needs that. The
  mount is detached (fsmount), so it has no path and vanishes with the last descriptor.
- `memfd`: for older kernels. It is the file of a locked segment (segment.py) where the kernel and
  the capabilities allow one. Else it is a memfd, whose pages are safe from swap only while a
  process keeps them mapped and locked.

Layout, version 5 (offsets in frames; F = number of frames):

    0            superblock: magic, layout version, page size, F, T, kind, label. The last byte is
                 `distrusted`, and the words before it are those of `note_renewed`.
    1 .. T       frame table, 16 bytes a frame (frametable.py defines them)
    T .. F       frames that can be handed out

The label has what a program must know to read the rest: the swap files and their sizes
(core/core.py).

Frame 0 is never handed out, so byte offset 0 means "none" everywhere. The magic is written last. A
superblock without it means that the arena's maker died. The shared state has a copy of the
superblock (handover/state.py). Without the copy, one bit that changes by itself would keep every
successor away.

The kernel knows which pages the file has (`data_runs`), so a successor need not trust a note about
it. A page that fallocate(2) has allocated and no process has touched is memory, but not data.

Limits: only `populate` asks for memory. Any other first touch of a page of the arena is a bug on
the page path: the kernel would need memory while it waits for this daemon to free memory. No
function here is called on the page path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from zswapd.core.allocators._populate import populate, punch
from zswapd.core.allocators.segment import Segment
from zswapd.errors import ArenaError
from zswapd.host.machine import EHWPOISON
from zswapd.pages import round_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LAYOUT_VERSION = 5
CHANGING_LAYOUT = 6
"""The version of an arena of an older layout while a takeover rewrites it.

Parts of it are as in 5, the others as before.
"""
READABLE_LAYOUTS = (2, 3, 5, 6)
"""The layout versions that this program can adopt.

Version 3 is 5 without marks. It has no mark in word 1 (frametable.py), 0 in the live word of a dead
object, and objects without a checksum (zpages.py). Version 2 is 3 without an ephemeral half; its
seals are those of the persistent half.
"""
TABLE_ENTRY_BYTES = 16
RENEWED_MAX = 31
"""Number of frames that the superblock has room to note (`note_renewed`)."""
PIECE_BYTES = 256 << 10
"""Bytes that `populate` populates at a time: 0.1 ms of zeroing."""
PAUSE_US = 50
"""The pause of `populate` after each piece; 0.1 ms with the kernel's timer slack.

The rate is still 1 GiB a second, six times that of swap-out.
"""
_SUPERBLOCK = struct.Struct("=8sIIQIHH")
"""Magic, layout version, page size, frames, first frame that can be handed out, kind, label length.
"""
_MAGIC = b"zswapd\0A"
_LAYOUT_WORD = 2
"""Index of the layout version, in 32-bit words."""
_KINDS = ("tmpfs", "memfd")
"""The kinds, indexed by their number in the superblock."""

_MADV_DONTDUMP, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 16, 22, 23
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
# The mount API has the same numbers on every architecture: it came after the system call tables
# were unified.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
(
    _FSOPEN_CLOEXEC,
    _FSMOUNT_CLOEXEC,
    _FSCONFIG_SET_FLAG,
    _FSCONFIG_SET_STRING,
    _FSCONFIG_CMD_CREATE,
) = (1, 1, 0, 1, 6)

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
    """Return the descriptor of an unlinked file on a detached tmpfs with `noswap`.

    Raises:
        OSError: the kernel does not support it.
    """
    context = _syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"noswap", None, 0)
        # size=0 removes tmpfs' default limit of half the memory: the pool has its own limits.
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


def open_shared_memory(kind: str) -> tuple[int, str]:
    """Return (descriptor, kind) for the requested kind: "tmpfs", "memfd" or "auto"."""
    if kind not in ("auto", "tmpfs", "memfd"):
        raise ArenaError(f"unknown kind of arena {kind!r}", hint='use "auto", "tmpfs" or "memfd"')
    if kind != "memfd":
        try:
            return _open_noswap_tmpfs(), "tmpfs"
        except OSError as error:
            if kind == "tmpfs":
                raise ArenaError(
                    f"cannot mount a tmpfs with noswap: {error.strerror}",
                    hint=('it needs Linux 6.4 and CAP_SYS_ADMIN; else set memory.arena = "memfd"'),
                ) from error
    return os.memfd_create("zswapd-arena", os.MFD_CLOEXEC), "memfd"


def _hint(error: Exception) -> str:
    """Return the hint for an arena that cannot be mapped."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "remove the limit of file sizes: ulimit -f unlimited"
    return "lower pool.limit or swap.size"


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Punch a range of a file, poisoned or not.

    Raises:
        OSError: the kernel refuses.
    """
    while _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def head_frames(frames: int, page_size: int) -> int:
    """Return the number of frames of superblock and table before `frames` others."""
    # The table has entries for itself too, so that the frame number is the index.
    return 1 + round_up((frames + frames // 128 + 8) * TABLE_ENTRY_BYTES, page_size) // page_size


def label_room(page_size: int) -> int:
    """Return the length that a label must stay below, in bytes."""
    return page_size - _SUPERBLOCK.size


class _Head(NamedTuple):
    """The fields of `_SUPERBLOCK`."""

    magic: bytes
    version: int
    page_size: int
    total_frames: int
    first_frame: int
    kind: int
    label_bytes: int


def _read_superblock(fd: int) -> tuple[_Head, bool]:
    """Return the superblock of an inherited file, and whether it is readable.

    Poisoned memory is not readable (EIO).

    Raises:
        ArenaError: the file cannot be read for another reason, or is too short.
    """
    try:
        head = os.pread(fd, _SUPERBLOCK.size, 0)
    except OSError as error:
        if error.errno != errno.EIO:
            raise ArenaError(
                f"cannot read the inherited arena: {error.strerror}",
                hint="start without an inherited arena",
            ) from error
        return _Head(b"", 0, 0, 0, 0, 0, 0), False
    if len(head) < _SUPERBLOCK.size:
        raise ArenaError(
            "the inherited file is not an arena of zswapd, or is incomplete",
            hint="start without an inherited arena",
        )
    return _Head(*_SUPERBLOCK.unpack(head)), True


def _expected(head: _Head, copy: Mapping[str, Any]) -> _Head:
    """Return the superblock that its copy asks for.

    The version may be that of a later program than the maker's, which has adopted the arena since.
    """
    version = head.version if head.version in READABLE_LAYOUTS else copy["layout"]
    kind, label = _KINDS.index(copy["kind"]), copy["label"].encode()
    return _Head(
        _MAGIC,
        version,
        copy["page_size"],
        copy["total_frames"],
        copy["first_frame"],
        kind,
        len(label),
    )


def _check_head(head: _Head, length: int) -> None:
    """Do nothing if a superblock is that of an arena in a file of `length` bytes.

    Raises:
        ArenaError: it is no arena, or has another layout or page size.
    """
    if head.magic != _MAGIC:
        raise ArenaError(
            "the inherited file is not an arena of zswapd, or is incomplete",
            hint="start without an inherited arena",
        )
    if head.version not in READABLE_LAYOUTS:
        raise ArenaError(
            f"the inherited arena has layout {head.version}, this program reads {READABLE_LAYOUTS}",
            hint="swap off with the version of zswapd that made it, then start this version",
        )
    page_size = head.page_size
    if page_size % mmap.PAGESIZE or page_size & page_size - 1 or not page_size:
        raise ArenaError(
            f"the inherited arena has pages of {page_size} bytes, this system {mmap.PAGESIZE}"
        )
    table_end = page_size + head.total_frames * TABLE_ENTRY_BYTES
    if (
        length != head.total_frames * page_size
        or not table_end <= head.first_frame * page_size < length
        or head.first_frame != head_frames(head.total_frames - head.first_frame, page_size)
        or head.kind >= len(_KINDS)
        or head.label_bytes >= page_size - _SUPERBLOCK.size
    ):
        raise ArenaError(
            "the inherited arena's superblock contradicts its file",
            hint="start without an inherited arena",
        )


class Arena:
    """One shared mapping: superblock, frame table, and `frames` frames.

    Args:
        frames: frames that can be handed out, in addition to superblock and table.
        page_size: bytes of a frame, a power of two and a multiple of the system's page.
        kind: "tmpfs", "memfd", or "auto" for the first of the two that the kernel has.
        label: bytes for the program that adopts the arena. The maker defines their meaning.

    Attributes:
        fd: descriptor of the file.
        kind: "tmpfs" or "memfd".
        label: as above.
        is_older: the layout is older than LAYOUT_VERSION, or is CHANGING_LAYOUT.
        view: the whole mapping as bytes. An allocator's handle is an offset into it.
        words32, words64: the whole mapping as machine words. An assignment to one is a single store
            that a death cannot cut short. All words that a successor reads are written this way.
            struct is not used, because it clears its place first.
        table: the frame table as 32-bit words, four a frame. table_pairs: the same as 64-bit words,
            two a frame.
        first_frame: number of the first frame that can be handed out.
        total_frames: number of all frames, superblock and table included.

    Raises:
        ArenaError: the kernel refuses the file or the mapping.
    """

    def __init__(
        self, frames: int, page_size: int, *, kind: str = "auto", label: bytes = b""
    ) -> None:
        if frames < 1:
            raise ArenaError(
                "an arena needs at least one frame",
                hint="give the pool a limit of at least one page",
            )
        if len(label) >= label_room(page_size):
            raise ArenaError(
                f"a label of {len(label)} bytes does not fit the superblock",
                hint="use fewer or shorter names",
            )
        first_frame = head_frames(frames, page_size)
        fd, kind = open_shared_memory(kind)
        length = (first_frame + frames) * page_size
        self._segment: Segment | None = None
        try:
            os.ftruncate(fd, length)
            if kind == "memfd":
                with contextlib.suppress(OSError):
                    self._segment, locked = Segment.make(length)
                    os.dup2(locked, fd, inheritable=False)
                    os.close(locked)
            self._map_file(fd, kind, page_size, first_frame, first_frame + frames, label)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise ArenaError(
                f"cannot map an arena of {frames} frames: {error}", hint=_hint(error)
            ) from error
        self.populate(0, page_size)
        self.view[_SUPERBLOCK.size : _SUPERBLOCK.size + len(label)] = label
        superblock = (
            LAYOUT_VERSION,
            page_size,
            self.total_frames,
            first_frame,
            _KINDS.index(kind),
            len(label),
        )
        _SUPERBLOCK.pack_into(self.view, 0, bytes(len(_MAGIC)), *superblock)
        self.view[: len(_MAGIC)] = _MAGIC

    @classmethod
    def adopt(cls, fd: int, copy: Mapping[str, Any] | None = None) -> Self:
        """Return the arena that another process made in the file of an inherited descriptor.

        Only the superblock is read, and only a damaged superblock is written. The owners of the
        frames find their contents. The arena owns the descriptor from then on. A superblock that
        differs from its copy or is unreadable has been damaged, and is written again.

        Args:
            fd: the file. It stays open on failure.
            copy: `description` of the maker's arena. None if the maker's program did not keep one.

        Raises:
            ArenaError: the file is no arena, has another layout or page size, or cannot be mapped.
        """
        head, is_readable = _read_superblock(fd)
        if copy is not None:
            head = _expected(head, copy)
        _check_head(head, os.fstat(fd).st_size)
        page_size = head.page_size
        self = cls.__new__(cls)
        self._segment = Segment.find(fd)
        try:
            label = (
                copy["label"].encode()
                if copy is not None
                else os.pread(fd, head.label_bytes, _SUPERBLOCK.size)
            )
            self._map_file(
                fd, _KINDS[head.kind], page_size, head.first_frame, head.total_frames, label
            )
        except (OSError, ValueError) as error:
            raise ArenaError(
                f"cannot map the inherited arena of {head.total_frames} frames: {error}"
            ) from error
        self.is_older = head.version != LAYOUT_VERSION
        if copy is not None:
            self._mend(head, is_readable=is_readable)
        return self

    def _mend(self, head: _Head, *, is_readable: bool) -> None:
        """Rewrite the superblock if it differs from the expected one."""
        if not is_readable:
            self.renew(0)
            self.distrusted = True  # the flag in it is lost, so assume the worst
        whole = _SUPERBLOCK.pack(*head) + self.label
        if self.view[: len(whole)] != whole:
            self.view[: len(whole)] = whole

    def description(self) -> dict[str, Any]:
        """Return the fields of the superblock as JSON types, for a copy elsewhere (see `adopt`)."""
        return {
            "layout": LAYOUT_VERSION,
            "page_size": self.page_size,
            "total_frames": self.total_frames,
            "first_frame": self.first_frame,
            "kind": self.kind,
            "label": self.label.decode(),
        }

    def _map_file(
        self, fd: int, kind: str, page_size: int, first_frame: int, total_frames: int, label: bytes
    ) -> None:
        """Map the whole file and set the attributes, without touching a page of it."""
        length = total_frames * page_size
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED)
        self.fd, self.kind, self.label, self.is_older = fd, kind, label, False
        self.page_size, self.first_frame, self.total_frames = page_size, first_frame, total_frames
        self.view = memoryview(self._map)
        table = self.view[page_size : page_size + total_frames * TABLE_ENTRY_BYTES]
        self.table, self.table_pairs = table.cast("I"), table.cast("Q")
        table.release()
        self.words32, self.words64 = self.view.cast("I"), self.view.cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # The arena is left out of core dumps: it has the memory of other processes.
        _libc.madvise(self._address, length, _MADV_DONTDUMP)

    @property
    def is_unevictable(self) -> bool:
        """Whether the kernel never swaps a page of it out, whatever processes have it mapped."""
        return self.kind == "tmpfs" or self._segment is not None

    def populate(self, offset: int, length: int, *, floor: int = 0, is_idle: bool = False) -> int:
        """Back a byte range with memory and map it.

        May block for seconds, with the GIL released.

        The pages of the file come first, which needs no lock of the address space. The page tables
        follow, one page for 2 MiB. In one step, populating would wait for memory under `mmap_lock`,
        and the page path could not even grow its heap meanwhile. The range is populated in pieces
        of PIECE_BYTES, so that other tasks soon get the processor back (`_populate.c` has the
        reasons).

        Args:
            offset: begin of the range in bytes.
            length: bytes of the range. Whole pages are populated.
            floor: stop before a piece if the system has fewer free bytes; 0 for no floor.
            is_idle: the thread gives way to all other tasks for 50 ms.

        Returns:
            The number of bytes populated from `offset` on. It is less than `length` only because of
            `floor`.

        Raises:
            ArenaError: no memory. The populated part of the range is unknown. To populate it again
                is harmless.
        """
        start = offset - offset % mmap.PAGESIZE
        whole = round_up(offset + length, mmap.PAGESIZE) - start
        code, done = populate(
            self.fd,
            self._address,
            start,
            whole,
            _MADV_POPULATE_WRITE,
            PIECE_BYTES,
            PAUSE_US,
            floor,
            is_idle,
        )
        if code and code != errno.EAGAIN:
            raise ArenaError(
                f"no memory for {whole} more bytes of the pool: {os.strerror(code)}",
                hint="the pool keeps its current size",
            )
        return length if done == whole else max(0, start + done - offset)

    def _fallocate(self, mode: int, offset: int, length: int) -> int:
        """Call fallocate(2) until no signal interrupts it; return 0 or the errno."""
        while _libc.fallocate(self.fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                return code
        return 0

    def begin_rewriting(self) -> None:
        """Mark the arena as being changed from an older layout to this program's.

        So older programs do not misread it.
        """
        if self.is_older:
            self.words32[_LAYOUT_WORD] = CHANGING_LAYOUT

    def end_rewriting(self) -> None:
        """Mark the arena as having this program's layout everywhere."""
        if self.is_older:
            self.words32[_LAYOUT_WORD] = LAYOUT_VERSION
            self.is_older = False

    @property
    def distrusted(self) -> bool:
        """Whether damage was found in the arena and its evidence overwritten, but not yet acted on.

        The flag is in the arena. So a death between the discovery and the action does not make the
        next process trust the rest.
        """
        return bool(self.view[self.page_size - 1])

    @distrusted.setter
    def distrusted(self, found: bool) -> None:
        # 255 for true: after the flip of one bit it is still true.
        self.view[self.page_size - 1] = 255 if found else 0
        if not found:
            for place in self._note_places():
                self.words64[place] = 0

    def _note_places(self) -> range:
        """Return the indexes of the words in which frames are noted.

        They are the last words of the superblock but one, as far as the label leaves them free.
        """
        end = self.page_size // 8 - 1
        return range(max(end - RENEWED_MAX, -(-(_SUPERBLOCK.size + len(self.label)) // 8)), end)

    def note_renewed(self, frame: int) -> None:
        """Note a frame before its memory is replaced.

        The note is in the arena for the same reason as `distrusted`, which is set. Clearing
        `distrusted` clears the notes. There are RENEWED_MAX places. A frame without a place is not
        noted. If the process then dies before the takeover ends, only the checksums can find the
        loss.
        """
        for place in self._note_places():
            if self.words64[place] in (0, frame):
                self.words64[place] = frame
                return

    def renewed_frames(self) -> list[int]:
        """Return the frames noted since `distrusted` was last cleared."""
        if not self.distrusted:
            return []
        return [frame for place in self._note_places() if (frame := self.words64[place])]

    def table_offset(self, frame: int) -> int:
        """Return the byte offset of a frame's words in the table."""
        return self.page_size + frame * TABLE_ENTRY_BYTES

    def populate_table(self, frame: int, count: int) -> None:
        """Populate the part of the frame table for `count` frames from `frame` on."""
        self.populate(self.table_offset(frame), count * TABLE_ENTRY_BYTES)

    def punch(self, offset: int, length: int) -> None:
        """Give the memory of a byte range back to the system.

        The range then reads as zeros, also if it was locked.

        Raises:
            ArenaError: the kernel refuses, which no tmpfs or memfd does.
        """
        code = self._fallocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)
        if code:
            raise ArenaError(f"cannot return {length} bytes to the system: {os.strerror(code)}")

    def punch_runs(self, runs: Sequence[tuple[int, int]]) -> int:
        """Punch runs of (first frame, frames) in one call without the GIL; stop at a failure.

        Returns:
            The number of runs punched.
        """
        size = self.page_size
        ranges = array("q")
        for first, count in runs:
            ranges.append(first * size)
            ranges.append(count * size)
        return punch(self.fd, ranges)

    def data_runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) in bytes of every stretch of touched pages between two offsets.

        The kernel finds them (SEEK_DATA), in pages of the system. No page is touched. The first and
        last stretch are cut at `begin` and `end`.
        """
        while begin < end:
            try:
                first = os.lseek(self.fd, begin, os.SEEK_DATA)
                last = os.lseek(self.fd, first, os.SEEK_HOLE) if first < end else end
            except OSError as error:
                if error.errno != errno.ENXIO:  # only holes follow
                    raise ArenaError(
                        f"cannot find the used pages of the arena's file: {error.strerror}"
                    ) from error
                return
            if first < end:
                yield first, min(last, end)
            begin = last

    def map_in(self, offset: int, length: int) -> list[int]:
        """Map pages that the file has, so that the page path meets no fault.

        May block. Reading maps the pages writable, 16 at a time, since shared memory has no dirty
        tracking. That takes half the time of populating for writing.

        Returns:
            The offsets of the system's pages with poisoned memory. Poisoned means an uncorrectable
            memory error: a process that touches the page gets SIGBUS. Linux 5.16 and later keep
            the page in the file and report it (EHWPOISON). Earlier kernels remove it, which
            leaves a hole. All other failures cost only speed and are ignored.
        """
        if (
            _libc.madvise(self._address + offset, length, _MADV_POPULATE_READ) == 0
            or ctypes.get_errno() != EHWPOISON
        ):
            return []
        if length <= mmap.PAGESIZE:
            return [offset]
        # The kernel does not say which page it is. The healthy half of each cut costs one call.
        half = round_up(length // 2, mmap.PAGESIZE)
        return self.map_in(offset, half) + self.map_in(offset + half, length - half)

    def renew(self, offset: int) -> None:
        """Replace a poisoned page of memory by a page of zeros.

        The kernel never uses the old one again. A death between the two steps leaves a hole.

        Raises:
            ArenaError: there is no memory for it.
        """
        self.punch(offset, mmap.PAGESIZE)
        self.populate(offset, mmap.PAGESIZE)

    def backed_bytes(self) -> int:
        """Return the memory that the file holds now, in bytes, as the kernel counts it."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Release views, mapping and file.

        The memory is freed if no other process holds the descriptor.
        """
        if self.fd < 0:
            return
        for view in (self.table, self.table_pairs, self.words32, self.words64, self.view):
            view.release()
        # Another object may hold a slice of the view. The mapping then ends with the slice.
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self.fd = -1
        if self._segment is not None:
            self._segment.close()
