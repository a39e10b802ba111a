# SPDX-License-Identifier: GPL-2.0-or-later
"""The screens of zswapctl: pure functions from reports to lines of at most 80 columns."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

from zswapd.host import installation
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from zswapd.control.protocol import (
        BackingReport,
        CacheReport,
        PoolReport,
        ProtectionReport,
        StatusReport,
        WorkerReport,
    )
    from zswapd.swapdevice import Attachment

WIDTH = 80
"""Longest line, in columns."""


def status_lines(status: StatusReport, attached: Mapping[str, Attachment | None]) -> Iterator[str]:
    """Yield the lines of `zswapctl status`.

    Args:
        status: the daemon's report.
        attached: the loop device of each file, by the file's name.
    """
    yield (
        f"zswapd {status['version']}, pid {status['pid']}, {status['state']} for"
        f" {duration(status['uptime_s'])}"
    )
    yield f"  at {status['mountpoint']}"
    yield from _worker_lines(status["worker"])
    yield ""
    yield from _pool_lines(status["pool"], status["page_size"])
    if cost := status.get("cost"):  # an older daemon does not send it
        yield from _wrapped("Cost       ", cost_text(cost))
    if limit := status.get("memory_limit"):  # an older daemon does not send it
        yield from _wrapped(
            "Bounded    ",
            f"by {format_size(limit['limit_bytes'])} in {limit['file']},"
            f" {format_size(limit['left_bytes'])} left of them",
        )
    if status["backing"]:
        yield from _backing_lines(status["backing"], status["page_size"])
    if status["cache"] and status["cache"]["volumes"]:
        yield from _cache_lines(status["cache"], status["page_size"])
    yield ""
    if status["files"]:
        yield from _file_lines(status, attached)
        yield ""
    yield "Protections"
    yield from _check_lines(status["protections"])
    advice = [item for item in status["advice"] if not item["on"]]
    if advice:
        yield ""
        yield "Recommended"
        yield from _check_lines(advice)


def _worker_lines(worker: WorkerReport) -> Iterator[str]:
    if worker["number"] > 1:
        deaths = f"{worker['deaths']} died before it" if worker["deaths"] else "none died before it"
        yield (
            f"  served by worker {worker['number']}, which took over in {worker['takeover_s']:.2f}"
            f" s; {deaths}"
        )
    if worker["poisoned_requests"]:
        yield (
            f"  {worker['poisoned_requests']} requests were answered with EIO: they killed worker"
            " after worker"
        )
    if not worker["supervised"]:
        yield f"  WITHOUT a supervisor: {installation.found().start()} starts one, which takes over"


def _pool_lines(pool: PoolReport, page_size: int) -> Iterator[str]:
    stored, memory = pool["stored_pages"] * page_size, pool["frames"] * page_size
    kinds = (
        f"{pool['same_filled_pages']} same-filled, {pool['incompressible_pages']} incompressible"
    )
    yield f"Stored     {format_size(stored)}, pages: {pool['stored_pages']} ({kinds})"
    ratio = f", ratio {stored / memory:.2f}" if memory else ""
    yield f"Memory     {format_size(memory)}, frames: {pool['frames']}{ratio}, {pool['compressor']}"
    fill = f", {pool['compressed_bytes'] / memory:.1%} of the memory" if memory else ""
    yield f"Objects    {format_size(pool['compressed_bytes'])}{fill}"
    limit = pool["limit_bytes"]
    used = f"{memory / limit:.0%} of {format_size(limit)}" if limit else "no limit"
    yield f"Limit      {used}; {format_size(pool['reserve_bytes'])} held ready"
    refused = ", ".join(f"{count} {reason}" for reason, count in pool["refused"].items() if count)
    yield from _wrapped("Refused    ", refused or "nothing")


_COSTS = (
    ("worker", "worker_bytes"),
    ("spare", "spare_bytes"),
    ("supervisor", "supervisor_bytes"),
    ("programs", "code_bytes"),
    ("index", "index_bytes"),
    ("shared state", "state_bytes"),
    ("held ready", "ready_bytes"),
)
"""The parts of the cost, as they are shown, with their keys."""


def cost_text(cost: Mapping[str, Any]) -> str:
    """Return what the daemon costs beside the pool, by part, and the effective ratio."""
    parts = ", ".join(f"{name} {format_size(cost[key])}" for name, key in _COSTS if cost[key])
    ratio = cost["effective_ratio"]
    gain = f"; effective ratio {ratio:.2f}" if ratio else ""
    return f"{format_size(cost['beside_pool_bytes'])} beside the pool ({parts}){gain}"


def _backing_lines(backing: BackingReport, page_size: int) -> Iterator[str]:
    left = backing["budget_left"]
    budget = "" if left is None else f"; writeback may write {format_size(left)} more today"
    kind = "encrypted" if backing["encrypted"] else "NOT encrypted"
    yield from _wrapped(
        "Disk       ",
        f"{format_size(backing['pages'] * page_size)} on {backing['path']}, {kind}{budget}",
    )
    if backing["trouble"]:
        yield from _wrapped(
            "           ", f"DEGRADED: {backing['trouble']}; the pool goes on alone"
        )


def _cache_lines(cache: CacheReport, page_size: int) -> Iterator[str]:
    kept, memory = (format_size(cache[count] * page_size) for count in ("pages", "frames"))
    volumes = "1 volume" if cache["volumes"] == 1 else f"{cache['volumes']} volumes"
    hits = "not read yet" if cache["hit_ratio"] is None else f"hits {cache['hit_ratio']:.1%}"
    frozen = ", FROZEN" if cache["frozen"] else ""
    limit = format_size(cache["limit_bytes"])
    yield from _wrapped(
        "Cache      ", f"{kept} of {volumes} in {memory}, at most {limit}; {hits}{frozen}"
    )


def _file_lines(status: StatusReport, attached: Mapping[str, Attachment | None]) -> Iterator[str]:
    disk = ["On disk"] if status["backing"] else []
    limit = ["Limit"] if any(file.get("limit_bytes") for file in status["files"]) else []
    rows = [
        ("File", "Size", "Stored", "Memory", *limit, *disk, "Device", "Swapped out", "Priority")
    ]
    for file in status["files"]:
        loop = attached.get(file["name"])
        swap = loop.swap if loop else None
        rows.append(
            (
                file["name"],
                format_size(file["size"]),
                format_size(file["stored_pages"] * status["page_size"]),
                format_size(file.get("object_bytes", 0)),  # an older daemon does not send these
                *[_limit(file.get("limit_bytes", 0)) for _ in limit],
                *[format_size(file.get("disk_pages", 0) * status["page_size"]) for _ in disk],
                loop.device if loop else "-",
                format_size(swap.used) if swap else "off",
                str(swap.priority) if swap else "-",
            )
        )
    yield from table_lines(rows)


def _limit(size: int) -> str:
    return format_size(size) if size else "-"


def _check_lines(checks: Iterable[ProtectionReport]) -> Iterator[str]:
    for check in checks:
        yield from _wrapped(
            f"  {'on ' if check['on'] else 'OFF'}  {check['name']:<15} ", check["detail"]
        )
        if not check["on"] and check["hint"]:
            yield from _wrapped(" " * 23 + "-> ", check["hint"])


def duplicate_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `zswapctl duplicates`."""
    rows = [("File", "Pages", "Same-filled", "Duplicates", "Share", "Saved")]
    for one in report["files"]:
        share = f"{one['duplicates'] / one['pages']:.1%}" if one["pages"] else "-"
        rows.append(
            (
                one["name"] or "all, across files",
                str(one["pages"]),
                str(one["same_filled"]),
                str(one["duplicates"]),
                share,
                format_size(one["saved_bytes"]),
            )
        )
    yield from table_lines(rows)
    if report["sampled_one_in"] > 1:
        yield f"estimated from one hash in {report['sampled_one_in']}"


def page_line(*cells: object) -> str:
    """Return one line of `zswapctl pages`.

    Args:
        cells: file, page, state, codec, bytes, and seconds without use; None is shown as `-`.
    """
    file, page, state, codec, size, age = ("-" if cell is None else str(cell) for cell in cells)
    return f"{file:<16} {page:>10}  {state:<11}  {codec:<5}  {size:>6}  {age:>9}"


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table. Columns of numbers are right-aligned, the others left-aligned.

    Args:
        rows: the rows; the first row has the headings.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if _is_quantity(rows, place) else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _is_quantity(rows: Sequence[Sequence[str]], place: int) -> bool:
    return any(row[place][:1].isdigit() for row in rows[1:])


def statistics_lines(statistics: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `name value` for each counter, and a table for each list of counters."""
    for name, value in statistics.items():
        dest = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from statistics_lines(value, f"{dest}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield ""
            yield f"{dest}:"
            rows = [list(value[0]), *([_plain(item) for item in row.values()] for row in value)]
            yield from (f"  {line}" for line in table_lines(rows))
            yield ""
        else:
            yield f"{dest} {_plain(value)}"


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "-"
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def setting_lines(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield `section.key = value  # origin` for each setting, in the form of a config file."""
    for dest, setting in settings.items():
        value = setting["value"]
        remark = setting["origin"]
        if setting["unit"] == "bytes" and isinstance(value, int) and value >= 1 << 20:
            remark = f"{format_size(value)}, {remark}"
        effective = setting.get("effective", 0)
        if value and effective and effective < value:  # another setting has a lower limit
            remark = f"{format_size(effective)} counts, {remark}"
        yield f"{dest} = {_toml(value)}  # {remark}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + "}"
    return str(value) if isinstance(value, int) else json.dumps(value or "", ensure_ascii=False)


def duration(seconds: float) -> str:
    """Return a time in one or two units: `5 s`, `3 min 12 s`, `2 h 5 min`, `4 d 1 h`."""
    whole = int(seconds)
    for unit, size, below, below_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below_size} {below}"
    return f"{whole} s"


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label)) or [
        label.rstrip()
    ]
