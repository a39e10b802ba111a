# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the core that has to do with the disk behind the pool.

Devices with slots, who writes back, and the limits.

Only there when a backing is configured; core/core.py puts it in place of plain devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zswapd.config.loader import BACKED_LIMIT_PERCENT
from zswapd.core.block.backed import BackedDevice
from zswapd.core.block.slotmap import SlotMap
from zswapd.core.reclaim.writeback import Writeback

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zswapd.config import Config
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.backing.transfers import Transfers
    from zswapd.core.frontends.frontswap import Frontswap
    from zswapd.core.pam.zv import Zv

RESERVE_LOW_DIVISOR = 8
"""The reserve is low with less than 1/8 of `reserve_target` free."""


@dataclass(frozen=True, slots=True)
class CoreDisk:
    """The disk behind the pool, as a core is given it.

    Attributes:
        transfers: how pages get to their slots and back.
        maps: which pages are in their slots, by device: memory that outlives the process,
            `sizing.slot_map_sizes` long.
        witnesses: the bits beside them, `sizing.witness_sizes` long; a device without some has its
            own.
    """

    transfers: Transfers
    maps: Mapping[str, memoryview]
    witnesses: Mapping[str, memoryview] = field(default_factory=dict)

    def devices(
        self,
        sizes: Mapping[str, int],
        frontswap: Frontswap,
        lost: Mapping[str, memoryview],
        page_size: int,
        lost_copies: Mapping[str, memoryview] | None = None,
    ) -> list[BackedDevice]:
        """Return the devices, in the order of their types.

        Their slots follow each other in that order.

        Args:
            sizes: bytes of each, by name.
            frontswap: where pages go first.
            lost: see `Device`.
            page_size: bytes in a page.
            lost_copies: see `Device`.
        """
        made: list[BackedDevice] = []
        base = 0
        for name, size in sizes.items():
            device = BackedDevice(
                name,
                size,
                frontswap,
                len(made),
                page_size=page_size,
                lost=lost.get(name),
                lost_copy=(lost_copies or {}).get(name),
                slots=SlotMap(self.maps[name], base, self.witnesses.get(name)),
                transfers=self.transfers,
            )
            made.append(device)
            base += size // page_size
        return made

    def writeback(
        self, devices: Sequence[BackedDevice], frames: PageFrames, frontswap: Frontswap, zv: Zv
    ) -> Writeback:
        """Return who chooses what leaves the pool."""
        transfers = self.transfers

        def uses() -> int:
            front = frontswap.statistics()
            return front.succ_stores + front.loads

        return Writeback(
            devices,
            page_size=frames.page_size,
            used=lambda: frames.used_frames - frames.ephemeral_frames,
            uses=uses,
            raw_pages=lambda: zv.raw_pages,
            is_short=lambda: (
                frames.table.free_frames < frames.reserve_target // RESERVE_LOW_DIVISOR
            ),
            accepts=lambda: transfers.accepts(-1, buffers=transfers.buffers // 4),
        )


def apply_limits(
    config: Config,
    devices: Sequence[BackedDevice],
    writeback: Writeback,
    zv: Zv,
    total_frames: int,
    ceiling: int,
) -> int:
    """Take over the settings of the pool that mean something else with a disk behind it.

    Return the pool's limit in frames.

    Args:
        config: the settings.
        devices: whose pages that do not compress the pool takes where the disk does not, or does
            not.
        writeback: bound by them, as is
        zv: the pool.
        total_frames: of the system's memory.
        ceiling: frames that the pool may take, whatever the settings say.
    """
    pool, backing = config.pool, config.backing
    limit = (
        total_frames * BACKED_LIMIT_PERCENT // 100
        if pool.limit is None
        else pool.limit // config.context.page_size
    )
    # Whichever is lower is where the pool is full.
    bound = min(limit, total_frames * pool.zv_page_count_policy_percent // 100, ceiling)
    zv.accept_frames = bound * pool.accept_threshold_percent // 100
    writeback.limit_frames = bound if backing.writeback else 1 << 62
    writeback.promotes = backing.promote
    writeback.accept_percent = pool.accept_threshold_percent
    writeback.idle_s = backing.idle_age if backing.writeback else 0
    goes_through = pool.incompressible == "auto"
    zv.keep_poor = pool.incompressible == "store"
    for device in devices:
        device.poor_pool = zv if goes_through else None
    # What had to be stored since the disk did not take it goes there as soon as it does.
    raw = (
        (0 if goes_through else None)
        if backing.incompressible_limit is None
        else backing.incompressible_limit
    )
    raw = raw if backing.writeback else None
    writeback.raw_limit = 1 << 62 if raw is None else raw // config.context.page_size
    writeback.budget = backing.budget or 0
    return limit
