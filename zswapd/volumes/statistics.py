# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters of volumes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from zswapd import counters


@dataclass(slots=True)
class VolumeCounters:
    """Counters that only grow; `VolumeStatistics` explains each."""

    hits: int = 0
    misses: int = 0
    read_bytes: int = 0
    bypassed_bytes: int = 0
    shared_reads: int = 0
    backing_reads: int = 0
    backing_read_bytes: int = 0
    backing_writes: int = 0
    written_bytes: int = 0
    read_errors: int = 0
    write_errors: int = 0
    drops: int = 0
    turned_away: int = 0

    def note_read(self, size: int, missing: int, *, is_bypassing: bool) -> None:
        """Count a read of `size` bytes, of which pages of `missing` bytes were not cached."""
        self.read_bytes += size
        if not missing:
            self.hits += 1
            return
        self.misses += 1
        if is_bypassing:
            self.bypassed_bytes += missing


@dataclass(frozen=True, slots=True)
class VolumeStatistics:
    """One volume's state and counters. Reads that the kernel's page cache answers are not counted.

    Attributes:
        name: of the volume.
        size: bytes of the backing file.
        pages: pages in cleancache.
        pending: requests under way.
        hits: reads for which cleancache had every page.
        misses: all other reads; one missing page makes a miss.
        read_bytes: bytes of hits and misses.
        bypassed_bytes: bytes of missing pages that were not kept, because a long sequential stream
            asked for them.
        shared_reads: requests that joined a read under way.
        backing_reads, backing_read_bytes: reads of the backing file, and their bytes.
        backing_writes, written_bytes: writes to the backing file, and their bytes.
        read_errors, write_errors: requests that failed because of the backing file.
        drops: times that all cached pages were dropped, on command or after a change.
        turned_away: requests refused because too many requests were waiting.
    """

    name: str
    size: int
    pages: int
    pending: int
    hits: int
    misses: int
    read_bytes: int
    bypassed_bytes: int
    shared_reads: int
    backing_reads: int
    backing_read_bytes: int
    backing_writes: int
    written_bytes: int
    read_errors: int
    write_errors: int
    drops: int
    turned_away: int


counters.declare(
    VolumeStatistics, cumulative=" ".join(field.name for field in fields(VolumeCounters))
)
