# SPDX-License-Identifier: GPL-2.0-or-later
"""What volumes count."""

from __future__ import annotations

from dataclasses import dataclass, fields

from zswapd import counters


@dataclass(slots=True)
class VolumeCounters:
    """The counts that only grow; what each means is in `VolumeStatistics`."""

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
    """One volume. The kernel's page cache answers most reads before anybody counts them here.

    Attributes:
        name: of the volume.
        size: bytes of the backing file.
        pages: pages that cleancache has.
        pending: requests under way.
        hits: reads for which cleancache had every page.
        misses: all others; a page of many that is missing makes it a miss.
        read_bytes: of both.
        bypassed_bytes: missing pages that were not kept, since a long sequential stream asked for
            them.
        shared_reads: requests that joined a read that was under way.
        backing_reads, backing_read_bytes: reads of the backing file.
        backing_writes, written_bytes: writes to it.
        read_errors, write_errors: requests that it failed.
        drops: times when everything was let go, by command or since it had changed.
        turned_away: requests answered with an error since too many waited.
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
