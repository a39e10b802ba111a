# SPDX-License-Identifier: GPL-2.0-or-later
"""The synchronous core: all parts that a page goes through below FUSE, put together.

The parts are arena, frames, allocator, zv, tmem, frontswap and one block device a swap file. An
ephemeral half is added if cache volumes are possible (core/cache.py).

Only this file, core/cache.py and worker/assembly.py name concrete classes and know the
configuration. Every part below gets plain values. No function awaits. Only the jobs of
`begin_refill` block.

A Core is either new, with an arena of its own, or a successor's. A successor's arena is `inherited`
as a dead process left it, and `_recover` builds all else from it. A successor takes no memory
beyond that of its predecessor. The caller refills the reserve later.

The index has room for every page of every swap file. sizing.py has the sizes of all else.
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
from zswapd.core.frontends.frontswap import MAX_SWAPFILES, SWIZ_BITS, Frontswap, FrontswapStatistics
from zswapd.core.memory import StoreMemory
from zswapd.core.pam.accounts import NO_LIMIT
from zswapd.core.pam.recovery import free_dropped, recover
from zswapd.core.pam.zv import Zv
from zswapd.core.reclaim.ages import StoreAges
from zswapd.core.reclaim.duplicates import DuplicateSearch
from zswapd.core.reclaim.recompress import STRONGER, Recompression, populate_marks
from zswapd.core.sizing import adopt_arena, cache_frames, make_arena, reserve_frames
from zswapd.core.tmem.objnodes import NODE_BYTES, Objnodes, nodes_for
from zswapd.core.tmem.tmem import Tmem, TmemStatistics
from zswapd.errors import InvariantError
from zswapd.pages import ADDRESS_SPACE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
SPARE_PAGES_FACTOR = 4
"""Pages of files that come later, for which the index has address space: 4 times the memory."""
COMPACT_MOVES = 128
"""The most objects that one step of compaction moves.

They take about 0.5 ms, in which no page is served.
"""


def _ignore() -> None:
    """Ignore the progress of a takeover."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """The state that a successor gets from its predecessor, as plain values.

    Attributes:
        arena_fd: the arena's file. The caller keeps it.
        lost: bitmaps of lost pages by device, in shared memory, with the length of
            `lost_bitmap_bytes`. A device without one makes its own.
        tried: marks of pages that recompression has tried, by device, one byte a page. A device
            without them makes its own.
        more_marks: makes these marks when they are needed, or returns {}. None if the marks do not
            outlive the process.
        counters: the predecessor's statistics after `counters.export`; {} for none.
        alive: called repeatedly during the takeover, so that the watchdog sees progress.
        lost_copies: the second bitmaps of lost pages by device, as `lost`.
        arena_copy: contents of the arena's superblock, if the shared state has a copy.
        types: the swap type of each device, if files have come or gone since the start; {} for
            their order in the settings.
        made: bytes of each swap file at the start, by name, in the order of their types; None if
            they are those of the settings.
    """

    arena_fd: int
    lost: Mapping[str, memoryview] = field(default_factory=dict)
    tried: Mapping[str, memoryview] = field(default_factory=dict)
    counters: Mapping[str, Any] = field(default_factory=dict)
    alive: Callable[[], None] = _ignore
    more_marks: Callable[[], Mapping[str, memoryview]] | None = None
    lost_copies: Mapping[str, memoryview] = field(default_factory=dict)
    arena_copy: Mapping[str, Any] | None = None
    types: Mapping[str, int] = field(default_factory=dict)
    made: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class RecoveryStatistics:
    """Counts of takeovers from a dead process.

    Attributes:
        takeovers: number of takeovers.
        recovered_pages: pages that the last takeover found.
        seconds: duration of the last takeover.
        recovered_torn: stores that were cut short. They were never answered.
        recovered_duplicates: pages found twice. One copy was kept.
        freed_bodies: bodies that no header named.
        damaged: objects and zspages in a state that no death leaves. Memory must have changed by
            itself, and their contents are lost.
        poisoned: pages of the arena with an uncorrectable memory error. Their contents are lost and
            their memory was replaced.
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

    Of zsmalloc and zbud, only the allocator of swap is not None. `cache` is None without a cache.
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
    """None without a backing, as `transfers` is."""
    recompression: RecompressionStatistics
    store_ages: tuple[int, ...]
    """Pages of a sample by the time since they were stored (see `StoreAges`).

    Empty if no sample was taken.
    """


def store_codecs(config: Config) -> tuple[str, ...]:
    """Return the codecs for stores and recompressions from now on."""
    own = [client.compressor for client in config.clients.values() if client.compressor]
    return (config.pool.compressor, *own, *([STRONGER] if config.pool.recompress_age else []))


def _sizes_and_types(
    config: Config, types: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return bytes and swap type of each device, both in the order of the types."""
    sizes = dict(sorted(config.swap_files().items(), key=lambda one: types.get(one[0], 0)))
    return sizes, {name: types.get(name, place) for place, name in enumerate(sizes)}


def _make_nodes(config: Config, *, lenient: bool) -> list[Objnodes]:
    """Return the index nodes of the persistent half, and of the ephemeral half if there is one."""
    page_size, most = config.context.page_size, _NODE_RESERVE_BYTES // NODE_BYTES
    pages = [size // page_size for size in config.swap_files().values()]
    own = sum(nodes_for(count, 1 << SWIZ_BITS) for count in pages)
    # Files may come while the daemon runs. Address space costs nothing until it is populated.
    later = nodes_for(SPARE_PAGES_FACTOR * config.context.memory_total // page_size, 1 << SWIZ_BITS)
    capacities = [own + later + (MAX_SWAPFILES << SWIZ_BITS), cache_frames(config)]
    reserves = [min(own, most), min(capacities[1], most)]
    return [
        Objnodes(capacity, reserve=reserve, lenient=lenient)
        for capacity, reserve in zip(capacities, reserves, strict=True)
        if capacity
    ]


class Core:
    """All parts of a page's path below FUSE.

    Args:
        config: the settings.
        inherited: the state of a dead process to continue with; None for a new core.
        backing: the disk behind the pool; None without one.

    Attributes:
        devices: block devices by name, `swap` first.
        store_memory: says whether there is memory for the next stores.
        nodes: index nodes of swap. all_nodes: those of the cache too.
        cache: the ephemeral half; None if the settings rule out cache volumes.
        backed: the devices with slots: all of them, or none.
        writeback: chooses the pages that leave the pool for the disk; None without a disk.
        recompression: compresses pages again with a stronger codec.
        ages: samples of the time since pages were stored. all_ages: those of the cache too.

    Raises:
        ArenaError: there is no shared memory or no memory for the reserve, or an inherited arena
            was made for other settings.
        ConfigError: the compressor is unknown.
    """

    def __init__(
        self, config: Config, *, inherited: Inherited | None = None, backing: CoreDisk | None = None
    ) -> None:
        started = time.perf_counter()
        sizes, self._types = _sizes_and_types(config, inherited.types if inherited else {})
        self._page_size = page_size = config.context.page_size
        self._counters = dict(inherited.counters) if inherited else {}
        self._total_frames, self._ceiling = config.context.memory_total // page_size, 1 << 62
        self.arena = (
            adopt_arena(config, inherited.arena_fd, inherited.arena_copy, inherited.made)
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
        self.all_nodes = _make_nodes(config, lenient=inherited is not None)
        self.nodes = self.all_nodes[0]
        self._backing, self._transfers = backing, backing.transfers if backing else None
        self.store_memory = StoreMemory(
            self.frames,
            self.nodes,
            has_room=self.zv.has_room,
            is_disk_busy=self._transfers.is_busy if self._transfers else None,
        )
        self.tmem = Tmem(self.nodes, self.all_nodes[-1])
        self.frontswap = Frontswap(self.tmem, self.zv)
        self.cache = self._make_cache(config) if cache_frames(config) else None
        lost, copies = (inherited.lost, inherited.lost_copies) if inherited else ({}, {})
        self.backed = (
            backing.devices(sizes, self.frontswap, lost, page_size, copies, self._types)
            if backing
            else []
        )
        self.devices = self._make_devices(sizes, lost, copies)
        self.writeback = (
            backing.writeback(self.backed, self.frames, self.frontswap, self.zv)
            if backing
            else None
        )
        self.recompression = self._make_recompression(inherited)
        self._aged = list(self.devices.values())
        self.ages = StoreAges(self._aged, lambda: self.zv.newest)
        self.all_ages = [self.ages, self.cache.ages] if self.cache else [self.ages]
        self.apply(config)
        self._recovery = RecoveryStatistics()
        if inherited:
            self.frames.alive = inherited.alive
            self._recover(started)
            self.frames.alive = _ignore
        if not self.frames.used_frames and not self.frames.table.free_frames:
            # Only for an unused arena. An inherited arena in use has the reserve that its
            # predecessor left, and the kernel is not asked for more while requests wait.
            self.frames.refill_now()

    def _make_devices(
        self,
        sizes: Mapping[str, int],
        lost: Mapping[str, memoryview],
        copies: Mapping[str, memoryview],
    ) -> dict[str, Device]:
        """Return the block devices by name: those with a backing, or new ones."""
        return {device.name: device for device in self.backed} or {
            name: Device(
                name,
                size,
                self.frontswap,
                self._types[name],
                page_size=self._page_size,
                lost=lost.get(name),
                lost_copy=copies.get(name),
            )
            for name, size in sizes.items()
        }

    def add_device(
        self, name: str, size: int, swap_type: int, lost: memoryview, lost_copy: memoryview
    ) -> Device:
        """Add an empty device while the core is in use. `apply` has to follow.

        Args:
            name: see `Device`, as for the others.
            size: its bytes.
            swap_type: its frontswap type, which no other device has.
            lost: its bitmap of lost pages, all zeros.
            lost_copy: the second one.
        """
        self.zv.accounts.reset(swap_type)
        if self._backing and self.writeback:
            (device,) = self._backing.devices(
                {name: size},
                self.frontswap,
                {name: lost},
                self._page_size,
                {name: lost_copy},
                {name: swap_type},
                has_slots=False,
            )
            self.backed.append(device)
            self.writeback.changed()
            added: Device = device
        else:
            added = Device(
                name,
                size,
                self.frontswap,
                swap_type,
                page_size=self._page_size,
                lost=lost,
                lost_copy=lost_copy,
            )
        self.devices[name] = added
        self._aged.append(added)
        self._add_marks(added)
        return added

    def _add_marks(self, device: Device) -> None:
        """Give recompression marks of its own for a device; a pass populates their memory."""
        marks = mmap.mmap(-1, device.pages, ADDRESS_SPACE)
        self.recompression.add(device, memoryview(marks), lambda: populate_marks([marks]))

    def remove_device(self, name: str) -> None:
        """Remove a device that has no pages, with its counters."""
        device = self.devices.pop(name)
        self.recompression.remove(device)
        self._aged.remove(device)
        if self.writeback:
            self.backed[:] = [one for one in self.backed if one is not device]
            self.writeback.changed()
        self.frontswap.remove(device.swap_type)
        self.zv.set_client(device.swap_type, NO_LIMIT, 100, None)
        for part in ("devices", "backed"):
            self._counters.get(part, {}).pop(name, None)

    def resize_device(
        self, name: str, size: int, lost: memoryview, lost_copy: memoryview
    ) -> Device:
        """Change the size of a device that has no pages beyond it, and return the device.

        Args:
            name: the device.
            size: its new bytes.
            lost: its new bitmap of lost pages.
            lost_copy: the second one.
        """
        device = self.devices[name]
        self.recompression.remove(device)
        device.resize(size, lost, lost_copy)
        self._add_marks(device)
        if self.writeback:
            self.writeback.changed()
        return device

    def _make_allocator(self, config: Config, frames: PageFrames) -> ZsPool | ZbudPool:
        """Return a new allocator for the persistent half."""
        pool = config.pool
        return make_allocator(
            pool.allocator, frames, PERSISTENT, None, max_zspage_frames=pool.max_zspage_frames
        )

    def _make_cache(self, config: Config) -> CacheHalf:
        """Return a new ephemeral half; stores of the persistent half can evict it."""
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
        """Return the part that compresses pages again with a stronger codec.

        A device without inherited marks has marks of its own. Their memory is populated when a pass
        begins. They then move to memory that outlives the process, if the shared state has it.
        """
        marks = inherited.tried if inherited else {}
        # Swap out of a memfd is prevented only by the supervisor's lock, which it takes once, at
        # its start.
        more = inherited.more_marks if inherited and self.arena.kind == "tmpfs" else None
        own = {
            name: mmap.mmap(-1, device.pages, ADDRESS_SPACE)
            for name, device in self.devices.items()
            if name not in marks
        }
        names, zv, frames, writeback = list(self.devices), self.zv, self.frames, self.writeback

        def prepare() -> list[memoryview] | None:
            made = more() if more is not None else {}
            if not made:
                populate_marks(own.values())
                return None
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
        """Rebuild frames, allocator, zv, index and devices from the arena.

        Raises:
            ArenaError: no memory for the index. The arena is as good as before, for another try.
        """
        wrong = self.frames.adopt()
        reach(crashpoints.TAKEOVER_FRAMES)
        wrong += self.allocator.adopt() + self._drop_renewed()
        reach(crashpoints.TAKEOVER_ZSPAGES)
        findings = recover(self.zv, self.frontswap)
        reach(crashpoints.TAKEOVER_INDEXED)
        damaged = wrong + findings.damaged
        # This comes before any damaged object is freed: after a death in between, the next process
        # must not trust the rest.
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
        """Free objects that lost memory to an uncorrectable error; return their number.

        The header of a lost body then names no body, which recovery counts as damage.
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
        """Apply the settings that can change at run time.

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
        self._apply_clients(config)
        self.recompression.age_s = pool.recompress_age
        if self.cache:
            self.cache.zbuds.compressor = self.zv.compressor
            self.cache.zbuds.checksum = pool.checksum
            self.cache.eviction.limit_frames = min(
                (config.cache.limit or 0) // self._page_size, self._total_frames // 2
            )

    def _apply_clients(self, config: Config) -> None:
        """Apply the settings that each swap file has for itself."""
        percent = config.pool.accept_threshold_percent
        for name, device in self.devices.items():
            client = config.client(name)
            device.weight = client.weight
            device.limit_bytes = NO_LIMIT if client.limit is None else client.limit
            device.is_kept = client.writeback == "never" or not device.has_slots
            # Without a disk, nothing drains a file that was refused: it is accepted as soon as it
            # is below its limit.
            self.zv.set_client(
                device.swap_type,
                device.limit_bytes,
                percent if self.writeback and not device.is_kept else 100,
                compress.get(client.compressor) if client.compressor else None,
            )
        if self.writeback:
            self.writeback.shares.accept_percent = percent

    def bound(self, frames: int) -> None:
        """Limit the frames of swap's pages, whatever the settings say; frames in use are kept."""
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
        """Return whether compaction would free over 1/16 of the used frames, and over 256."""
        return self.allocator.freeable_frames() > max(self.frames.used_frames // 16, 256)

    def compact_step(self) -> int:
        """Move at most COMPACT_MOVES objects; return the number of moves."""
        before = self.allocator.objects_moved
        self.tmem.compact(self.zv, COMPACT_MOVES)
        return self.allocator.objects_moved - before

    def duplicate_search(self, devices: Sequence[Device]) -> DuplicateSearch:
        """Return a search for equal pages of some devices."""
        return DuplicateSearch(
            devices,
            self.allocator.memory,
            self.zv.key_of,
            page_size=self._page_size,
            stored=self.zv.statistics().curr_pages,
        )

    def self_test(self) -> None:
        """Test allocator and codecs with pages of every kind (selftest.py).

        Raises:
            CorruptedPageError: a page differs after loading. The daemon must not serve then.
        """
        selftest.run(type(self.allocator), self._page_size)

    def check(self) -> None:
        """Verify the invariants of every part; takes seconds for a full pool.

        Raises:
            InvariantError: the message names the fault.
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
        """Return snapshots of all parts; cumulative counts begin with the first predecessor.

        Args:
            ages_sampled: see `Writeback.statistics`. Without samples, the time does not depend on
                the size of the pool.
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
        """Release the arena."""
        self.arena.close()
