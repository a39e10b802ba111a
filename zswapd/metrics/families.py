# SPDX-License-Identifier: GPL-2.0-or-later
"""What Prometheus is told: metric families from one snapshot. Nothing is counted here.

Names follow Prometheus' rules (`zswapd_`, base units, `_total` for what only grows, also across
workers); the kernel's name of a counter stands in its HELP. Labels are bounded: reasons,
protections, files, size classes in use.

A new counter is a row of ROWS. A part that is not there (its snapshot is None) has no rows.
`described` says what there can be: docs/metrics.md is made of that.
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

    from zswapd.fuse.session import LatencyStatistics
    from zswapd.metrics.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Row:
    """One metric: a value of the snapshot, or several that differ in a label.

    Attributes:
        name: without `zswapd_`; `_total` makes it a counter.
        help: what it is; what is in parentheses at its end is the kernel's name.
        paths: fields that lead to the value, or that by the label's value.
        label: the label's name, if there are several.
        in_frames: the value is in frames, the metric in bytes.
    """

    name: str
    help: str
    paths: str | Mapping[str, str]
    label: str = ""
    in_frames: bool = False


ROWS = (
    Row("uptime_seconds", "Time since the first worker began.", "worker.uptime_seconds"),
    Row("workers_started_total", "Processes that served, the present one included.", "worker.number"),
    Row("worker_deaths_total", "Those of them that ended without being told to.", "worker.deaths"),
    Row("worker_broken_total", "Those of them that ended themselves after an internal error.", "worker.broken"),
    Row("takeover_seconds", "Time that the worker took to take over and serve; 0 for the first.", "worker.takeover_seconds"),
    Row("supervised", "Whether another worker would follow this one.", "worker.supervised"),
    Row("poisoned_requests_total", "Requests answered with EIO since they killed one worker after the other.",
        "worker.poisoned_requests"),
    Row("requests_total", "FUSE requests.",
        {"read": "fuse.reads", "write": "fuse.writes", "discard": "fuse.discards", "other": "fuse.others"}, "operation"),
    Row("request_bytes_total", "Bytes that requests moved.",
        {"read": "fuse.read_bytes", "write": "fuse.written_bytes"}, "operation"),
    Row("request_errors_total", "Requests answered with an errno, refused writes included.", "fuse.request_errors"),
    Row("failed_requests_total", "Requests that failed for a reason that has a name.", "fuse.failed_requests"),
    Row("internal_errors_total", "Requests that failed because of a bug.", "fuse.internal_errors"),
    Row("resent_requests_total", "Requests that came again, because a worker died before it answered them.", "fuse.resent"),
    Row("poll_seconds_total", "Time spent looking out for the next request.", "fuse.poll_seconds"),
    Row("reads_ahead_total", "Times that the next pages of a sequential reader were fetched.", "fuse.reads_ahead"),
    Row("reads_ahead_hits_total", "Times that it then asked for them.", "fuse.reads_ahead_hits"),
    Row("frontswap_stores_total", "Pages stored (succ_stores).", "core.frontswap.succ_stores"),
    Row("frontswap_failed_stores_total", "Pages refused (failed_stores).", "core.frontswap.failed_stores"),
    Row("frontswap_loads_total", "Pages loaded (loads).", "core.frontswap.loads"),
    Row("frontswap_failed_loads_total", "Loads of pages that are not there, read as zeros.", "core.frontswap.failed_loads"),
    Row("frontswap_invalidates_total", "Pages whose slot became free (invalidates).", "core.frontswap.invalidates"),
    Row("frontswap_frozen", "Whether stores are being refused by command.", "core.frontswap.frozen"),
    Row("stored_pages", "Pages that can be read back.", "core.zv.curr_pages"),
    Row("same_filled_pages", "Those of them that consist of one repeated word and cost no object data.",
        "core.zv.curr_same_filled"),
    Row("incompressible_pages", "Those of them that are stored as they are.", "core.zv.curr_incompressible"),
    Row("stored_object_bytes", "Bytes of stored objects, headers included.", "core.zv.curr_object_bytes"),
    Row("stored_compressed_bytes", "Bytes of compressed data.", "core.zv.curr_zbytes"),
    Row("poor_pages_total", "Pages that compress to more than zv_max_zsize (compress_poor), or while the mean was above "
        "zv_max_mean_zsize (mean_compress_poor).",
        {"compress_poor": "core.zv.compress_poor", "mean_compress_poor": "core.zv.mean_compress_poor"}, "reason"),
    Row("damaged_pages_total", "Loads that found a page damaged.", "core.zv.corrupted"),
    Row("page_size_bytes", "Bytes in a page.", "core.frames.page_size"),
    Row("arena_bytes", "Memory of the arena: what stored pages, the reserve and the frame table really take.",
        "core.arena_backed_bytes"),
    Row("pool_bytes", "Memory in page frames that hold objects.", "core.frames.used_frames", in_frames=True),
    Row("pool_max_bytes", "The most that it ever was.", "core.frames.used_frames_max", in_frames=True),
    Row("pool_limit_bytes", "What it may come to.", "core.frames.limit_frames", in_frames=True),
    Row("reserve_bytes", "Memory held ready in runs that serve any store.", "core.frames.reserve_frames", in_frames=True),
    Row("reserve_target_bytes", "What is kept ready.", "core.frames.reserve_target_frames", in_frames=True),
    Row("refilled_bytes_total", "Memory taken from the system.", "core.frames.refilled_frames", in_frames=True),
    Row("trimmed_bytes_total", "Memory given back to it.", "core.frames.trimmed_frames", in_frames=True),
    Row("failed_get_free_pages_total", "Frame requests refused: no populated run was long enough (failed_get_free_pages).",
        "core.frames.failed_get_free_pages"),
    Row("zsmalloc_objects", "Objects in zsmalloc.", "core.zsmalloc.objects"),
    Row("zsmalloc_zspages", "zspages.", "core.zsmalloc.zspages"),
    Row("zsmalloc_bytes", "Memory of the zspages.", "core.zsmalloc.used_frames", in_frames=True),
    Row("zsmalloc_compacted_bytes_total", "Memory set free by compaction (pages_compacted).", "core.zsmalloc.pages_compacted",
        in_frames=True),
    Row("zsmalloc_objects_moved_total", "Objects that compaction moved.", "core.zsmalloc.objects_moved"),
    Row("zbud_frames", "Page frames of zbud: with two objects (zbud_buddied_count), or with a whole page.",
        {"two": "core.zbud.zbud_buddied_count", "page": "core.zbud.bodies"}, "objects"),
    Row("zbud_compacted_bytes_total", "Memory set free by compaction of zbud (pages_compacted).", "core.zbud.pages_compacted",
        in_frames=True),
    Row("tmem_objects", "Objects in the index (curr_obj_count).", "core.tmem.curr_obj_count"),
    Row("tmem_objnodes", "Nodes of the index (curr_objnode_count).", "core.tmem.curr_objnode_count"),
    Row("tmem_objnode_bytes", "Memory of the index.", "core.tmem.objnode_bytes"),
    Row("tmem_flushes_total", "Pages asked to be flushed (flush_total).", "core.tmem.flush_total"),
    Row("tmem_flushes_found_total", "Those that were there (flush_found).", "core.tmem.flush_found"),
    Row("tmem_object_flushes_total", "Objects asked to be flushed (flobj_total).", "core.tmem.flobj_total"),
    Row("tmem_object_flushes_found_total", "Those that were there (flobj_found).", "core.tmem.flobj_found"),
    Row("tmem_failed_puts_total", "Puts refused, by kind of pool (failed_pers_puts, failed_eph_puts).",
        {"persistent": "core.tmem.failed_pers_puts", "ephemeral": "core.tmem.failed_eph_puts"}, "pool"),
    Row("tmem_puts_flushed_total", "Refused puts that flushed an older copy (put_to_flush).", "core.tmem.put_to_flush"),
    Row("recovered_pages", "Pages that the last takeover found.", "core.recovery.recovered_pages"),
    Row("recovered_damaged_total", "Objects found damaged by takeovers; what they were is lost.", "core.recovery.damaged"),
    Row("recovered_poisoned_pages_total",
        "Pages of the arena that takeovers found poisoned: uncorrectable errors of the machine's memory.",
        "core.recovery.poisoned"),
    Row("recompressed_pages_total", "Pages kept with a stronger codec later on.", "core.zv.recompressed"),
    Row("recompress_saved_bytes_total", "Bytes of compressed data that this saved.", "core.zv.recompress_saved_bytes"),
    Row("recompress_tried_pages_total", "Pages compressed again, whether it was worthwhile or not.",
        "core.recompression.tried"),
    Row("recompress_in_vain_pages_total", "Those for which it was not; they are left alone.", "core.recompression.in_vain"),
    Row("pool_limit_hits_total", "Pages turned away since the pool was at its limit (pool_limit_hit).",
        "core.zv.pool_limit_hit"),
    Row("backing_degraded", "Whether the disk behind the pool is in trouble, so that the pool goes on alone.",
        "core.transfers.degraded"),
    Row("backing_read_pages_total", "Pages read from the disk behind the pool (bd_reads).", "core.transfers.bd_reads"),
    Row("backing_written_pages_total", "Pages written to it (bd_writes).", "core.transfers.bd_writes"),
    Row("backing_requests_total", "Requests to it.",
        {"read": "core.transfers.read_requests", "write": "core.transfers.write_requests"}, "operation"),
    Row("backing_errors_total", "Those of them that failed.",
        {"read": "core.transfers.failed_reads", "write": "core.transfers.failed_writes"}, "operation"),
    Row("backing_refused_pages_total", "Pages not taken for it, since buffers, slot or disk were not to be had.",
        "core.transfers.refused_writes"),
    Row("backing_in_flight_requests", "Requests to it under way.", "core.transfers.in_flight"),
    Row("backing_avoided_slots", "Slots left alone since they failed.", "core.transfers.avoided_slots"),
    Row("backing_held_slots", "Slots that a dead worker's request may still write.", "core.transfers.held_slots"),
    Row("writeback_sent_pages_total", "Pages that writeback sent to the disk, by what made it.",
        {"command": "core.writeback.by_command", "incompressible": "core.writeback.by_incompressible",
         "limit": "core.writeback.by_limit", "reserve": "core.writeback.by_reserve", "age": "core.writeback.by_age"},
        "trigger"),
    Row("writeback_budget_bytes", "Most that it may write in a day; 0 for any.", "core.writeback.budget_bytes"),
    Row("writeback_budget_left_bytes", "What is left of that today.", "core.writeback.budget_left_bytes"),
    Row("writeback_budget_stops_total", "Times that it was used up.", "core.writeback.budget_stops"),
    Row("writeback_oldest_age_seconds", "For how long the oldest pages of the pool may not have been used.",
        "core.writeback.oldest_age_s"),
    Row("cache_bytes", "Memory of page frames that hold pages of slow files.", "core.cache.frames", in_frames=True),
    Row("cache_limit_bytes", "What it may come to when memory is plentiful.", "shrinker.limit_frames", in_frames=True),
    Row("cache_ceiling_bytes", "What it may come to now.", "shrinker.ceiling_frames", in_frames=True),
    Row("cache_pages", "Pages of slow files that are kept (zbud_curr_zpages).", "core.cache.zbuds.zbud_curr_zpages"),
    Row("cache_compressed_bytes", "Bytes of their compressed data (zbud_curr_zbytes).", "core.cache.zbuds.zbud_curr_zbytes"),
    Row("cleancache_gets_total", "Pages asked for, by whether they were there (succ_gets, failed_gets).",
        {"found": "core.cache.cleancache.succ_gets", "missing": "core.cache.cleancache.failed_gets"}, "result"),
    Row("cleancache_puts_total", "Pages taken (puts).", "core.cache.cleancache.puts"),
    Row("cleancache_failed_puts_total", "Pages refused.", "core.cache.cleancache.failed_puts"),
    Row("cleancache_invalidates_total", "Pages let go by invalidation (invalidates).", "core.cache.cleancache.invalidates"),
    Row("cache_evicted_pages_total", "Pages that had to go so that their frames could be used for something else.",
        "core.cache.zbuds.evicted_zpages"),
    Row("cache_evicted_bytes_total", "Memory of frames that were set free so (evicted_raw_pages).",
        "core.cache.zbuds.evicted_raw_pages", in_frames=True),
    Row("cache_damaged_pages_total", "Gets that found a page damaged; its reader got the data from where it came.",
        "core.cache.zbuds.corrupted"),
    Row("shrinks_total", "Times that the cache began to give memory back.",
        {"low_memory": "shrinker.shrinks.low_memory", "stalled": "shrinker.shrinks.stalled",
         "limit": "shrinker.shrinks.limit", "command": "shrinker.shrinks.command"}, "reason"),
    Row("shrunk_bytes_total", "Memory that it gave back.", "shrinker.evicted_frames", in_frames=True),
    Row("shrink_batches_total", "Pieces in which it did so.", "shrinker.batches"),
    Row("shrink_batch_seconds_total", "Time that they took; no page was served in it.", "shrinker.batch_seconds"),
    Row("shrink_batch_max_seconds", "The longest of them.", "shrinker.longest_batch_s"),
    Row("control_requests_total", "Requests on the control socket.", "control.requests"),
    Row("control_refused_total", "Requests there that were not valid.", "control.refused"),
    Row("memory_stall_seconds_total", "Time in which tasks of the system waited for memory: some, or all of them (PSI).",
        {"some": "pressure.some_seconds", "full": "pressure.full_seconds"}, "tasks"),
    Row("memory_stalls_total", "Times that they waited for longer than the trigger's threshold.", "pressure.triggers"),
    Row("memory_limit_bytes", "Limit of a memory cgroup above the daemon, that which leaves least; 0 for none.",
        "pressure.limit_bytes"),
    Row("memory_limit_left_bytes", "What may still be charged to that limit.", "pressure.limit_left_bytes"),
)  # fmt: skip
"""Every metric whose value is a field of the snapshot."""

FILE_ROWS = (
    ("file_size_bytes", "Size of a swap file.", "size"),
    ("file_stored_pages", "Pages of a swap file that are stored.", "stored_pages"),
    (
        "file_lost_pages",
        "Pages of a swap file whose data is lost; their readers get EIO.",
        "lost_pages",
    ),
    ("file_pages_read_total", "Pages read.", "pages_read"),
    ("file_pages_written_total", "Pages written.", "pages_written"),
    ("file_pages_discarded_total", "Pages discarded.", "pages_discarded"),
    ("file_refused_writes_total", "Writes refused.", "refused_writes"),
    ("file_failed_reads_total", "Reads that failed.", "failed_reads"),
)
BACKED_ROWS = (
    (
        "file_backed_pages",
        "Pages of a swap file that are on the disk and nowhere else (bd_count).",
        "bd_count",
    ),
    (
        "file_written_back_pages_total",
        "Pages that left the pool for the disk.",
        "written_back_pages",
    ),
    (
        "file_written_through_pages_total",
        "Pages that the pool refused and that went there at once.",
        "written_through_pages",
    ),
    ("file_promoted_pages_total", "Pages that returned to the pool.", "promoted_pages"),
    (
        "file_kept_pages_total",
        "Pages written there in vain, since they were changed or used meanwhile.",
        "kept_pages",
    ),
    ("file_failed_slots_total", "Pages whose slot could not be written.", "failed_slots"),
    ("file_bad_slots_total", "Pages that came back damaged or not at all.", "bad_slots"),
)
VOLUME_ROWS = (
    ("volume_size_bytes", "Size of a cache volume.", "size"),
    ("volume_pages", "Its pages that are kept.", "pages"),
    ("volume_pending_requests", "Requests of it under way.", "pending"),
    (
        "volume_hits_total",
        "Reads of which every page was kept; the kernel's page cache answers most before.",
        "hits",
    ),
    ("volume_misses_total", "All other reads.", "misses"),
    ("volume_read_bytes_total", "Bytes of both.", "read_bytes"),
    (
        "volume_bypassed_bytes_total",
        "Bytes not kept, since a long sequential stream asked for them.",
        "bypassed_bytes",
    ),
    ("volume_backing_reads_total", "Reads of the backing file.", "backing_reads"),
    ("volume_backing_read_bytes_total", "Bytes of them.", "backing_read_bytes"),
    ("volume_backing_writes_total", "Writes to it.", "backing_writes"),
    ("volume_backing_written_bytes_total", "Bytes of them.", "written_bytes"),
    ("volume_read_errors_total", "Reads that the backing file failed.", "read_errors"),
    ("volume_write_errors_total", "Writes that it failed.", "write_errors"),
    (
        "volume_drops_total",
        "Times that everything was let go, by command or since the file had changed.",
        "drops",
    ),
    (
        "volume_turned_away_total",
        "Requests answered with an error since too many waited.",
        "turned_away",
    ),
)
CLASS_ROWS = (
    (
        "zsmalloc_class_objects",
        "Objects that the zspages of a size class have room for.",
        "objects",
    ),
    ("zsmalloc_class_used_objects", "Objects in them.", "used_objects"),
    ("zsmalloc_class_frames", "Page frames of a size class.", "used_frames"),
)


_BUILD = ("build", "The program.")
_REJECTS = ("frontswap_rejects_total", "Pages refused by reason, in the words of zcache and zswap.")
_UNBUDDIED = (
    "zbud_unbuddied_frames",
    (
        "Page frames of zbud with one object, by its length in 64ths of a page"
        " (zbud_unbuddied_list_counts)."
    ),
)
_PROTECTIONS = ("protection_on", "Whether a protection is on.")


def _duration(what: str) -> tuple[str, str]:
    return (
        f"{what}_duration_seconds",
        f"Time to answer a request that {what}s pages; one request in 64 is timed.",
    )


class Description(NamedTuple):
    """One family, whatever its values are."""

    name: str
    kind: str
    """`counter`, `gauge`, `histogram` or `info`."""
    label: str
    """Empty for none."""
    help: str


def described() -> Iterator[Description]:
    """Yield what `collect` yields of a daemon that has every part, without values."""

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
    for what in ("load", "store"):
        name, text = _duration(what)
        yield Description(f"zswapd_{name}", "histogram", "", text)


def collect(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield every family, one after the other, so that who makes text of them can pause in between."""
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


def _family(row: Row, snapshot: Snapshot, page_size: int) -> Iterator[Metric]:
    paths = {"": row.paths} if isinstance(row.paths, str) else row.paths
    factor = page_size if row.in_frames else 1
    values = {value: _at(snapshot, path) for value, path in paths.items()}
    found = {value: number * factor for value, number in values.items() if number is not None}
    if found:
        yield _labelled(f"zswapd_{row.name}", row.help, row.label, found)


def _at(snapshot: Any, path: str) -> Any:
    """Return a field of the snapshot, None where a part of the path is not there."""
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


def _histogram(what: str, latency: LatencyStatistics) -> Metric:
    name, text = _duration(what)
    family = HistogramMetricFamily(f"zswapd_{name}", text)
    so_far, buckets = 0, []
    for place, count in enumerate(latency.counts):
        so_far += count
        bound = "+Inf" if place == len(latency.counts) - 1 else repr(2**place / 1e6)
        buckets.append((bound, so_far))
    family.add_metric([], buckets, latency.seconds)
    return family
