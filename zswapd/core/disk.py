# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the core for a disk behind the pool: devices with slots, writeback, and limits.

It exists only if a backing is configured. core.py then uses these devices instead of plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zswapd.config.loader import BACKED_LIMIT_PERCENT
from zswapd.core.block.backed import BackedDevice
from zswapd.core.block.slotmap import SlotMap, slot_map_bytes
from zswapd.core.reclaim.writeback import Writeback

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zswapd.config import Config
    from zswapd.core.allocators.pageframes import PageFrames
    from zswapd.core.backing.transfers import Transfers
    from zswapd.core.frontends.frontswap import Frontswap
    from zswapd.core.pam.zv import Zv

NO_SLOTS = 1 << 50
"""The base of a device without slots."""
RESERVE_LOW_DIVISOR = 8
"""The divisor for a low reserve: less than 1/8 of `reserve_target` is free."""


@dataclass(frozen=True, slots=True)
class CoreDisk:
    """The disk behind the pool, as an argument of a core.

    Attributes:
        transfers: writes pages to their slots and reads them.
        maps: the slot maps by device: which pages are in their slots. The memory outlives the
            process and has the length of `sizing.slot_map_sizes`.
        witnesses: the witness bits beside the maps, with the length of `sizing.witness_sizes`. A
            device without them makes its own.
        bases: the first slot of each device, if files have come or gone since the start; {} for
            slots in the order of the devices.
    """

    transfers: Transfers
    maps: Mapping[str, memoryview]
    witnesses: Mapping[str, memoryview] = field(default_factory=dict)
    bases: Mapping[str, int] = field(default_factory=dict)

    def devices(
        self,
        sizes: Mapping[str, int],
        frontswap: Frontswap,
        lost: Mapping[str, memoryview],
        page_size: int,
        lost_copies: Mapping[str, memoryview] | None = None,
        types: Mapping[str, int] | None = None,
        *,
        has_slots: bool = True,
    ) -> list[BackedDevice]:
        """Return the devices in the order of their swap types.

        Their slots follow each other in that order. A device without a slot map has no slots.

        Args:
            sizes: bytes of each device, by name.
            frontswap: the pool, which gets pages first.
            lost: see `Device`.
            page_size: bytes of a page.
            lost_copies: see `Device`.
            types: the swap types; None for the order of `sizes`.
            has_slots: False for devices that have no slots, whatever their names.
        """
        made: list[BackedDevice] = []
        base = 0
        for name, size in sizes.items():
            # A base beyond all slots: no transfer is taken for one of this device.
            words = self.maps.get(name) if has_slots else None
            first = self.bases.get(name, base) if words is not None else NO_SLOTS
            device = BackedDevice(
                name,
                size,
                frontswap,
                types[name] if types else len(made),
                page_size=page_size,
                lost=lost.get(name),
                lost_copy=(lost_copies or {}).get(name),
                slots=SlotMap(
                    memoryview(bytearray(slot_map_bytes(size, page_size)))
                    if words is None
                    else words,
                    first,
                    self.witnesses.get(name) if words is not None else None,
                ),
                transfers=self.transfers,
                has_slots=words is not None,
            )
            made.append(device)
            base += size // page_size
        return made

    def writeback(
        self, devices: Sequence[BackedDevice], frames: PageFrames, frontswap: Frontswap, zv: Zv
    ) -> Writeback:
        """Return the part that chooses which pages leave the pool."""
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
    """Apply the settings of the pool that have another meaning with a disk behind it.

    Args:
        config: the settings.
        devices: get the pool for incompressible pages that the disk does not take, if the settings
            say so.
        writeback: gets its limits.
        zv: the pool.
        total_frames: memory of the system in frames.
        ceiling: frames that the pool may take, whatever the settings say.

    Returns:
        The limit of the pool in frames.
    """
    pool, backing = config.pool, config.backing
    limit = (
        total_frames * BACKED_LIMIT_PERCENT // 100
        if pool.limit is None
        else pool.limit // config.context.page_size
    )
    # The pool is full at the lowest of these bounds.
    bound = min(limit, total_frames * pool.zv_page_count_policy_percent // 100, ceiling)
    zv.accept_frames = bound * pool.accept_threshold_percent // 100
    writeback.limit_frames = bound if backing.writeback else 1 << 62
    writeback.promotes = backing.promote
    writeback.accept_percent = pool.accept_threshold_percent
    writeback.idle_s = backing.idle_age if backing.writeback else 0
    goes_through = pool.incompressible == "auto"
    zv.keep_poor = pool.incompressible == "store"
    zv.takes_poor = pool.incompressible != "refuse"
    for device in devices:
        device.poor_pool = zv if goes_through else None
    # Pages stored only because the disk did not take them go to the disk as soon as it takes them.
    raw = (
        (0 if goes_through else None)
        if backing.incompressible_limit is None
        else backing.incompressible_limit
    )
    raw = raw if backing.writeback else None
    writeback.raw_limit = 1 << 62 if raw is None else raw // config.context.page_size
    writeback.budget = backing.budget or 0
    return limit
