# SPDX-License-Identifier: GPL-2.0-or-later
"""The shared state: one small shared file that outlives a worker, beside the arena.

The supervisor and every worker map it.

    page 0     The superblock, then 64-bit words (`Word`): signs of life, phase, counts of workers.
    slots      Two slots for a JSON document (`save`, `load`): settings changed at run time,
               freezes, counters.
    geometry   A JSON document: page size, swap files, mountpoint. A successor with another geometry
               is refused. It is written again when a swap file comes or goes (roster.py). A second
               copy follows at half of GEOMETRY_BYTES. The copy of the superblock is at the end.
    hook       The survivor page and the request buffer of fuse/_lowlevel.c, which explains them.
    lost       One bit for each page of every swap file: its overwrite was refused
               (core/block/device.py).
    areas      Further memory by name (`area`): a second copy of the bits above; the marks of
               recompression; the key, the claims and the slot maps of a disk behind the pool.
    extension  Memory that a worker has added at run time, from the next page on: marks of
               recompression (`extend`), or the bits of swap files that came later (`add_range`).

All of it is populated when it is made, so the page path never faults on it. One process at a time
writes words: the worker, or the supervisor while there is no worker.

A document is written to the older slot, with checksum and serial number last. A writer that dies
before that leaves the other document as the valid one.

Damage can be a flipped bit, a word that becomes zero, or a poisoned page (an uncorrectable memory
error, which kills each process that touches the page). `renew` replaces poisoned pages by other
memory. Data with a second copy, in another page, is restored from it. docs/coherency.md says what
readers of the other data do. A file of an older program has no second copies, and is used as it is.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64_intdigest

from zswapd.core.allocators.arena import open_shared_memory, punch_hole
from zswapd.errors import ArenaError, HandoverError
from zswapd.host.installation import restart_daemon
from zswapd.host.machine import EHWPOISON
from zswapd.pages import round_up

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

log = logging.getLogger(__name__)

LAYOUT_VERSION = 1
"""Layout of this file. A program refuses an unknown layout before a worker is stopped."""
LAYOUT_WITH_ZSTD = 2
"""The same layout, for an arena with pages that only programs with zstd can read."""
LAYOUT_WITH_FILES = 4
"""The same layout with zstd, and swap files that were added, removed or resized (roster.py).

One flipped bit makes none of these numbers from another.
"""
READABLE_LAYOUTS = (LAYOUT_VERSION, LAYOUT_WITH_ZSTD, LAYOUT_WITH_FILES)
SLOT_BYTES = 256 << 10
"""Longest document, including its header of 24 bytes."""
GEOMETRY_BYTES = 64 << 10

_SUPERBLOCK = struct.Struct("=8sIIQQQ")
MAGIC = b"zswapd\0H"
"""The first bytes of the file."""
_SLOT = struct.Struct("=QQQ")
_COPY = struct.Struct("=40sQ")
"""The copy of the superblock and its checksum, at the end of the geometry."""
_WORDS = 256  # offset of the words in page 0
_MADV_POPULATE_WRITE = 23


class Word(enum.IntEnum):
    """The words of page 0."""

    TICKS = 0
    """Number of the worker's signs of life: beats while it serves, stretches of a takeover."""
    PHASE = 1
    """The `Phase` of the worker."""
    UPGRADE = 2
    """UPGRADE_WANTED if the installed program has passed its check and is to take over; else 0."""
    STARTED = 3
    """Number of workers forked since the file was made."""
    DEATHS = 4
    """Number of workers that died: they ended without being told to."""
    BROKEN = 5
    """Number of these workers that ended themselves, because an error left them inconsistent."""
    STOPS_REFUSED = 6
    """Number of stops that workers have refused, for example because memory was too small."""
    WORKER = 7
    """Process id of the worker; 0 before the first one."""
    WORKER_BORN = 8
    """Start time of that process in kernel ticks. It tells the worker from a later process."""
    FILE_FUSE = 9
    """Number of the open file in the supervisor and its workers, plus 1; 0 for no file.

    The words below have the other files, in the order of resources.NAMES.
    """
    FILE_ARENA = 10
    FILE_STATE = 11
    FILE_SOCKET = 12
    FILE_LOCK = 13
    FILE_BACKING = 14
    BEGUN = 15
    """Time at which the supervisor began to make this worker, in ns of CLOCK_MONOTONIC."""
    WORKER_CHECK = 16
    """Checksum of WORKER and WORKER_BORN; 0 if an older program has written them."""
    FILES_CHECK = 17
    """Checksum of the words from FILE_FUSE to FILE_BACKING; 0 likewise."""
    SPARE_SHARED = 18
    """Bytes of private memory that the last spare shared with the supervisor when it was ready."""


IDENTITY = (Word.WORKER, Word.WORKER_BORN)
FILES = tuple(Word(place) for place in range(Word.FILE_FUSE, Word.FILE_BACKING + 1))
_CHECKED = {Word.WORKER_CHECK: IDENTITY, Word.FILES_CHECK: FILES}
UPGRADE_WANTED = 0x65_64_61_72_67_70_75
"""The value of UPGRADE when an upgrade is wanted. A few flipped bits do not make it from 0."""


class HookWord(enum.IntEnum):
    """The first words of the hook's survivor page; `struct survivor` in _lowlevel.c."""

    REQUESTS = 0
    ACTIVE = 1
    OPCODE = 2
    OFFSET = 3
    POISON = 4
    POISONED = 5
    INIT_SIZE = 6


RESENT = 1 << 63
"""Bit in the kernel's number of a request that is sent again (RESENT in _lowlevel.c)."""


class Phase(enum.IntEnum):
    """The phase of a worker."""

    STARTING = 0
    """The worker builds or rebuilds its parts, and does not serve yet."""
    SERVING = 1
    STOPPING = 2
    """All swap files are swapped off. The worker ends by itself, and the daemon with it."""


def hook_bytes(max_io: int) -> int:
    """Return the bytes of shared memory that the hook needs for requests of `max_io` bytes."""
    return 2 * mmap.PAGESIZE + max_io


class SharedState:
    """The mapped file of the shared state.

    Args:
        fd: the descriptor, which then belongs to this object.

    Attributes:
        fd: the descriptor.
        geometry: the document that says what is served, as it was when this object was made.
        hook: the hook's part, page-aligned.
        words: 64-bit words, by `Word`.
        hook_words: 64-bit words, by `HookWord`.
        extension: the memory that a worker has added at run time; empty if there is none.
        renewed: number of poisoned pages that were replaced.

    Raises:
        HandoverError: the file is no shared state, or has another layout.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            length = os.fstat(fd).st_size
            if length < mmap.PAGESIZE:
                raise HandoverError("the shared state of the running daemon is too short to be one")
            self._map = mmap.mmap(fd, length, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            raise HandoverError(
                f"the shared state of the running daemon cannot be mapped: {error}"
            ) from error
        view = memoryview(self._map)
        self._view = view
        self.renewed = self.renew()
        magic, version, page, hook_at, lost_at, end = self._mended_superblock()
        if magic != MAGIC or end > length or page != mmap.PAGESIZE:
            raise HandoverError(
                "the shared state of the running daemon is none that this program knows"
            )
        if version not in READABLE_LAYOUTS:
            raise HandoverError(
                f"the running daemon's shared state has layout {version}, this program knows"
                f" {READABLE_LAYOUTS}",
                hint="install a version that knows it, or swap off and restart",
            )
        # Requests carry the contents of pages, which must not be in a core dump.
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._layout_word = view[8:12].cast("I")
        self.words = view[_WORDS : _WORDS + 8 * len(Word)].cast("Q")
        self.hook = view[hook_at:lost_at]
        self.hook_words = self.hook[: 8 * len(HookWord)].cast("Q")
        self._slots = (
            view[page : page + SLOT_BYTES],
            view[page + SLOT_BYTES : page + 2 * SLOT_BYTES],
        )
        self._geometry = view[page + 2 * SLOT_BYTES : page + 2 * SLOT_BYTES + GEOMETRY_BYTES]
        document = self._read_geometry()
        if document is None:
            raise HandoverError(
                "the shared state of the running daemon does not say what it serves"
            )
        self.geometry = document
        sizes = [*document["lost"].values(), *document.get("areas", {}).values()]
        made_at = round_up(page + 2 * SLOT_BYTES + GEOMETRY_BYTES, page)
        if (
            hook_at != made_at
            or end != lost_at + sum(round_up(size, 8) for size in sizes)
            or round_up(end, page) > length
        ):
            raise HandoverError(
                "the shared state of the running daemon contradicts itself",
                hint="swap off and restart",
            )
        self._mend()
        self._map_areas(lost_at, end)

    def _map_areas(self, lost_at: int, end: int) -> None:
        """Find the bitmaps of lost pages at `lost_at`, the areas behind them, and the extension."""
        view, page = self._view, mmap.PAGESIZE
        self._lost: dict[str, memoryview] = {}
        for name, bits in self.geometry["lost"].items():
            self._lost[name] = view[lost_at : lost_at + bits]
            lost_at += round_up(bits, 8)
        self._areas: dict[str, memoryview] = {}
        for name, size in self.geometry.get("areas", {}).items():
            self._areas[name] = view[lost_at : lost_at + size]
            lost_at += round_up(size, 8)
        self._extension_at = round_up(end, page)
        self.extension = view[self._extension_at :]

    def _read_geometry(self) -> dict[str, Any] | None:
        """Return the geometry that was written last; None if both copies are damaged."""
        return _read(max(self._geometry, self._geometry[GEOMETRY_BYTES // 2 :], key=_serial))

    def reread_geometry(self) -> None:
        """Take the geometry that another process may have written since."""
        self.geometry = self._read_geometry() or self.geometry

    def write_geometry(self, geometry: Mapping[str, Any]) -> None:
        """Write another geometry, from which on only programs that know rosters take over.

        A death in between leaves the old one or the new one.

        Raises:
            HandoverError: it is too long for two copies; nothing is written.
        """
        serial = max(map(_serial, self._copies_of_geometry())) + 1
        document = bytearray(GEOMETRY_BYTES // 2 - _COPY.size)
        _write(memoryview(document), serial, geometry)  # raises before anything is changed
        self._raise_layout(LAYOUT_WITH_FILES)
        for copy in self._copies_of_geometry():
            _write(copy, serial, geometry)
        self.geometry = dict(geometry)

    def _copies_of_geometry(self) -> tuple[memoryview, memoryview]:
        half = GEOMETRY_BYTES // 2
        return self._geometry[:half], self._geometry[half : -_COPY.size]

    def add_range(self, size: int, used: Collection[tuple[int, int]]) -> int:
        """Allocate memory of zeros behind the areas that outlives this worker; return its offset.

        Args:
            size: bytes; they are rounded up to pages.
            used: offset and bytes of each range that is in use.

        Raises:
            ArenaError: the kernel gives no memory; nothing is added.
        """
        length, at = round_up(size, mmap.PAGESIZE), self._extension_at
        for offset, taken in sorted(used):
            if offset - at >= length:
                break
            at = max(at, offset + round_up(taken, mmap.PAGESIZE))
        try:
            os.posix_fallocate(self.fd, at, length)
        except OSError as error:
            self.free_range(at, length)
            raise ArenaError(
                f"no memory for {size} bytes of shared state: {error.strerror}"
            ) from error
        return at

    def added_bytes(self) -> int:
        """Return the bytes behind the areas, which workers have added."""
        return os.fstat(self.fd).st_size - self._extension_at

    @property
    def extension_at(self) -> int:
        """Offset of the memory behind the areas."""
        return self._extension_at

    def map_range(self, offset: int, size: int) -> memoryview:
        """Return memory that `add_range` has allocated, mapped and populated.

        Raises:
            HandoverError: it cannot be mapped.
        """
        length = round_up(size, mmap.PAGESIZE)
        try:
            mapped = mmap.mmap(self.fd, length, mmap.MAP_SHARED, offset=offset)
        except (OSError, ValueError) as error:
            raise HandoverError(
                f"shared memory of a swap file cannot be mapped: {error}", hint=restart_daemon()
            ) from error
        mapped.madvise(mmap.MADV_DONTDUMP)
        with contextlib.suppress(OSError):
            mapped.madvise(_MADV_POPULATE_WRITE)
        return memoryview(mapped)[:size]

    def free_range(self, offset: int, size: int) -> None:
        """Give the memory of a range back.

        The file keeps its length, because other processes have it mapped.
        """
        with contextlib.suppress(OSError):
            punch_hole(self.fd, offset, round_up(size, mmap.PAGESIZE))

    def extend(self, size: int) -> memoryview:
        """Add memory that outlives this worker; it may block, in any thread.

        Older programs leave the memory alone. Memory that a predecessor has added is `extension`.

        Returns:
            The new memory, which is all zeros.

        Raises:
            ArenaError: the kernel gives no memory; nothing is added.
        """
        length = round_up(size, mmap.PAGESIZE)
        try:
            os.posix_fallocate(self.fd, self._extension_at, length)
            added = mmap.mmap(self.fd, length, mmap.MAP_SHARED, offset=self._extension_at)
        except OSError as error:
            os.ftruncate(self.fd, self._extension_at)
            raise ArenaError(
                f"no memory for {size} bytes of shared state: {error.strerror}"
            ) from error
        added.madvise(mmap.MADV_DONTDUMP)
        with contextlib.suppress(OSError):
            added.madvise(_MADV_POPULATE_WRITE)
        self.extension = memoryview(added)
        return self.extension

    @classmethod
    def new(
        cls,
        geometry: Mapping[str, object],
        *,
        lost: Mapping[str, int],
        max_io: int,
        kind: str = "auto",
        areas: Mapping[str, int] | None = None,
    ) -> SharedState:
        """Make a new shared state.

        Args:
            geometry: the settings on which a successor has to agree, as JSON values.
            lost: size of each swap file's bitmap of lost pages, bytes.
            max_io: longest request of the hook, bytes.
            kind: kind of file, as for the arena.
            areas: sizes of further memory by name, bytes.

        Raises:
            ArenaError: the kernel gives no memory.
            HandoverError: the geometry is longer than GEOMETRY_BYTES.
        """
        page = mmap.PAGESIZE
        hook_at = round_up(page + 2 * SLOT_BYTES + GEOMETRY_BYTES, page)
        lost_at = hook_at + round_up(hook_bytes(max_io), page)
        areas = areas or {}
        end = lost_at + sum(round_up(size, 8) for size in (*lost.values(), *areas.values()))
        length = round_up(end, page)
        fd, _kind = open_shared_memory(kind)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            document = bytearray(GEOMETRY_BYTES)
            _write(
                memoryview(document),
                1,
                {**geometry, "lost": dict(lost), **({"areas": dict(areas)} if areas else {})},
            )
            try:
                os.ftruncate(fd, length)
                os.posix_fallocate(fd, 0, length)
            except OSError as error:
                raise ArenaError(
                    f"no memory for {length} bytes of shared state: {error.strerror}"
                ) from error
            os.pwrite(fd, document, page + 2 * SLOT_BYTES)
            os.pwrite(fd, _SUPERBLOCK.pack(MAGIC, LAYOUT_VERSION, page, hook_at, lost_at, end), 0)
            state = cls(fd)
            undo.pop_all()
        return state

    def blame(self, unique: int) -> None:
        """Record the number of the request that is answered, in case it kills this process.

        Args:
            unique: the kernel's number of the request; 0 for none.
        """
        self.hook_words[HookWord.ACTIVE] = unique & ~RESENT

    def renew(self) -> int:
        """Replace poisoned pages by zeroed memory, and map all pages in.

        Limit: before Linux 5.14, poisoned pages are not found. All pages are allocated, and are
        mapped at their first use.

        Returns:
            Number of pages that were poisoned.

        Raises:
            HandoverError: the kernel gives no memory for them.
        """
        try:
            return self._renew(0, len(self._view))
        except OSError as error:
            raise HandoverError(
                f"damaged memory of the shared state cannot be replaced: {error.strerror}"
            ) from error

    def refresh(self) -> int:
        """Renew poisoned pages, and restore their data from copies; return the number of pages."""
        renewed = self.renew()
        self.reread_geometry()
        if renewed:
            self._mended_superblock()
            self._mend()
        return renewed

    def _renew(self, start: int, length: int) -> int:
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, start, length)
        except OSError as error:
            if error.errno != EHWPOISON:
                return 0
        else:
            return 0
        if length <= mmap.PAGESIZE:
            punch_hole(self.fd, start, length)
            os.posix_fallocate(self.fd, start, length)
            return 1
        half = round_up(length // 2, mmap.PAGESIZE)
        return self._renew(start, half) + self._renew(start + half, length - half)

    def _mended_superblock(self) -> tuple[Any, ...]:
        """Return the superblock; restore it from its copy first if it is damaged."""
        view, size = self._view, _SUPERBLOCK.size
        head = bytes(view[:size])
        at = mmap.PAGESIZE + 2 * SLOT_BYTES + GEOMETRY_BYTES - _COPY.size
        copy, check = _COPY.unpack_from(view, at) if len(view) >= at + _COPY.size else (b"", 0)
        if not check or xxh3_64_intdigest(copy) != check or copy == head:
            return _SUPERBLOCK.unpack(head)
        # An older program may have raised the layout, and does not write the copy.
        layouts = [
            one
            for one in (_SUPERBLOCK.unpack(head)[1], _SUPERBLOCK.unpack(copy)[1])
            if one in READABLE_LAYOUTS
        ]
        magic, version, *rest = _SUPERBLOCK.unpack(copy)
        whole = (magic, max(layouts, default=version), *rest)
        _SUPERBLOCK.pack_into(view, 0, *whole)
        return whole

    def _has_copy(self) -> bool:
        copy, check = _COPY.unpack_from(self._geometry, GEOMETRY_BYTES - _COPY.size)
        return bool(check) and xxh3_64_intdigest(copy) == check

    def _copy_superblock(self, layout: int | None = None) -> None:
        """Write the copy of the superblock, with `layout` if it is about to change."""
        magic, version, *rest = _SUPERBLOCK.unpack_from(self._view, 0)
        copy = _SUPERBLOCK.pack(magic, layout or version, *rest)
        _COPY.pack_into(self._geometry, GEOMETRY_BYTES - _COPY.size, copy, xxh3_64_intdigest(copy))

    def _mend(self) -> None:
        """Write the copies of superblock and geometry that are damaged or missing."""
        if not self._has_copy():
            self._copy_superblock()
        serial = max(1, *map(_serial, self._copies_of_geometry()))
        for copy in self._copies_of_geometry():
            if _read(copy) != self.geometry:
                # a geometry of more than half of GEOMETRY_BYTES has no copy
                with contextlib.suppress(HandoverError):
                    _write(copy, serial, self.geometry)

    def check_words(self, check: Word) -> bool:
        """Say whether words agree with their checksum: WORKER_CHECK or FILES_CHECK."""
        return self.words[check] in (0, self._digest(check))

    def seal_words(self, check: Word) -> None:
        """Write the checksum of words that were just written; it is 0 while they are written."""
        self.words[check] = self._digest(check)

    def _digest(self, check: Word) -> int:
        return (
            xxh3_64_intdigest(
                b"".join(self.words[place].to_bytes(8, "little") for place in _CHECKED[check])
            )
            or 1
        )

    def lost(self) -> dict[str, memoryview]:
        """Return each swap file's bitmap of lost pages."""
        return dict(self._lost)

    def area(self, name: str) -> memoryview:
        """Return an area by its name.

        Raises:
            HandoverError: the area does not exist, because the running daemon was started with
                other settings.
        """
        if name not in self._areas:
            raise HandoverError(
                f"the running daemon's shared state has no {name}", hint=restart_daemon()
            )
        return self._areas[name]

    @property
    def areas(self) -> Mapping[str, memoryview]:
        """The areas by name; a file of an older program may lack some."""
        return self._areas

    @property
    def layout(self) -> int:
        """The layout's version."""
        return self._layout_word[0]

    def note_codecs(self, names: Collection[str]) -> None:
        """Note the codecs of stored pages, before the first page is stored with them.

        Programs that lack one of them then refuse to take over.
        """
        if "zstd" in names:
            self._raise_layout(LAYOUT_WITH_ZSTD)

    def _raise_layout(self, layout: int) -> None:
        if self.layout < layout:
            self._copy_superblock(layout)
            self._layout_word[0] = layout

    def load(self) -> dict[str, Any]:
        """Return the last valid document; {} if there is none.

        If the last document is damaged, the result is the one before, 0.5 s older. If both are
        damaged, the log says which data is lost.
        """
        document = _read(max(self._slots, key=_serial))
        if document is None and any(bytes(slot) != bytes(len(slot)) for slot in self._slots):
            log.error(
                "the documents that earlier workers saved are damaged: settings and volumes of run"
                " time, a freeze, and counters are lost; stored pages are not affected"
            )
        return document or {}

    def save(self, document: Mapping[str, object]) -> None:
        """Save a document in place of the last one.

        Raises:
            HandoverError: the document is longer than SLOT_BYTES; the last one stays.
        """
        older, newer = sorted(self._slots, key=_serial)
        _write(older, _serial(newer) + 1, document)

    def close(self) -> None:
        """Unmap and close the file."""
        if self.fd < 0:
            return
        for view in (
            self.words,
            self.hook_words,
            self.hook,
            *self._slots,
            self._geometry,
            *self._lost.values(),
            *self._areas.values(),
            self.extension,
            self._layout_word,
            self._view,
        ):
            view.release()
        os.close(self.fd)
        self.fd = -1


def _serial(slot: memoryview) -> int:
    """Return the serial number of a slot's document; 0 if there is no valid one."""
    serial, length, check = _SLOT.unpack_from(slot, 0)
    is_whole = (
        length <= len(slot) - _SLOT.size
        and xxh3_64_intdigest(slot[_SLOT.size : _SLOT.size + length], serial) == check
    )
    return int(serial) if serial and is_whole else 0


def _read(slot: memoryview) -> dict[str, Any] | None:
    """Return a slot's document; None if there is no valid one."""
    if not _serial(slot):
        return None
    _serial_number, length, _check = _SLOT.unpack_from(slot, 0)
    document = json.loads(bytes(slot[_SLOT.size : _SLOT.size + length]))
    return document if isinstance(document, dict) else None


def _write(slot: memoryview, serial: int, document: Mapping[str, object]) -> None:
    data = json.dumps(document, separators=(",", ":")).encode()
    if len(data) > len(slot) - _SLOT.size:
        raise HandoverError(
            f"{len(data)} bytes are too many to be handed over", hint="report this as a bug"
        )
    # Until the header is written, the old checksum does not fit the new data. A reader then takes
    # the document of the other slot.
    slot[_SLOT.size : _SLOT.size + len(data)] = data
    _SLOT.pack_into(slot, 0, serial, len(data), xxh3_64_intdigest(data, serial))
