# SPDX-License-Identifier: GPL-2.0-or-later
"""The synchronous core, put together.

Arena, frames, allocator, zv, tmem, frontswap and one block device a swap file.

If there may be cache volumes, it has an ephemeral half too (core/cache.py).

With worker/worker.py and core/cache.py the only place that names concrete classes, and knows the
configuration; every part below gets plain values. Nothing in here awaits, and nothing but the jobs
of `begin_refill` blocks.

A Core is new, with an arena of its own, or a successor's: then the arena is `inherited` as a dead
process left it, and everything else is made from it (`_recover`). A successor takes no memory
beyond what its predecessor had; refilling the reserve is left to who drives the core.

The index has room for every page of every swap file; sizing.py has the sizes of all else.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zswapd import counters as counters_module
from zswapd.core import compress, crashpoints, selftest
from zswapd.core.allocators.choice import make_allocator
from zswapd.core.allocators.frametable import PERSISTENT
from zswapd.core.allocators.pageframes import PageFrames, PageFramesStatistics
from zswapd.core.block.device import Device, DeviceStatistics
from zswapd.core.cache import CacheHalf, CacheStatistics, split
from zswapd.core.crashpoints import reach
from zswapd.core.disk import apply_limits
from zswapd.core.frontends.frontswap import SWIZ_BITS, Frontswap, FrontswapStatistics
from zswapd.core.pam.recovery import free_dropped, recover
from zswapd.core.pam.zv import Zv
from zswapd.core.reclaim.ages import StoreAges
from zswapd.core.reclaim.recompress import STRONGER, Recompression, populate_marks
from zswapd.core.sizing import (
    adopt_arena,
    cache_frames,
    lost_bitmap_bytes,
    make_arena,
    reserve_frames,
)
from zswapd.core.tmem.objnodes import NODE_BYTES, Objnodes, nodes_for
from zswapd.core.tmem.tmem import Tmem, TmemStatistics
from zswapd.errors import InvariantError
from zswapd.pages import ADDRESS_SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zswapd.config import Config
    from zswapd.core.allocators.zbud import ZbudPool, ZbudStatistics
    from zswapd.core.allocators.zsmalloc import ZsPool, ZsStatistics
    from zswapd.core.backing.transfers import TransferStatistics
    from zswapd.core.block.backed import BackedStatistics
    from zswapd.core.disk import CoreDisk
    from zswapd.core.pam.zv import ZvStatistics
    from zswapd.core.reclaim.recompress import RecompressionStatistics
    from zswapd.core.reclaim.writeback import WritebackStatistics

_NODE_RESERVE_BYTES = 1 << 20
_LOST_COPY = "lost:"
"""Begins the name of a swap file's second bitmap of lost pages in the shared state."""
COMPACT_MOVES = 128
"""Objects that one step of compaction moves: about half a millisecond, in which no page is served.
"""


def _ignore() -> None:
    """Tell nobody that a takeover comes along."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a successor gets from its predecessor, as plain values.

    Attributes:
        arena_fd: the arena's file; stays the giver's.
        lost: bitmaps of lost pages by device, in shared memory, `lost_bitmap_bytes` long; a device
            without one has its own.
        tried: marks of pages that recompression has tried, by device, a byte a page, likewise.
        more_marks: makes them when they are needed; None for marks that do not outlive the process.
        counters: what `carry.cumulative` made of the predecessor's statistics; {} for none.
        alive: called again and again while the arena is made sense of, which takes its time.
        lost_copies: the second bitmaps of lost pages, likewise.
        arena_copy: what the arena's superblock says, if the shared state has kept that.
    """

    arena_fd: int
    lost: Mapping[str, memoryview] = field(default_factory=dict)
    tried: Mapping[str, memoryview] = field(default_factory=dict)
    counters: Mapping[str, Any] = field(default_factory=dict)
    alive: Callable[[], None] = _ignore
    more_marks: Callable[[], Mapping[str, memoryview]] | None = None
    lost_copies: Mapping[str, memoryview] = field(default_factory=dict)
    arena_copy: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RecoveryStatistics:
    """Takeovers from a dead process.

    Attributes:
        takeovers: how many there were.
        recovered_pages: pages that the last one found.
        seconds: how long the last one took.
        recovered_torn: stores that had been cut short; their writers were never told that they were
            done.
        recovered_duplicates: pages found twice, of which one copy was kept.
        freed_bodies: frames of pages that nothing named.
        damaged: objects and zspages that no death leaves, so that memory must have changed by
            itself; what they were is lost.
        poisoned: pages of the arena in whose memory the machine found an uncorrectable error; what
            they held is lost, and other memory is in their place.
    """

    takeovers: int = 0
    recovered_pages: int = 0
    seconds: float = 0.0
    recovered_torn: int = 0
    recovered_duplicates: int = 0
    freed_bodies: int = 0
    damaged: int = 0
    poisoned: int = 0


counters_module.declare(
    RecoveryStatistics,
    cumulative="takeovers recovered_torn recovered_duplicates freed_bodies damaged poisoned",
)


@dataclass(frozen=True, slots=True)
class CoreStatistics:
    """Snapshots of all parts, taken at one moment.

    Of zsmalloc and zbud, the one that swap is not on is None, as is the cache if there is none.
    """

    arena_kind: str
    arena_backed_bytes: int
    frames: PageFramesStatistics
    zsmalloc: ZsStatistics | None
    zbud: ZbudStatistics | None
    cache: CacheStatistics | None
    zv: ZvStatistics
    tmem: TmemStatistics
    frontswap: FrontswapStatistics
    recovery: RecoveryStatistics
    devices: tuple[DeviceStatistics, ...]
    backed: tuple[BackedStatistics, ...]
    transfers: TransferStatistics | None
    writeback: WritebackStatistics | None
    """None without a backing, as the one above."""
    recompression: RecompressionStatistics
    store_ages: tuple[int, ...]
    """Pages of a sample by the time since they were stored (see `StoreAges`).

    Empty if none was taken.
    """


def areas(config: Config) -> dict[str, int]:
    """Return the memory that has to outlive a worker, by name: the second bitmaps of lost pages."""
    return {_LOST_COPY + name: size for name, size in lost_bitmap_bytes(config).items()}


def lost_copies_in(areas: Mapping[str, memoryview]) -> dict[str, memoryview]:
    """Return the second bitmap of each swap file that has one; an older program has made none."""
    return {
        name.removeprefix(_LOST_COPY): area
        for name, area in areas.items()
        if name.startswith(_LOST_COPY)
    }


def store_codecs(config: Config) -> tuple[str, ...]:
    """Return the codecs that pages are kept with from now on."""
    return (config.pool.compressor, *([STRONGER] if config.pool.recompress_age else []))


class Core:
    """All parts that a page goes through below FUSE.

    Args:
        config: the settings.
        inherited: what a dead process has left, to go on with.
        backing: the disk behind the pool, None for none.

    Attributes:
        devices: block devices by name, `swap` first.
        nodes: memory of the index of swap's pages; all_nodes: of the cache's too.
        cache: the ephemeral half; None if the settings say that there will be no cache volumes.
        backed: those of them that have slots: all, or none.
        writeback: who chooses what leaves the pool for the disk; None without one.
        recompression: who compresses pages again.
        ages: who knows how long ago pages were stored; all_ages: and those of the cache.

    Raises:
        ArenaError: no shared memory, or no memory for the reserve; an inherited arena that is for
            other settings.
        ConfigError: unknown compressor.
    """

    def __init__(
        self, config: Config, *, inherited: Inherited | None = None, backing: CoreDisk | None = None
    ) -> None:
        started = time.perf_counter()
        sizes = config.swap_files()
        self._page_size = page_size = config.context.page_size
        self._counters = inherited.counters if inherited else {}
        self._total_frames, self._ceiling = config.context.memory_total // page_size, 1 << 62
        self.arena = (
            adopt_arena(config, inherited.arena_fd, inherited.arena_copy)
            if inherited
            else make_arena(config)
        )
        self.frames = PageFrames(self.arena, reserve_frames=reserve_frames(config))
        self.allocator = self._make_allocator(config, self.frames)
        self.zv = Zv(
            self.allocator,
            self.frames,
            compress.get(config.pool.compressor),
            compress.by_codec(),
            total_frames=self._total_frames,
        )
        objects = 1 << SWIZ_BITS
        capacity = sum(nodes_for(size // page_size, objects) for size in sizes.values())
        self.nodes = Objnodes(
            capacity, reserve=_NODE_RESERVE_BYTES // NODE_BYTES, lenient=inherited is not None
        )
        self.all_nodes = [self.nodes]
        ephemeral_frames = cache_frames(config)
        if ephemeral_frames:
            reserve = _NODE_RESERVE_BYTES // NODE_BYTES
            self.all_nodes.append(
                Objnodes(ephemeral_frames, reserve=reserve, lenient=inherited is not None)
            )
        self.tmem = Tmem(self.nodes, self.all_nodes[-1])
        self.frontswap = Frontswap(self.tmem, self.zv)
        self.cache = self._make_cache(config) if ephemeral_frames else None
        self._transfers = backing.transfers if backing else None
        lost = inherited.lost if inherited else {}
        copies = inherited.lost_copies if inherited else {}
        self.backed = (
            backing.devices(sizes, self.frontswap, lost, page_size, copies) if backing else []
        )
        self.devices: dict[str, Device] = {device.name: device for device in self.backed} or {
            name: Device(
                name,
                size,
                self.frontswap,
                swap_type,
                page_size=page_size,
                lost=lost.get(name),
                lost_copy=copies.get(name),
            )
            for swap_type, (name, size) in enumerate(sizes.items())
        }
        self.writeback = (
            backing.writeback(self.backed, self.frames, self.frontswap, self.zv)
            if backing
            else None
        )
        self.recompression = self._make_recompression(inherited)
        zv = self.zv
        self.ages = StoreAges(list(self.devices.values()), lambda: zv.newest)
        self.all_ages = [self.ages, self.cache.ages] if self.cache else [self.ages]
        self.apply(config)
        self._recovery = RecoveryStatistics()
        if inherited:
            self.frames.alive = inherited.alive
            self._recover(started)
            self.frames.alive = _ignore
        if not self.frames.used_frames and not self.frames.table.free_frames:
            # Nobody has used this arena yet. One that is inherited in use has the reserve that its
            # user left, and the kernel is not asked for more while requests wait.
            self.frames.refill_now()

    def _make_allocator(self, config: Config, frames: PageFrames) -> ZsPool | ZbudPool:
        """Return a new allocator for the persistent half."""
        pool = config.pool
        return make_allocator(
            pool.allocator, frames, PERSISTENT, None, max_zspage_frames=pool.max_zspage_frames
        )

    def _make_cache(self, config: Config) -> CacheHalf:
        """Return a new ephemeral half, which is evicted for stores of the persistent one."""
        cache = CacheHalf(
            self.frames,
            self.tmem,
            self.all_nodes[-1],
            self.zv.compressor,
            compress.by_codec(),
            allocator=config.cache.allocator,
            max_zspage_frames=config.pool.max_zspage_frames,
            wanted_run=self.allocator.longest_run,
        )
        self.zv.evict_cache = cache.eviction.evict_for_store
        return cache

    def _make_recompression(self, inherited: Inherited | None) -> Recompression:
        """Return what compresses pages again.

        A device whose marks are not inherited has marks of its own. Their memory is taken when a
        pass begins: then they move to memory that outlives the process, if the shared state has it.
        """
        marks = inherited.tried if inherited else {}
        # A memfd is safe from swap only where the supervisor locks it, which it does once, at its
        # start.
        more = inherited.more_marks if inherited and self.arena.kind == "tmpfs" else None
        own = {
            name: mmap.mmap(-1, device.pages, ADDRESS_SPACE)
            for name, device in self.devices.items()
            if name not in marks
        }
        names, zv, frames, writeback = list(self.devices), self.zv, self.frames, self.writeback

        def prepare() -> list[memoryview] | None:
            if more is None:
                populate_marks(own.values())
                return None
            made = more()
            return [made[name] for name in names]

        return Recompression(
            list(self.devices.values()),
            [marks[name] if name in marks else memoryview(own[name]) for name in names],
            compress.get(STRONGER),
            newest=lambda: zv.newest,
            epoch_before=writeback.epoch_before if writeback else lambda _seconds: 0,
            has_room=lambda: frames.table.free_frames > frames.reserve_target // 2,
            prepare=prepare if own else None,
        )

    def _recover(self, started: float) -> None:
        """Make frames, allocator, zv, index and devices from the arena.

        Raises:
            ArenaError: no memory for the index; the arena is as good as before, for the next try.
        """
        wrong = self.frames.adopt()
        reach(crashpoints.TAKEOVER_FRAMES)
        wrong += self.allocator.adopt() + self._drop_renewed()
        reach(crashpoints.TAKEOVER_ZSPAGES)
        findings = recover(self.zv, self.frontswap)
        reach(crashpoints.TAKEOVER_INDEXED)
        damaged = wrong + findings.damaged
        # Before anything damaged is freed: a death in between must not make the next process trust
        # the rest.
        for device in self.devices.values():
            device.adopt(distrust=damaged > 0 or self.arena.distrusted, alive=self.frames.alive)
            self.frames.alive()
        self.arena.distrusted = False
        reach(crashpoints.TAKEOVER_MARKED)
        bodies = free_dropped(self.zv, findings)
        reach(crashpoints.TAKEOVER_REWRITTEN)
        self.arena.end_rewriting()
        self._recovery = RecoveryStatistics(
            takeovers=1,
            recovered_pages=self.zv.statistics().curr_pages,
            seconds=time.perf_counter() - started,
            recovered_torn=findings.torn,
            recovered_duplicates=findings.duplicates,
            freed_bodies=bodies,
            damaged=damaged,
            poisoned=self.frames.renewed_pages,
        )

    def _drop_renewed(self) -> int:
        """Free what has lost memory to an uncorrectable error; return how much that was.

        A body's header then names no body, which zv counts as damage.
        """
        frames, size = self.frames.renewed, self._page_size
        dropped: list[int] = []

        def found(handle: int, room: int) -> None:
            if not frames.isdisjoint(range(handle // size, (handle + room - 1) // size + 1)):
                dropped.append(handle)

        if frames:
            self.allocator.each_object(found)
            dropped += [frame * size for frame in sorted(frames) if self.allocator.is_body(frame)]
        for handle in dropped:
            self.allocator.free(handle)
        return len(dropped)

    def apply(self, config: Config) -> None:
        """Take over the settings that can change at run time.

        They were checked when the Config was made.
        """
        pool = config.pool
        self.zv.compressor = compress.get(pool.compressor)
        self.zv.checksum = pool.checksum
        self.zv.keep_poor = pool.incompressible != "refuse"
        self.zv.max_zsize = pool.zv_max_zsize
        self.zv.max_mean_zsize = pool.zv_max_mean_zsize
        self.zv.policy_percent = pool.zv_page_count_policy_percent
        self._config = config
        self._apply_limits()
        job = self.recompression
        job.age_s, job.rate, job.gain_percent = (
            pool.recompress_age,
            pool.recompress_rate,
            pool.recompress_gain,
        )
        if self.cache:
            self.cache.zbuds.compressor = self.zv.compressor
            self.cache.zbuds.checksum = pool.checksum
            self.cache.eviction.limit_frames = min(
                (config.cache.limit or 0) // self._page_size, self._total_frames // 2
            )

    def bound(self, frames: int) -> None:
        """Bound the frames of swap's pages, whatever the settings say; those in use are kept."""
        if frames != self._ceiling:
            self._ceiling = frames
            self._apply_limits()

    def _apply_limits(self) -> None:
        config = self._config
        limit = (
            self.arena.total_frames
            if config.pool.limit is None
            else config.pool.limit // self._page_size
        )
        if self.writeback:
            limit = apply_limits(
                config, self.backed, self.writeback, self.zv, self._total_frames, self._ceiling
            )
        self.zv.limit_frames = min(limit, self._ceiling)
        self.frames.limit_frames = min(
            self.zv.limit_frames, self._total_frames * self.zv.policy_percent // 100
        )

    def wants_compaction(self) -> bool:
        """Say whether compaction would set free a sixteenth of the frames in use.

        And more than a few.
        """
        return self.allocator.freeable_frames() > max(self.frames.used_frames // 16, 256)

    def compact_step(self) -> int:
        """Move objects, COMPACT_MOVES at most; return how many."""
        before = self.allocator.objects_moved
        self.tmem.compact(self.zv, COMPACT_MOVES)
        return self.allocator.objects_moved - before

    def self_test(self) -> None:
        """Try allocator and codecs with pages of every kind (selftest.py).

        Raises:
            CorruptedPageError: a page does not come back as it was; the daemon must not serve then.
        """
        selftest.run(type(self.allocator), self._page_size)

    def check(self) -> None:
        """Prove the invariants of every part. Takes seconds for a full pool.

        Raises:
            InvariantError: naming what is wrong.
        """
        self.frames.check()
        self.allocator.check()
        self.tmem.check()
        self.zv.check(self.tmem.pampds(self.zv))
        if self.cache:
            self.cache.check()
        used, held = (
            self.frames.used_frames - self.frames.ephemeral_frames,
            self.allocator.used_frames(),
        )
        if used != held:
            raise InvariantError(f"{used} persistent frames in use, the allocator holds {held}")

    def statistics(self, *, ages_sampled: bool = True) -> CoreStatistics:
        """Return snapshots of all parts; what is cumulative counts from the first predecessor on.

        Args:
            ages_sampled: see `Writeback.statistics`; without, it takes as long for a large pool as
                for a small one.
        """
        zsmalloc, zbud = split(self.allocator.statistics())
        own = CoreStatistics(
            arena_kind=self.arena.kind,
            arena_backed_bytes=self.arena.backed_bytes(),
            frames=self.frames.statistics(),
            zsmalloc=zsmalloc,
            zbud=zbud,
            cache=self.cache.statistics(ages_sampled=ages_sampled) if self.cache else None,
            zv=self.zv.statistics(),
            tmem=self.tmem.statistics(),
            frontswap=self.frontswap.statistics(),
            recovery=self._recovery,
            devices=tuple(device.statistics() for device in self.devices.values()),
            backed=tuple(device.backed_statistics() for device in self.backed),
            transfers=self._transfers.statistics() if self._transfers else None,
            writeback=self.writeback.statistics(ages_sampled=ages_sampled)
            if self.writeback
            else None,
            recompression=self.recompression.statistics(),
            store_ages=self.ages.sample() if ages_sampled else (),
        )
        return counters_module.add(own, self._counters)

    def close(self) -> None:
        """Let go of the arena."""
        self.arena.close()
