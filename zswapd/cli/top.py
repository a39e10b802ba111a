# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl top`: a screen of the daemon's activity, every second.

It uses curses, so it works on any terminal and in any ssh session.

`screen` makes the lines from two `stats` reports, for the live screen and for --once. Rates are the
changes between the two reports. The screen outlives the worker: it shows that the daemon does not
answer, and continues with the next worker.
"""

from __future__ import annotations

import contextlib
import curses
import time
from typing import TYPE_CHECKING, Any

from zswapd.cli.output import encodable
from zswapd.cli.render import WIDTH, duration, table_lines
from zswapd.control.client import TIMEOUT_S, Client
from zswapd.errors import ControlError, ZswapdError
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    Statistics = Mapping[str, Any]
    """The result of the control command `stats`."""

_CLASSES = 5
"""Limit of size classes on the screen. Those with the most memory are shown."""
ROWS = 24
"""Lines of a screen of unknown height."""
PATIENCE_S = 3.0
"""Longest wait in seconds for the daemon while the screen is shown. It delays the key q."""
_BAR = 30
_AGES = ("<1 min", "<10 min", "<1 h", "<1 d", "longer")


def sample(socket: Path, *, patience: float = TIMEOUT_S) -> Statistics:
    """Return a `stats` report of the daemon.

    Each call makes a new connection, because the worker of the last one may be dead.

    Args:
        socket: the control socket.
        patience: longest wait for the daemon in seconds.

    Raises:
        ZswapdError: the daemon does not answer.
    """
    with Client(socket, timeout=patience) as client:
        statistics = client.call("stats")
    assert isinstance(statistics, dict)
    return statistics


def once(socket: Path, interval: float) -> tuple[Statistics, list[str]]:
    """Return the last of two reports, and the screen of both.

    Args:
        socket: the control socket.
        interval: time between the reports in seconds.

    Raises:
        ZswapdError: the daemon does not answer.
    """
    before, began = sample(socket), time.monotonic()
    time.sleep(interval)
    now = sample(socket)
    return now, screen(now, before, time.monotonic() - began)


def live(socket: Path, interval: float) -> None:
    """Show the screen until the user presses q, Esc or Ctrl-C.

    Args:
        socket: the control socket.
        interval: time between the reports in seconds.

    Raises:
        ControlError: curses does not know the terminal.
    """
    try:
        curses.wrapper(_show, socket, interval)
    except KeyboardInterrupt:
        return
    except curses.error as error:
        raise ControlError(
            f"this terminal cannot show a screen: {error}", hint="use --once"
        ) from error


def _show(window: Any, socket: Path, interval: float) -> None:
    with contextlib.suppress(curses.error):  # the terminal may not be able to hide its cursor
        curses.curs_set(0)
    window.timeout(int(interval * 1000))
    before: Statistics | None = None
    began = 0.0
    while True:
        try:
            now, taken = sample(socket, patience=PATIENCE_S), time.monotonic()
            lines = screen(now, before or now, taken - began, rows=window.getmaxyx()[0])
            before, began = now, taken
        except ZswapdError as error:
            lines = [f"zswapd does not answer: {error}"]
        _draw(window, lines)
        if window.getch() in {ord("q"), 27}:
            return


def _draw(window: Any, lines: list[str]) -> None:
    window.erase()
    height, width = window.getmaxyx()
    for row, line in enumerate(lines[:height]):
        window.addnstr(
            row,
            0,
            encodable(line, window.encoding),
            width - 1,
            curses.A_BOLD if row == 0 else curses.A_NORMAL,
        )
    window.refresh()


def screen(now: Statistics, before: Statistics, seconds: float, *, rows: int = ROWS) -> list[str]:
    """Return the lines of the screen, 80 columns wide.

    Problems come first. Tables are shortened to fit.

    Args:
        now: a report.
        before: the report before it.
        seconds: time between the two in seconds.
        rows: lines of the screen.
    """
    core = now["core"]
    head = [*_head_lines(now), *_memory_lines(core, now.get("cost"), now["pressure"])]
    head += [
        *_cache_lines(core, before["core"], seconds),
        *_disk_lines(core, before["core"], seconds),
    ]
    head += _age_lines(core)
    head += ["", *_rate_lines(now, before, seconds)]
    table = _file_lines(core, before["core"], seconds)
    files = _shortened(["", *table], rows - len(head), "files")
    left = rows - len(head) - len(files)
    classes = ["", *_class_lines(core, most=min(_CLASSES, left - 2))] if left > 2 else []
    return [line[:WIDTH] for line in [*head, *(classes if len(classes) > 2 else []), *files]]


def _head_lines(now: Statistics) -> Iterator[str]:
    worker = now["worker"]
    died = f", {worker['deaths']} died before it" if worker["deaths"] else ""
    frozen = ", FROZEN" if now["core"]["frontswap"]["frozen"] else ""
    yield (
        f"zswapd {worker['version']}, up {duration(worker['uptime_seconds'])}, worker"
        f" {worker['number']}{died}{frozen}"
    )
    if not worker["supervised"]:
        yield "WITHOUT a supervisor: `zswapd run` starts one, which takes over"
    off = [name for name, on in worker["protections"].items() if not on]
    yield (
        f"Protections  {len(worker['protections']) - len(off)} on, off: {', '.join(off) or 'none'}"
    )


def _shortened(lines: list[str], most: int, what: str) -> list[str]:
    """Return the lines, or their first ones and a line with the number of the others.

    Args:
        lines: an empty line and a table.
        most: limit of the lines.
        what: the plural of a row's name.
    """
    if len(lines) <= most:
        return lines
    kept = max(most - 1, 2)
    return [*lines[:kept], f"and {len(lines) - kept} more {what}: zswapctl status"]


def _memory_lines(
    core: Mapping[str, Any], cost: Mapping[str, Any] | None, pressure: Mapping[str, Any]
) -> Iterator[str]:
    frames, zv = core["frames"], core["zv"]
    page = frames["page_size"]
    own = frames["used_frames"] - frames["ephemeral_frames"]
    stored, used, limit = zv["curr_pages"] * page, own * page, frames["limit_frames"] * page
    ratio = f"{stored / used:.2f}" if used else "-"
    kinds = f"{zv['curr_same_filled']} same-filled, {zv['curr_incompressible']} raw"
    yield f"Stored    {format_size(stored):>10}   ratio {ratio}   {zv['curr_pages']} pages, {kinds}"
    full = used / limit if limit else 0.0
    bar = "#" * min(round(full * _BAR), _BAR)
    yield f"Pool      {format_size(used):>10}   [{bar:-<{_BAR}}] {full:.0%} of {format_size(limit)}"
    ready = (
        f"{format_size(frames['reserve_frames'] * page)} of"
        f" {format_size(frames['reserve_target_frames'] * page)} ready"
    )
    yield f"Arena     {format_size(core['arena_backed_bytes']):>10}   reserve: {ready}"
    waits = f"some {pressure['some_avg10']:.1f} %, all {pressure['full_avg10']:.1f} % of 10 s"
    free = format_size(pressure["spare_pages"] * page)
    if cost:  # an older daemon does not send it
        beside, gain = format_size(cost["beside_pool_bytes"]), cost["effective_ratio"]
        yield f"Cost      {beside:>10}   beside the pool; effective ratio {gain:.2f}"
    yield (
        f"Pressure  tasks waiting: {waits if pressure['psi'] != 'absent' else 'not known'}; {free}"
        " to spare"
    )


def _cache_lines(
    core: Mapping[str, Any], before: Mapping[str, Any], seconds: float
) -> Iterator[str]:
    """Yield the line of the cache, if it holds frames or has taken pages."""
    cache, earlier = core["cache"], before["cache"] or core["cache"]
    if not cache or not (cache["frames"] or cache["cleancache"]["puts"]):
        return
    page, clean = core["frames"]["page_size"], cache["cleancache"]
    hits, gets = (
        _change(cache, earlier, "cleancache", "succ_gets"),
        _change(cache, earlier, "cleancache", "failed_gets"),
    )
    ratio = f"{hits / (hits + gets):.0%} hits" if hits + gets else "no gets"
    gone = _change(cache, earlier, "zbuds", "evicted_zpages") / seconds if seconds > 0 else 0.0
    frozen = ", FROZEN" if clean["frozen"] else ""
    used, limit = format_size(cache["frames"] * page), format_size(cache["limit_frames"] * page)
    yield (
        f"Cache     {used:>10}   of {limit}, {clean['pages']} pages; {ratio}; {gone:.0f}"
        f" evicted/s{frozen}"
    )


def _disk_lines(
    core: Mapping[str, Any], before: Mapping[str, Any], seconds: float
) -> Iterator[str]:
    """Yield the line of the disk behind the pool, if there is a disk."""
    if not core["writeback"]:
        return
    page, rate = core["frames"]["page_size"], 0.0
    if seconds > 0:
        rate = max(_written(core) - _written(before), 0) / seconds
    pages = sum(one["bd_count"] for one in core["backed"])
    yield f"Disk      {format_size(pages * page):>10}   {pages} pages; {rate:.0f} written/s"


def _age_lines(core: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ages of the pool's pages and of the cache's pages.

    The age is the time since the last use with a disk, otherwise the time since the store.
    """
    # A daemon that is older than this program does not send the ages.
    name, ages = "Age", core.get("store_ages", ())
    if core["writeback"]:
        name, ages = "Unused", core["writeback"].get("sampled_ages", ())
    cached = core["cache"].get("ages", ()) if core["cache"] else ()
    for label, counts in ((name, ages), ("Cached", cached)):
        if sum(counts):
            shares = (
                f"{bound} {count / sum(counts):.0%}"
                for bound, count in zip(_AGES, counts, strict=True)
            )
            yield f"{label:<10}{'  '.join(shares)}"


def _written(core: Mapping[str, Any]) -> int:
    return sum(one["written_back_pages"] + one["written_through_pages"] for one in core["backed"])


def _change(now: Mapping[str, Any], before: Mapping[str, Any], part: str, counter: str) -> int:
    """Return the growth of a counter; 0 if another daemon was started in between."""
    return max(int(now[part][counter] - before[part][counter]), 0)


def _rate_lines(now: Statistics, before: Statistics, seconds: float) -> Iterator[str]:
    front, earlier = now["core"]["frontswap"], before["core"]["frontswap"]
    rows = [("Pages", "a second", "in all", "half within", "99 % within")]
    for name, field, latency in (
        ("stored", "succ_stores", "write_latency"),
        ("loaded", "loads", "read_latency"),
        ("freed", "invalidates", ""),
        ("refused", "failed_stores", ""),
    ):
        times = ("-", "-")
        if latency:
            counts = _since(now["fuse"][latency]["counts"], before["fuse"][latency]["counts"])
            times = (within(counts, 0.5), within(counts, 0.99))
        rate = max(front[field] - earlier[field], 0) / seconds if seconds > 0 else 0.0
        rows.append((name, f"{rate:.0f}", str(front[field]), *times))
    yield from table_lines(rows)
    reasons = ", ".join(f"{count} {reason}" for reason, count in front["rejects"].items() if count)
    if reasons:
        yield f"refused because: {reasons}"


def _since(counts: list[int], before: list[int]) -> list[int]:
    """Return the counts since the last report.

    Return all counts if there are none since then, because few requests are timed.
    """
    new = [count - earlier for count, earlier in zip(counts, before, strict=True)]
    return new if sum(new) > 0 and min(new) >= 0 else counts


def within(counts: list[int], share: float) -> str:
    """Return the time in µs or ms within which a share of the timed requests ended.

    Return `-` if no request was timed.

    Args:
        counts: requests that took at most 1, 2, 4, … µs; the last count has no bound.
        share: the share, from 0 to 1.
    """
    total, so_far = sum(counts), 0
    for place, count in enumerate(counts[:-1]):
        so_far += count
        if total and so_far >= share * total:
            return f"{1 << place} µs" if place < 10 else f"{(1 << place) / 1000:.1f} ms"
    return "longer" if total else "-"


def _class_lines(core: Mapping[str, Any], *, most: int) -> Iterator[str]:
    """Yield the table of the objects with the most memory: zsmalloc's classes or zbud's lists.

    Args:
        core: the core's part of a report.
        most: limit of the rows.
    """
    page_size = core["frames"]["page_size"]
    if not core["zsmalloc"]:
        yield from table_lines(
            [
                ("Page frames of zbud", "Memory", "Objects"),
                *_zbud_rows(core["zbud"], page_size)[:most],
            ]
        )
        return
    rows = [("Size class", "Memory", "Objects", "In use")]
    for one in sorted(core["zsmalloc"]["classes"], key=lambda one: -int(one["used_frames"]))[:most]:
        if one["used_frames"]:
            full = one["used_objects"] / one["objects"] if one["objects"] else 0.0
            rows.append(
                (
                    str(one["size"]),
                    format_size(one["used_frames"] * page_size),
                    str(one["used_objects"]),
                    f"{full:.0%}",
                )
            )
    yield from table_lines(rows)


def _zbud_rows(zbud: Mapping[str, Any], page_size: int) -> list[tuple[str, ...]]:
    """Return a row for each kind of frame, the kind with the most memory first."""
    single = zbud["zbud_unbuddied_list_counts"]  # by the object's length in chunks
    quarter = (len(single) + 1) // 4
    kinds = [("two objects", zbud["zbud_buddied_count"], 2)]
    for place, name in enumerate(("a quarter", "half", "three quarters", "all")):
        kinds.append(
            (f"one object of up to {name}", sum(single[place * quarter : (place + 1) * quarter]), 1)
        )
    kinds.append(("a whole page", zbud["bodies"], 1))
    return [
        (name, format_size(frames * page_size), str(frames * objects))
        for name, frames, objects in sorted(kinds, key=lambda kind: -int(kind[1]))
        if frames
    ]


def _file_lines(
    core: Mapping[str, Any], before: Mapping[str, Any], seconds: float
) -> Iterator[str]:
    """Yield the table of files: what each has, and pages read and written a second."""
    page_size = core["frames"]["page_size"]
    earlier = {one["name"]: one for one in before["devices"]}
    on_disk = {one["name"]: one["bd_count"] for one in core["backed"]}
    rows = [("File", "Size", "Stored", "Memory", "On disk", "Hits/s", "Disk/s", "Out/s", "Lost")]
    for one in core["devices"]:
        rates = (
            f"{_growth(one, earlier.get(one['name'], one), counter) / seconds:.0f}"
            if seconds > 0
            else "0"
            for counter in ("hits", "disk_reads", "pages_written")
        )
        rows.append(
            (
                one["name"],
                format_size(one["size"]),
                format_size(one["stored_pages"] * page_size),
                format_size(one.get("object_bytes", 0)),  # an older daemon does not send it
                format_size(on_disk.get(one["name"], 0) * page_size),
                *rates,
                str(one["lost_pages"]),
            )
        )
    yield from table_lines(rows)


def _growth(now: Mapping[str, Any], before: Mapping[str, Any], counter: str) -> int:
    """Return the growth of a file's counter; 0 if an older daemon does not send it."""
    return max(int(now.get(counter, 0) - before.get(counter, 0)), 0)
