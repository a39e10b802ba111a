# SPDX-License-Identifier: GPL-2.0-or-later
"""What is told of the traffic with the backing: one snapshot, and which of its counts a successor goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from zswapd import counters


@dataclass(frozen=True, slots=True)
class TransferStatistics:
    """Traffic with the backing, in pages (zram's bd_reads and bd_writes).

    Attributes:
        bd_reads, bd_writes: pages read and written.
        read_requests, write_requests: system calls that took.
        failed_reads, failed_writes: of these, those that failed.
        refused_writes: pages turned away because buffers, slot or device were not to be had.
        in_flight: requests under way.
        free_buffers: pages that there is room for now; all that there is when nothing is under way.
        held_slots: slots that a predecessor's request may still write.
        avoided_slots: slots left alone since they failed.
        degraded: writes are refused, since the device is in trouble.
    """

    bd_reads: int
    bd_writes: int
    read_requests: int
    write_requests: int
    failed_reads: int
    failed_writes: int
    refused_writes: int
    in_flight: int
    free_buffers: int
    held_slots: int
    avoided_slots: int
    degraded: bool


counters.declare(
    TransferStatistics,
    cumulative="bd_reads bd_writes read_requests write_requests failed_reads failed_writes refused_writes",
)
