# SPDX-License-Identifier: GPL-2.0-or-later
"""The synchronous core, put together: arena, frames, zsmalloc, zv, tmem, frontswap and one block device a swap file.

With daemon.py the only place that names concrete classes and knows the configuration; every part below gets plain values.
Nothing in here awaits, and nothing but the jobs of `begin_refill` blocks.

Sizes. The arena's address space is for all swap files filled with pages that do not compress, a quarter more for zspages that
are not full, and the reserve: address space costs nothing until it is populated. The index has room for every page of every
swap file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zswapd import compress
from zswapd.allocators.arena import Arena
from zswapd.allocators.pageframes import PageFrames, PageFramesStatistics
from zswapd.allocators.zsmalloc import ZsPool, ZsStatistics
from zswapd.block.device import Device, DeviceStatistics
from zswapd.errors import CorruptedPageError, InvariantError
from zswapd.frontends.frontswap import SWIZ_BITS, Frontswap, FrontswapStatistics
from zswapd.pam.zv import Zv, ZvStatistics
from zswapd.tmem.core import Tmem, TmemStatistics
from zswapd.tmem.objnodes import NODE_BYTES, Objnodes, nodes_for

if TYPE_CHECKING:
    from zswapd.config import Config

_NODE_RESERVE_BYTES = 1 << 20
COMPACT_MOVES = 128
"""Objects that one step of compaction moves: about half a millisecond, in which no page is served."""


@dataclass(frozen=True, slots=True)
class CoreStatistics:
    """Snapshots of all parts, taken at one moment."""

    arena_kind: str
    arena_backed_bytes: int
    frames: PageFramesStatistics
    zsmalloc: ZsStatistics
    zv: ZvStatistics
    tmem: TmemStatistics
    frontswap: FrontswapStatistics
    devices: tuple[DeviceStatistics, ...]


class Core:
    """All parts that a page goes through below FUSE.

    Args:
        config: the settings.

    Attributes:
        devices: block devices by name, `swap` first.

    Raises:
        ArenaError: no shared memory, or no memory for the reserve.
        ConfigError: unknown compressor.
    """

    def __init__(self, config: Config) -> None:
        page_size = config.context.page_size
        sizes = config.swap_files()
        pages = sum(sizes.values()) // page_size
        reserve = min(config.memory.reserve // page_size, pages)
        self._page_size = page_size
        self._total_frames = config.context.memory_total // page_size
        self.arena = Arena(pages + pages // 4 + 4 * reserve, page_size, kind=config.memory.arena)
        self.frames = PageFrames(self.arena, reserve_frames=reserve)
        self.zsmalloc = ZsPool(self.frames, max_zspage_frames=config.pool.max_zspage_frames)
        self.zv = Zv(
            self.zsmalloc,
            self.frames,
            compress.get(config.pool.compressor),
            compress.by_codec(),
            total_frames=self._total_frames,
        )
        objects = 1 << SWIZ_BITS
        capacity = sum(nodes_for(size // page_size, objects) for size in sizes.values())
        self.nodes = Objnodes(capacity, reserve=_NODE_RESERVE_BYTES // NODE_BYTES)
        self.tmem = Tmem(self.nodes)
        self.frontswap = Frontswap(self.tmem, self.zv)
        self.devices = {
            name: Device(name, size, self.frontswap, swap_type, page_size=page_size)
            for swap_type, (name, size) in enumerate(sizes.items())
        }
        self.apply(config)
        self.frames.refill_now()

    def apply(self, config: Config) -> None:
        """Take over the settings that can change at run time; they were checked when the Config was made."""
        pool = config.pool
        self.zv.compressor = compress.get(pool.compressor)
        self.zv.checksum = pool.checksum
        self.zv.keep_poor = pool.incompressible == "store"
        self.zv.max_zsize = pool.zv_max_zsize
        self.zv.max_mean_zsize = pool.zv_max_mean_zsize
        self.zv.policy_percent = pool.zv_page_count_policy_percent
        everything = self.arena.total_frames
        self.zv.limit_frames = everything if pool.limit is None else pool.limit // self._page_size
        self.frames.limit_frames = min(self.zv.limit_frames, self._total_frames * self.zv.policy_percent // 100)

    def wants_compaction(self) -> bool:
        """Say whether compaction would set free a sixteenth of the frames in use, and more than a few."""
        return self.zsmalloc.freeable_frames() > max(self.frames.used_frames // 16, 256)

    def compact_step(self) -> int:
        """Move objects, COMPACT_MOVES at most; return how many."""
        before = self.zsmalloc.objects_moved
        self.tmem.compact(self.zv, COMPACT_MOVES)
        return self.zsmalloc.objects_moved - before

    def self_test(self) -> None:
        """Keep a few pages of every kind with every codec and read them back, in a zv of their own over the same frames.

        Raises:
            CorruptedPageError: something does not come back as it was; the daemon must not serve then.
        """
        zv = Zv(
            ZsPool(self.frames),
            self.frames,
            self.zv.compressor,
            compress.by_codec(),
            total_frames=self._total_frames,
        )
        out = memoryview(bytearray(self._page_size))
        for codec in compress.names():
            zv.compressor = compress.get(codec)
            for page in _test_pages(self._page_size):
                pampd = zv.create(0, 0, 0, memoryview(page), replacing=True)
                if pampd > 0:
                    zv.get(pampd, 0, 0, out)
                    zv.free(pampd)
                if pampd <= 0 or out != page:
                    raise CorruptedPageError(
                        f"self-test: a page stored with {codec} does not come back as it was",
                        hint="reinstall the codec's library; test the machine's memory",
                    )

    def check(self) -> None:
        """Prove the invariants of every part. Takes seconds for a full pool.

        Raises:
            InvariantError: naming what is wrong.
        """
        self.frames.check()
        self.zsmalloc.check()
        self.tmem.check()
        self.zv.check(self.tmem.pampds(self.zv))
        if self.frames.used_frames != self.zsmalloc.used_frames():
            raise InvariantError(f"{self.frames.used_frames} frames in use, zsmalloc holds {self.zsmalloc.used_frames()}")

    def statistics(self) -> CoreStatistics:
        """Return snapshots of all parts."""
        return CoreStatistics(
            arena_kind=self.arena.kind,
            arena_backed_bytes=self.arena.backed_bytes(),
            frames=self.frames.statistics(),
            zsmalloc=self.zsmalloc.statistics(),
            zv=self.zv.statistics(),
            tmem=self.tmem.statistics(),
            frontswap=self.frontswap.statistics(),
            devices=tuple(device.statistics() for device in self.devices.values()),
        )

    def close(self) -> None:
        """Let go of the arena."""
        self.arena.close()


def _test_pages(page_size: int) -> tuple[bytes, ...]:
    """Return a page that is same-filled, one that compresses, one that does so poorly, and one that does not."""
    text = b"".join(b"%d:" % (number * 2654435761 % 4294967296) for number in range(page_size // 4))
    noise = hashlib.shake_128(b"zswapd").digest(page_size)
    return b"\x5a" * page_size, text[:page_size], text[: page_size // 8] + noise[page_size // 8 :], noise
