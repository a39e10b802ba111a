# SPDX-License-Identifier: GPL-2.0-or-later
"""The metric families of Prometheus, made from one snapshot. This module counts nothing itself.

Names follow Prometheus' rules: the prefix `zswapd_`, base units, and `_total` for counters. A
counter only grows, also across workers. HELP ends with the kernel's name of the counter, if it has
one. Labels are bounded: reasons, protections, files, volumes, and size classes in use.

A new counter is a row of ROWS. If a part of the daemon is absent, its snapshot is None and its rows
are left out. `described` yields all families that can exist. docs/metrics.md is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

from zswapd.core.pam.base import RejectReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from zswapd.fuse.held import HeldStatistics
    from zswapd.fuse.session import LatencyStatistics
    from zswapd.metrics.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: one value of the snapshot, or several values that differ in a label.

    Attributes:
        name: without the prefix `zswapd_`; the ending `_total` makes it a counter.
        help: the meaning; parentheses at the end hold the kernel's name of the counter.
        paths: the path of fields to the value, or a path for each value of the label.
        label: name of the label, empty if there is one value only.
        in_frames: the value counts page frames, and the metric is in bytes.
    """

    name: str
    help: str
    paths: str | Mapping[str, str]
    label: str = ""
    in_frames: bool = False


ROWS = (
    Row("uptime_seconds", "Time since the first worker started.", "worker.uptime_seconds"),
    Row("workers_started_total", "Worker processes that have served, including the present one.",
        "worker.number"),
    Row("worker_deaths_total", "Workers that ended without being told to.", "worker.deaths"),
    Row("worker_broken_total", "Workers that ended themselves after an internal error.",
        "worker.broken"),
    Row("takeover_seconds",
        "Time that the present worker needed to take over and serve; 0 for the first.",
        "worker.takeover_seconds"),
    Row("supervised", "1 if the supervisor will start another worker when this one ends.",
        "worker.supervised"),
    Row("poisoned_requests_total",
        "Requests answered with EIO because they killed one worker after another.",
        "worker.poisoned_requests"),
    Row("requests_total", "FUSE requests, by operation.",
        {"read": "fuse.reads", "write": "fuse.writes", "discard": "fuse.discards",
         "other": "fuse.others"}, "operation"),
    Row("request_bytes_total", "Bytes read and written by FUSE requests.",
        {"read": "fuse.read_bytes", "write": "fuse.written_bytes"}, "operation"),
    Row("request_errors_total", "FUSE requests answered with an errno, including refused writes.",
        "fuse.request_errors"),
    Row("held_writes_total", "FUSE writes that waited for a refill of the reserve.",
        "fuse.held.held"),
    Row("expired_writes_total", "FUSE writes that waited for memory in vain.",
        "fuse.held.expired"),
    Row("failed_requests_total", "FUSE requests that failed with an error the daemon knows.",
        "fuse.failed_requests"),
    Row("internal_errors_total", "FUSE requests that failed because of a bug in the daemon.",
        "fuse.internal_errors"),
    Row("resent_requests_total",
        "FUSE requests sent again because a worker died before it answered them.",
        "fuse.resent"),
    Row("poll_seconds_total", "Time spent polling for the next FUSE request.", "fuse.poll_seconds"),
    Row("reads_ahead_total",
        "Read-aheads: the next pages of a sequential reader were fetched early.",
        "fuse.reads_ahead"),
    Row("reads_ahead_hits_total", "Read-aheads whose pages the reader then requested.",
        "fuse.reads_ahead_hits"),
    Row("frontswap_stores_total", "Pages stored (succ_stores).", "core.frontswap.succ_stores"),
    Row("frontswap_failed_stores_total", "Pages refused (failed_stores).",
        "core.frontswap.failed_stores"),
    Row("frontswap_loads_total", "Pages loaded (loads).", "core.frontswap.loads"),
    Row("frontswap_failed_loads_total", "Loads of pages that are not stored; they read as zeros.",
        "core.frontswap.failed_loads"),
    Row("frontswap_invalidates_total",
        "Pages dropped because the kernel freed their swap slot (invalidates).",
        "core.frontswap.invalidates"),
    Row("frontswap_frozen", "1 while `zswapctl freeze` makes the daemon refuse stores.",
        "core.frontswap.frozen"),
    Row("stored_pages", "Pages that the pool holds now.", "core.zv.curr_pages"),
    Row("same_filled_pages", "Stored pages that repeat one word and need no object data.",
        "core.zv.curr_same_filled"),
    Row("incompressible_pages", "Stored pages that are kept uncompressed.",
        "core.zv.curr_incompressible"),
    Row("stored_object_bytes", "Bytes of stored objects, including headers.",
        "core.zv.curr_object_bytes"),
    Row("stored_compressed_bytes", "Bytes of compressed data of stored pages.",
        "core.zv.curr_zbytes"),
    Row("poor_pages_total",
        "Pages that compress to more than zv_max_zsize (compress_poor), or that came while the "
        "mean was above zv_max_mean_zsize (mean_compress_poor).",
        {"compress_poor": "core.zv.compress_poor",
         "mean_compress_poor": "core.zv.mean_compress_poor"}, "reason"),
    Row("damaged_pages_total", "Loads that found a damaged page.", "core.zv.corrupted"),
    Row("page_size_bytes", "Size of a page.", "core.frames.page_size"),
    Row("arena_bytes", "Memory of the arena: stored pages, reserve and frame table.",
        "core.arena_backed_bytes"),
    Row("pool_bytes", "Memory of page frames that hold objects.",
        "core.frames.used_frames", in_frames=True),
    Row("pool_max_bytes", "Highest value of zswapd_pool_bytes so far.",
        "core.frames.used_frames_max", in_frames=True),
    Row("pool_limit_bytes", "Limit of the memory for page frames that hold objects.",
        "core.frames.limit_frames", in_frames=True),
    Row("reserve_bytes", "Free memory in the reserve, in runs of frames that can serve any store.",
        "core.frames.reserve_frames", in_frames=True),
    Row("reserve_target_bytes", "Target size of the reserve.",
        "core.frames.reserve_target_frames", in_frames=True),
    Row("refilled_bytes_total", "Memory taken from the system to refill the reserve.",
        "core.frames.refilled_frames", in_frames=True),
    Row("trimmed_bytes_total", "Memory of free frames returned to the system.",
        "core.frames.trimmed_frames", in_frames=True),
    Row("cost_bytes",
        "Memory of the daemon beside pool and cache, by part; their sum is what it costs.",
        {part: f"cost.{part}_bytes" for part in
         ("supervisor", "worker", "spare", "code", "index", "state", "ready")}, "part"),
    Row("effective_ratio",
        "Size of stored and cached pages divided by all memory of the daemon; 0 without pages.",
        "cost.effective_ratio"),
    Row("failed_get_free_pages_total",
        "Frame requests refused because no populated run was long enough (failed_get_free_pages).",
        "core.frames.failed_get_free_pages"),
    Row("zsmalloc_objects", "Objects in zsmalloc.", "core.zsmalloc.objects"),
    Row("zsmalloc_zspages", "zspages in zsmalloc.", "core.zsmalloc.zspages"),
    Row("zsmalloc_bytes", "Memory of all zspages.", "core.zsmalloc.used_frames", in_frames=True),
    Row("zsmalloc_compacted_bytes_total",
        "Memory freed by compaction of zsmalloc (pages_compacted).",
        "core.zsmalloc.pages_compacted", in_frames=True),
    Row("zsmalloc_objects_moved_total", "Objects that compaction of zsmalloc moved.",
        "core.zsmalloc.objects_moved"),
    Row("zbud_frames",
        "Page frames of zbud that hold two objects (zbud_buddied_count) or a whole page.",
        {"two": "core.zbud.zbud_buddied_count", "page": "core.zbud.bodies"}, "objects"),
    Row("zbud_compacted_bytes_total", "Memory freed by compaction of zbud (pages_compacted).",
        "core.zbud.pages_compacted", in_frames=True),
    Row("tmem_objects", "Objects in the tmem index (curr_obj_count).", "core.tmem.curr_obj_count"),
    Row("tmem_objnodes", "Nodes of the tmem index (curr_objnode_count).",
        "core.tmem.curr_objnode_count"),
    Row("tmem_objnode_bytes", "Memory of the tmem index.", "core.tmem.objnode_bytes"),
    Row("tmem_flushes_total", "Requests to flush a page from the tmem index (flush_total).",
        "core.tmem.flush_total"),
    Row("tmem_flushes_found_total", "Requests to flush a page that found the page (flush_found).",
        "core.tmem.flush_found"),
    Row("tmem_object_flushes_total",
        "Requests to flush an object from the tmem index (flobj_total).",
        "core.tmem.flobj_total"),
    Row("tmem_object_flushes_found_total",
        "Requests to flush an object that found the object (flobj_found).",
        "core.tmem.flobj_found"),
    Row("tmem_failed_puts_total",
        "Puts that tmem refused, by kind of pool (failed_pers_puts, failed_eph_puts).",
        {"persistent": "core.tmem.failed_pers_puts",
         "ephemeral": "core.tmem.failed_eph_puts"}, "pool"),
    Row("tmem_puts_flushed_total",
        "Refused puts that flushed an older copy of the page (put_to_flush).",
        "core.tmem.put_to_flush"),
    Row("recovered_pages", "Pages that the last takeover found.", "core.recovery.recovered_pages"),
    Row("recovered_damaged_total", "Damaged objects that takeovers found; their pages are lost.",
        "core.recovery.damaged"),
    Row("recovered_poisoned_pages_total",
        "Pages of the arena that takeovers found poisoned by uncorrectable memory errors.",
        "core.recovery.poisoned"),
    Row("recompressed_pages_total", "Pages kept in a second, stronger compression.",
        "core.zv.recompressed"),
    Row("recompress_saved_bytes_total", "Bytes of compressed data saved by recompression.",
        "core.zv.recompress_saved_bytes"),
    Row("recompress_tried_pages_total", "Pages that recompression tried, with or without success.",
        "core.recompression.tried"),
    Row("recompress_in_vain_pages_total",
        "Pages that recompression tried and left alone because it gained too little.",
        "core.recompression.in_vain"),
    Row("pool_limit_hits_total",
        "Pages refused because the pool was at its limit (pool_limit_hit).",
        "core.zv.pool_limit_hit"),
    Row("backing_degraded",
        "1 while the disk behind the pool is in trouble and the pool works without it.",
        "core.transfers.degraded"),
    Row("backing_read_pages_total", "Pages read from the disk behind the pool (bd_reads).",
        "core.transfers.bd_reads"),
    Row("backing_written_pages_total", "Pages written to the disk behind the pool (bd_writes).",
        "core.transfers.bd_writes"),
    Row("backing_requests_total", "Requests to the disk behind the pool, by operation.",
        {"read": "core.transfers.read_requests", "write": "core.transfers.write_requests"},
        "operation"),
    Row("backing_errors_total", "Requests to the disk behind the pool that failed, by operation.",
        {"read": "core.transfers.failed_reads", "write": "core.transfers.failed_writes"},
        "operation"),
    Row("backing_refused_pages_total",
        "Pages not written to the disk because no buffer, slot or disk was available.",
        "core.transfers.refused_writes"),
    Row("backing_in_flight_requests", "Requests to the disk behind the pool that are in flight.",
        "core.transfers.in_flight"),
    Row("backing_avoided_slots", "Slots of the disk that are not used because they failed.",
        "core.transfers.avoided_slots"),
    Row("backing_held_slots", "Slots of the disk that a request of a dead worker may still write.",
        "core.transfers.held_slots"),
    Row("writeback_sent_pages_total", "Pages that writeback sent to the disk, by trigger.",
        {"command": "core.writeback.by_command",
         "incompressible": "core.writeback.by_incompressible",
         "file": "core.writeback.by_file",
         "limit": "core.writeback.by_limit", "reserve": "core.writeback.by_reserve",
         "age": "core.writeback.by_age"}, "trigger"),
    Row("writeback_budget_bytes",
        "Limit of bytes that writeback may write in a day; 0 for no limit.",
        "core.writeback.budget_bytes"),
    Row("writeback_budget_left_bytes", "Bytes that writeback may still write today.",
        "core.writeback.budget_left_bytes"),
    Row("writeback_budget_stops_total", "Times that the daily budget of writeback was used up.",
        "core.writeback.budget_stops"),
    Row("writeback_oldest_age_seconds",
        "Upper bound of the time since the last use of the pool's oldest pages.",
        "core.writeback.oldest_age_s"),
    Row("cache_bytes", "Memory of page frames that hold pages of cache volumes.",
        "core.cache.frames", in_frames=True),
    Row("cache_limit_bytes", "Limit of the cache's memory while memory is plentiful.",
        "shrinker.limit_frames", in_frames=True),
    Row("cache_ceiling_bytes", "Limit of the cache's memory now.",
        "shrinker.ceiling_frames", in_frames=True),
    Row("cache_pages", "Pages of cache volumes in the cache (zbud_curr_zpages).",
        "core.cache.zbuds.zbud_curr_zpages"),
    Row("cache_compressed_bytes", "Bytes of compressed data in the cache (zbud_curr_zbytes).",
        "core.cache.zbuds.zbud_curr_zbytes"),
    Row("cleancache_gets_total",
        "Pages requested from the cache, found or missing (succ_gets, failed_gets).",
        {"found": "core.cache.cleancache.succ_gets",
         "missing": "core.cache.cleancache.failed_gets"}, "result"),
    Row("cleancache_puts_total", "Pages put into the cache (puts).", "core.cache.cleancache.puts"),
    Row("cleancache_failed_puts_total", "Pages that the cache refused.",
        "core.cache.cleancache.failed_puts"),
    Row("cleancache_invalidates_total", "Pages of the cache dropped by invalidation (invalidates).",
        "core.cache.cleancache.invalidates"),
    Row("cache_evicted_pages_total",
        "Pages of the cache evicted to use their frames for something else.",
        "core.cache.zbuds.evicted_zpages"),
    Row("cache_evicted_bytes_total",
        "Memory of frames freed by eviction from the cache (evicted_raw_pages).",
        "core.cache.zbuds.evicted_raw_pages", in_frames=True),
    Row("cache_damaged_pages_total",
        "Gets from the cache that found a damaged page; the backing file served the reader.",
        "core.cache.zbuds.corrupted"),
    Row("shrinks_total", "Times that the cache began to give memory back, by reason.",
        {"low_memory": "shrinker.shrinks.low_memory",
         "stalled": "shrinker.shrinks.stalled", "limit": "shrinker.shrinks.limit",
         "command": "shrinker.shrinks.command"}, "reason"),
    Row("shrunk_bytes_total", "Memory that the cache gave back.",
        "shrinker.evicted_frames", in_frames=True),
    Row("shrink_batches_total", "Batches in which the cache gave memory back.", "shrinker.batches"),
    Row("shrink_batch_seconds_total",
        "Time of all shrink batches; no page is served during a batch.",
        "shrinker.batch_seconds"),
    Row("shrink_batch_max_seconds", "Time of the longest shrink batch.",
        "shrinker.longest_batch_s"),
    Row("file_changes_total",
        "Commands that changed the swap files while the daemon ran, and refused ones.",
        {"added": "files.added", "removed": "files.removed", "resized": "files.resized",
         "refused": "files.refused"}, "result"),
    Row("control_requests_total", "Requests on the control socket.", "control.requests"),
    Row("control_refused_total", "Invalid requests on the control socket.", "control.refused"),
    Row("memory_stall_seconds_total",
        "Time in which some or all tasks of the system waited for memory (PSI).",
        {"some": "pressure.some_seconds", "full": "pressure.full_seconds"}, "tasks"),
    Row("memory_stalls_total",
        "Times that tasks waited for memory longer than the PSI trigger's threshold.",
        "pressure.triggers"),
    Row("memory_limit_bytes",
        "Limit of the memory cgroup above the daemon that leaves the least room; 0 for none.",
        "pressure.limit_bytes"),
    Row("memory_limit_left_bytes", "Bytes that may still be charged to that memory cgroup.",
        "pressure.limit_left_bytes"),
)  # fmt: skip
"""The metrics whose value is a field of the snapshot."""

FILE_ROWS = (
    ("file_size_bytes", "Size of a swap file.", "size"),
    ("file_stored_pages", "Pages of a swap file that are stored.", "stored_pages"),
    (
        "file_object_bytes",
        "Bytes that the stored pages of a swap file take in the pool, including headers.",
        "object_bytes",
    ),
    (
        "file_limit_bytes",
        "Limit of the bytes that the pages of a swap file may take in the pool; 0 for no limit.",
        "limit_bytes",
    ),
    (
        "file_limit_hits_total",
        "Pages of a swap file that the pool refused because the file was at its limit.",
        "limit_hits",
    ),
    ("file_hits_total", "Pages of a swap file that were read from the pool.", "hits"),
    (
        "file_disk_reads_total",
        "Pages of a swap file that were read from the disk behind the pool.",
        "disk_reads",
    ),
    ("file_lost_pages", "Lost pages of a swap file; a read of one gets EIO.", "lost_pages"),
    ("file_pages_read_total", "Pages read from a swap file.", "pages_read"),
    ("file_pages_written_total", "Pages written to a swap file.", "pages_written"),
    ("file_pages_discarded_total", "Pages discarded from a swap file.", "pages_discarded"),
    ("file_refused_writes_total", "Writes to a swap file that were refused.", "refused_writes"),
    ("file_failed_reads_total", "Reads of a swap file that failed.", "failed_reads"),
)
BACKED_ROWS = (
    ("file_backed_pages", "Pages of a swap file that are only on the disk (bd_count).", "bd_count"),
    (
        "file_written_back_pages_total",
        "Pages of a swap file that moved from the pool to the disk.",
        "written_back_pages",
    ),
    (
        "file_written_through_pages_total",
        "Pages of a swap file that the pool refused and that went to the disk at once.",
        "written_through_pages",
    ),
    (
        "file_promoted_pages_total",
        "Pages of a swap file that moved from the disk back to the pool.",
        "promoted_pages",
    ),
    (
        "file_kept_pages_total",
        "Pages written to the disk in vain, because they changed or were used meanwhile.",
        "kept_pages",
    ),
    (
        "file_failed_slots_total",
        "Pages of a swap file whose disk slot could not be written.",
        "failed_slots",
    ),
    (
        "file_bad_slots_total",
        "Pages of a swap file that the disk returned damaged or not at all.",
        "bad_slots",
    ),
)
VOLUME_ROWS = (
    ("volume_size_bytes", "Size of a cache volume.", "size"),
    ("volume_pages", "Pages of a cache volume that are in the cache.", "pages"),
    ("volume_pending_requests", "Requests of a cache volume that are in flight.", "pending"),
    (
        "volume_hits_total",
        "Reads of a volume with every page in the cache. The page cache answers most reads first.",
        "hits",
    ),
    (
        "volume_misses_total",
        "Reads of a volume for which at least one page was not in the cache.",
        "misses",
    ),
    ("volume_read_bytes_total", "Bytes read from a cache volume, hits and misses.", "read_bytes"),
    (
        "volume_bypassed_bytes_total",
        "Bytes read from a volume and not kept, because they belong to a long sequential stream.",
        "bypassed_bytes",
    ),
    ("volume_backing_reads_total", "Reads of a volume's backing file.", "backing_reads"),
    (
        "volume_backing_read_bytes_total",
        "Bytes read from a volume's backing file.",
        "backing_read_bytes",
    ),
    ("volume_backing_writes_total", "Writes to a volume's backing file.", "backing_writes"),
    (
        "volume_backing_written_bytes_total",
        "Bytes written to a volume's backing file.",
        "written_bytes",
    ),
    ("volume_read_errors_total", "Reads that a volume's backing file failed.", "read_errors"),
    ("volume_write_errors_total", "Writes that a volume's backing file failed.", "write_errors"),
    (
        "volume_drops_total",
        "Times that all pages of a volume were dropped, by command or because the file changed.",
        "drops",
    ),
    (
        "volume_turned_away_total",
        "Requests of a volume answered with an error because the queue was full.",
        "turned_away",
    ),
)
CLASS_ROWS = (
    (
        "zsmalloc_class_objects",
        "Objects for which the zspages of a size class have room.",
        "objects",
    ),
    ("zsmalloc_class_used_objects", "Objects in use in a size class.", "used_objects"),
    ("zsmalloc_class_frames", "Page frames of a size class.", "used_frames"),
)


_BUILD = ("build", "Version of the running zswapd.")
_REJECTS = ("frontswap_rejects_total", "Pages refused, by reason, with zcache's and zswap's names.")
_UNBUDDIED = (
    "zbud_unbuddied_frames",
    (
        "Page frames of zbud with one object, by its length in 64ths of a page"
        " (zbud_unbuddied_list_counts)."
    ),
)
_PROTECTIONS = ("protection_on", "1 if a protection is on.")


_HISTOGRAMS = {
    "load": (
        "load_duration_seconds",
        "Time to answer a request that loads pages; one request in 64 is timed.",
    ),
    "store": (
        "store_duration_seconds",
        "Time to answer a request that stores pages; one request in 64 is timed.",
    ),
    "wait": (
        "store_wait_seconds",
        "Time for which a request that stores pages waited for a refill of the reserve.",
    ),
}


class Description(NamedTuple):
    """The description of one family, without its values."""

    name: str
    kind: str
    """`counter`, `gauge`, `histogram` or `info`."""
    label: str
    """Name of the label, empty for none."""
    help: str


def described() -> Iterator[Description]:
    """Yield the families of a daemon that has every part, without values."""

    def row(name: str, text: str, label: str = "") -> Description:
        return Description(
            f"zswapd_{name}", "counter" if name.endswith("_total") else "gauge", label, text
        )

    yield Description("zswapd_build_info", "info", "version", _BUILD[1])
    yield from (row(one.name, one.help, one.label) for one in ROWS)
    yield row(*_REJECTS, "reason")
    yield row(*_PROTECTIONS, "protection")
    for rows, label in (
        (FILE_ROWS, "file"),
        (BACKED_ROWS, "file"),
        (VOLUME_ROWS, "volume"),
        (CLASS_ROWS, "size"),
    ):
        yield from (row(name, text, label) for name, text, _field in rows)
    yield row(*_UNBUDDIED, "chunks")
    for name, text in _HISTOGRAMS.values():
        yield Description(f"zswapd_{name}", "histogram", "", text)


def collect(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the families one by one, so that the exporter can pause after each."""
    yield InfoMetricFamily(f"zswapd_{_BUILD[0]}", _BUILD[1], {"version": snapshot.worker.version})
    page_size = snapshot.core.frames.page_size
    for row in ROWS:
        yield from _family(row, snapshot, page_size)
    yield _labelled(
        f"zswapd_{_REJECTS[0]}",
        _REJECTS[1],
        "reason",
        {reason.name.lower(): 0 for reason in RejectReason} | dict(snapshot.core.frontswap.rejects),
    )
    yield _labelled(
        f"zswapd_{_PROTECTIONS[0]}",
        _PROTECTIONS[1],
        "protection",
        dict(snapshot.worker.protections),
    )
    for name, text, field in FILE_ROWS:
        yield _labelled(
            f"zswapd_{name}",
            text,
            "file",
            {device.name: getattr(device, field) for device in snapshot.core.devices},
        )
    for name, text, field in BACKED_ROWS if snapshot.core.backed else ():
        yield _labelled(
            f"zswapd_{name}",
            text,
            "file",
            {one.name: getattr(one, field) for one in snapshot.core.backed},
        )
    for name, text, field in VOLUME_ROWS if snapshot.volumes else ():
        yield _labelled(
            f"zswapd_{name}",
            text,
            "volume",
            {one.name: getattr(one, field) for one in snapshot.volumes},
        )
    zsmalloc = snapshot.core.zsmalloc
    classes = [one for one in zsmalloc.classes if one.used_frames] if zsmalloc else []
    for name, text, field in CLASS_ROWS:
        yield _labelled(
            f"zswapd_{name}", text, "size", {str(one.size): getattr(one, field) for one in classes}
        )
    if snapshot.core.zbud:
        counts = enumerate(snapshot.core.zbud.zbud_unbuddied_list_counts, 1)
        used = {str(chunks): count for chunks, count in counts if count}
        yield _labelled(f"zswapd_{_UNBUDDIED[0]}", _UNBUDDIED[1], "chunks", used)
    yield _histogram("load", snapshot.fuse.read_latency)
    yield _histogram("store", snapshot.fuse.write_latency)
    yield _histogram("wait", snapshot.fuse.held, unit_s=1e-3)


def _family(row: Row, snapshot: Snapshot, page_size: int) -> Iterator[Metric]:
    paths = {"": row.paths} if isinstance(row.paths, str) else row.paths
    factor = page_size if row.in_frames else 1
    values = {value: _at(snapshot, path) for value, path in paths.items()}
    found = {value: number * factor for value, number in values.items() if number is not None}
    if found:
        yield _labelled(f"zswapd_{row.name}", row.help, row.label, found)


def _at(snapshot: Any, path: str) -> Any:
    """Return a field of the snapshot, or None if a part of the path is absent."""
    for name in path.split("."):
        snapshot = (
            snapshot.get(name) if isinstance(snapshot, Mapping) else getattr(snapshot, name, None)
        )
    return snapshot


def _labelled(name: str, text: str, label: str, values: Mapping[str, Any]) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, text, labels=[label] if label else [])
    for value, number in values.items():
        family.add_metric([value] if label else [], float(number))
    return family


def _histogram(
    what: str, latency: LatencyStatistics | HeldStatistics, *, unit_s: float = 1e-6
) -> Metric:
    name, text = _HISTOGRAMS[what]
    family = HistogramMetricFamily(f"zswapd_{name}", text)
    so_far, buckets = 0, []
    for place, count in enumerate(latency.counts):
        so_far += count
        bound = "+Inf" if place == len(latency.counts) - 1 else repr(2**place * unit_s)
        buckets.append((bound, so_far))
    family.add_metric([], buckets, latency.seconds)
    return family
