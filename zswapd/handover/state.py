# SPDX-License-Identifier: GPL-2.0-or-later
"""What outlives a worker besides the arena.

One small shared file, mapped by the supervisor and by every worker.

    page 0     superblock, then 64-bit words (`Word`): signs of life, phase, counts of workers
    slots      two copies of a JSON document (`save`, `load`): settings changed at run time, frozen, counters carried on
    geometry   a JSON document written once: page size, swap files, mountpoint; a successor of another
               shape is refused by it. A second copy is half of GEOMETRY_BYTES behind it, and one of
               the superblock at the end
    hook       the survivor page and the request buffer of fuse/_lowlevel.c (its header says what they mean)
    lost       one bit a page of every swap file: pages whose overwrite was refused (core/block/device.py)
    areas      further memory by name (`area`): a second copy of these bits; marks of recompression, if that is on; of a disk
               behind the pool the key, the claims, and which pages are there
    extension  further memory that a worker has added while it ran (`extend`), from the next page
    on: marks of recompression

All of it is populated when it is made, so nothing on the page path can fault on it. Words are
written by one process at a time: by the worker, or by the supervisor while there is none.

A document is written to the older slot, its checksum and serial number last: a writer that dies in
the middle leaves the one before.

Damage: a bit that changes by itself, a word that becomes zero, a page whose memory is poisoned (an
uncorrectable error, which ends each process that touches it). `renew` puts other memory in place of
such pages, and what has a second copy, in another page, is taken from that. What each reader of the
rest does about damage: docs/coherency.md. A file of an older program has no second copies; it is
believed as it is.
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
"""Of this file. A program refuses a version that it does not know before anything is stopped."""
LAYOUT_WITH_ZSTD = 2
"""The same, with pages in the arena that only programs can read that know zstd."""
READABLE_LAYOUTS = (LAYOUT_VERSION, LAYOUT_WITH_ZSTD)
SLOT_BYTES = 256 << 10
"""Longest document, its 24 bytes of header included."""
GEOMETRY_BYTES = 64 << 10

_SUPERBLOCK = struct.Struct("=8sIIQQQ")
MAGIC = b"zswapd\0H"
"""How such a file begins."""
_SLOT = struct.Struct("=QQQ")
_COPY = struct.Struct("=40sQ")
"""The copy of the superblock and its checksum, at the end of the geometry."""
_WORDS = 256  # offset of the words in page 0
_MADV_POPULATE_WRITE = 23


class Word(enum.IntEnum):
    """The words of page 0."""

    TICKS = 0
    """The worker's signs of life, for the watchdog.

    Turns of its event loop, and stretches of a takeover.
    """
    PHASE = 1
    """What the worker is at, a `Phase`."""
    UPGRADE = 2
    """Not 0: the worker has checked that the installed program can take over, and asks for it."""
    STARTED = 3
    """Workers forked since the file was made."""
    DEATHS = 4
    """Workers that ended without being told to."""
    BROKEN = 5
    """Those of them that ended themselves.

    Because of an error that left their books in the middle of something.
    """
    STOPS_REFUSED = 6
    """Times that a worker was told to stop and has gone on, since the data had nowhere to go."""
    WORKER = 7
    """Process id of the worker, 0 before there is one."""
    WORKER_BORN = 8
    """When that process began, in ticks of the kernel's clock: what has its id later is another."""
    FILE_FUSE = 9
    """Number of an open file in the supervisor and its workers, plus 1; 0 for none.

    Likewise those below: resources.NAMES.
    """
    FILE_ARENA = 10
    FILE_STATE = 11
    FILE_SOCKET = 12
    FILE_LOCK = 13
    FILE_BACKING = 14
    BEGUN = 15
    """When the supervisor began to make this worker, nanoseconds of CLOCK_MONOTONIC."""
    WORKER_CHECK = 16
    """Checksum of WORKER and WORKER_BORN; 0 where an older program has written them."""
    FILES_CHECK = 17
    """The same of the words from FILE_FUSE to FILE_BACKING."""


IDENTITY = (Word.WORKER, Word.WORKER_BORN)
FILES = tuple(Word(place) for place in range(Word.FILE_FUSE, Word.FILE_BACKING + 1))
_CHECKED = {Word.WORKER_CHECK: IDENTITY, Word.FILES_CHECK: FILES}
UPGRADE_WANTED = 0x65_64_61_72_67_70_75
"""What UPGRADE is when it is asked for; no few bits make it of 0."""


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
"""In the kernel's number for a request: it comes for the second time. RESENT in _lowlevel.c."""


class Phase(enum.IntEnum):
    """What a worker is at."""

    STARTING = 0
    """Building or rebuilding; it serves nobody yet."""
    SERVING = 1
    STOPPING = 2
    """Nothing is swapped on any more; it will end by itself, and that is the end."""


def hook_bytes(max_io: int) -> int:
    """Return how much shared memory the hook needs for requests of up to `max_io` bytes."""
    return 2 * mmap.PAGESIZE + max_io


class SharedState:
    """The file, mapped.

    Args:
        fd: its descriptor; it belongs to this object from then on.

    Attributes:
        fd: the descriptor.
        geometry: the document written when it was made.
        hook: the hook's part, page-aligned.
        words, hook_words: 64-bit words, by `Word` and `HookWord`.

    Raises:
        HandoverError: the file is none of ours, or of another layout.
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
        # Request data is page contents; a core dump must not show any.
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
        document = _read(self._geometry) or _read(self._geometry[GEOMETRY_BYTES // 2 :])
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

    def extend(self, size: int) -> memoryview:
        """Add memory for all workers to come.

        In any thread, since it may block. Programs that do not know it leave it alone.

        Returns:
            It, zeros at first; what a predecessor has added already is `extension`.

        Raises:
            ArenaError: the kernel gives none; nothing is added.
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
        """Make a file.

        Args:
            geometry: what a successor has to agree with; anything that JSON can say.
            lost: bytes of each swap file's bitmap.
            max_io: longest request of the hook, bytes.
            kind: of file, as for the arena.
            areas: bytes of further memory, by name.

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

    def renew(self) -> int:
        """Put other memory, all zeros, in place of poisoned pages, and map all pages in.

        Before Linux 5.14 the kernel cannot tell; the pages are there, and are mapped when they are
        first used.

        Returns:
            How many pages were poisoned.

        Raises:
            HandoverError: there is no memory for them.
        """
        try:
            return self._renew(0, len(self._view))
        except OSError as error:
            raise HandoverError(
                f"damaged memory of the shared state cannot be replaced: {error.strerror}"
            ) from error

    def refresh(self) -> int:
        """Do what a new process does: `renew`, and take what that has cleared from its copies.

        Return how many pages it was.
        """
        renewed = self.renew()
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
        """Return the superblock, which is made good from its copy if it has changed by itself."""
        view, size = self._view, _SUPERBLOCK.size
        head = bytes(view[:size])
        at = mmap.PAGESIZE + 2 * SLOT_BYTES + GEOMETRY_BYTES - _COPY.size
        copy, check = _COPY.unpack_from(view, at) if len(view) >= at + _COPY.size else (b"", 0)
        if not check or xxh3_64_intdigest(copy) != check or copy == head:
            return _SUPERBLOCK.unpack(head)
        # An older program may have raised the layout, and knows of no copy.
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
        """Make the copy, of what the superblock is or is going to be."""
        magic, version, *rest = _SUPERBLOCK.unpack_from(self._view, 0)
        copy = _SUPERBLOCK.pack(magic, layout or version, *rest)
        _COPY.pack_into(self._geometry, GEOMETRY_BYTES - _COPY.size, copy, xxh3_64_intdigest(copy))

    def _mend(self) -> None:
        """Write both copies of what does not change.

        That is done if one of them is damaged, or an older program has made none.
        """
        if not self._has_copy():
            self._copy_superblock()
        first, second = (
            self._geometry[: GEOMETRY_BYTES // 2],
            self._geometry[GEOMETRY_BYTES // 2 : -_COPY.size],
        )
        for copy in (first, second):
            if _read(copy) != self.geometry:
                # one that fills more than half has no copy
                with contextlib.suppress(HandoverError):
                    _write(copy, 1, self.geometry)

    def check_words(self, check: Word) -> bool:
        """Say whether words agree with their checksum: WORKER_CHECK or FILES_CHECK."""
        return self.words[check] in (0, self._digest(check))

    def seal_words(self, check: Word) -> None:
        """Make the checksum of words that have just been written; it was 0 while they were."""
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
        """Return further memory by its name.

        Raises:
            HandoverError: there is none; the running daemon was started without what it is for.
        """
        if name not in self._areas:
            raise HandoverError(
                f"the running daemon's shared state has no {name}", hint=restart_daemon()
            )
        return self._areas[name]

    @property
    def areas(self) -> Mapping[str, memoryview]:
        """Further memory by its name; what an older program has made may lack some."""
        return self._areas

    @property
    def layout(self) -> int:
        """The layout's version."""
        return self._layout_word[0]

    def note_codecs(self, names: Collection[str]) -> None:
        """Say, before it is so, which codecs pages are kept with.

        Programs that do not know one refuse to take over then.
        """
        if "zstd" in names:
            if self.layout != LAYOUT_WITH_ZSTD:
                self._copy_superblock(LAYOUT_WITH_ZSTD)
            self._layout_word[0] = LAYOUT_WITH_ZSTD

    def load(self) -> dict[str, Any]:
        """Return the last document that was saved whole; an empty one if there is none.

        If the last is damaged, it is the one before, half a second older. If both are, the log says
        what that costs.
        """
        document = _read(max(self._slots, key=_serial))
        if document is None and any(bytes(slot) != bytes(len(slot)) for slot in self._slots):
            log.error(
                "what earlier workers have left in the shared state is damaged: settings and"
                " volumes of run time, a freeze and counters are forgotten; stored pages are not"
                " concerned"
            )
        return document or {}

    def save(self, document: Mapping[str, object]) -> None:
        """Put a document in place of the last.

        Raises:
            HandoverError: it is longer than SLOT_BYTES; the last one stays.
        """
        older, newer = sorted(self._slots, key=_serial)
        _write(older, _serial(newer) + 1, document)

    def close(self) -> None:
        """Let go of the mapping and the file."""
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
    """Return the serial number of a slot's document, 0 if there is no whole one."""
    serial, length, check = _SLOT.unpack_from(slot, 0)
    is_whole = (
        length <= len(slot) - _SLOT.size
        and xxh3_64_intdigest(slot[_SLOT.size : _SLOT.size + length], serial) == check
    )
    return int(serial) if serial and is_whole else 0


def _read(slot: memoryview) -> dict[str, Any] | None:
    """Return a slot's document, None if there is no whole one."""
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
    # The old checksum does not fit the new data: whoever reads now finds no document here, and
    # takes the other slot's.
    slot[_SLOT.size : _SLOT.size + len(data)] = data
    _SLOT.pack_into(slot, 0, serial, len(data), xxh3_64_intdigest(data, serial))
