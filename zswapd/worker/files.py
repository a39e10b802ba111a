# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters and settings as small files: the directories `stats/` and `params/` of the mount.

They serve users that have a shell and no zswapctl. A file has the name that `zswapctl stats` or
`zswapctl get` gives its value (`frontswap.succ_stores`, `pool.limit`). The counters and knobs that
zcache had in sysfs are there by zcache's names too (`flush_total`, `zv_max_zsize`). The set of
files is made when the worker starts, and is the same in the next worker.

Opening a counter takes a snapshot of all counters, which is 0.33 ms of the event loop. A snapshot
younger than FRESH_S (worker/successor.py) is used again. So there are at most 50 snapshots a second
for any number of files. The page path does not depend on them.

Writing a setting does what `zswapctl set` does: the new settings are checked together, and applied
completely or not at all.

Limits: a file has one value, or a table where the value is a table. Settings that are tables
(swap.files) cannot be written at run time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zswapd.config import SETTINGS, describe
from zswapd.errors import ConfigError, PermissionsError
from zswapd.worker.reports import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zswapd.config import Config
    from zswapd.fuse.inodes import Directory
    from zswapd.metrics.snapshot import Snapshot

_PLACES = {
    "core.tmem": (
        "flush_total flush_found flobj_total flobj_found failed_eph_puts failed_pers_puts"
        " put_to_flush curr_obj_count curr_obj_count_max curr_objnode_count curr_objnode_count_max"
    ),
    "core.zv": "compress_poor mean_compress_poor",
    "core.frames": "failed_get_free_pages",
    "core.frontswap": "succ_stores failed_stores loads invalidates",
    "core.cache.zbuds": (
        "zbud_curr_zpages zbud_curr_zbytes zbud_cumul_zpages zbud_cumul_zbytes "
        "evicted_raw_pages evicted_unbuddied_pages evicted_buddied_pages"
    ),
    "core.cache.zbud": "zbud_buddied_count zbud_unbuddied_list_counts zbud_cumul_chunk_counts",
}
"""Counters that have zcache's and frontswap's own names, by the part that counts them."""
OWN_NAMES: Mapping[str, tuple[str, ...]] = {
    **{name: (f"{part}.{name}",) for part, names in _PLACES.items() for name in names.split()},
    "failed_alloc": ("core.zsmalloc.failed_alloc", "core.zbud.failed_alloc"),
    "zv_curr_dist_counts": ("core.zv.curr_dist_counts",),
    "zv_cumul_dist_counts": ("core.zv.cumul_dist_counts",),
    "zbud_curr_raw_pages": ("core.cache.frames",),
    # zcache's zbud had a list of empty pages of its own. In zswapd, all parts share one reserve.
    "zbpg_unused_list_count": ("core.frames.free_frames",),
}
"""The counters that zcache and frontswap had in sysfs, each with its places in a snapshot.

The first place that exists gives the value. The files exist with any settings: the counter of a
part that is switched off is 0.
"""
SHORT_NAMES = ("zv_max_zsize", "zv_max_mean_zsize", "zv_page_count_policy_percent")
"""Settings of [pool] that have zcache's names."""
_LONGEST = 4096
"""Longest value that is accepted, in bytes."""


class Counter:
    """The read-only file of one value of a snapshot.

    Args:
        snapshot: returns a fresh snapshot; with ages_sampled=True, always takes a new one.
        path: the names of the fields that lead to the value.
        others: other paths, for the case that a field of the first one does not exist.
    """

    writable = False

    def __init__(
        self, snapshot: Callable[..., Snapshot], path: tuple[str, ...], *others: tuple[str, ...]
    ) -> None:
        self._snapshot, self._path, self._others = snapshot, path, others

    def read(self) -> bytes:
        """Return the present value, or a table; 0 if no part counts it."""
        snapshot = self._snapshot(ages_sampled=self._path[-1].endswith("_ages"))
        for path in (self._path, *self._others):
            value: Any = snapshot
            for name in path:
                value = getattr(value, name, None)
            if value is not None:
                return _text(plain(value))
        return b"0\n"

    def write(self, _data: bytes) -> None:
        """Refuse the write.

        Raises:
            PermissionsError: always.
        """
        raise PermissionsError(f"{'.'.join(self._path)} cannot be written")


class SettingFile:
    """The file of one setting.

    Args:
        dest: full name of the setting.
        config: returns the present settings.
        change: changes settings, by full name, or raises ConfigError and changes none.
    """

    def __init__(
        self, dest: str, config: Callable[[], Config], change: Callable[[dict[str, object]], object]
    ) -> None:
        self._dest, self._config, self._change = dest, config, change
        self.writable = SETTINGS[dest].reloadable

    def read(self) -> bytes:
        """Return the value in the form in which it can be written, sizes in bytes."""
        return _text(describe(self._config(), [self._dest])[self._dest]["value"])

    def write(self, data: bytes) -> None:
        """Change the setting.

        Raises:
            ConfigError: the value is refused.
        """
        try:
            text = data[: _LONGEST + 1].decode().strip()
        except UnicodeDecodeError:
            raise ConfigError(f"{self._dest}: the value is not UTF-8", hint="write text") from None
        if len(data) > _LONGEST:
            raise ConfigError(
                f"{self._dest}: the value is {len(data)} bytes long",
                hint=f"write {_LONGEST} bytes at most",
            )
        self._change({self._dest: text})


def add_files(
    directory: Directory,
    first: Snapshot,
    snapshot: Callable[..., Snapshot],
    config: Callable[[], Config],
    change: Callable[[dict[str, object]], object],
) -> None:
    """Put `stats` and `params` into a mount's directory.

    Args:
        directory: the directory of the mount.
        first: a snapshot; its fields are the counters.
        snapshot: see `Counter`.
        config: see `SettingFile`.
        change: see `SettingFile`.
    """
    stats, params = directory.add_directory("stats"), directory.add_directory("params")
    for path in _leaves(first, ()):
        shown = path[1:] if path[0] == "core" else path
        directory.add_text_file(stats, ".".join(shown), Counter(snapshot, path))
    for name, places in OWN_NAMES.items():
        directory.add_text_file(
            stats, name, Counter(snapshot, *(tuple(place.split(".")) for place in places))
        )
    for dest in SETTINGS:
        directory.add_text_file(params, dest, SettingFile(dest, config, change))
    for name in SHORT_NAMES:
        directory.add_text_file(params, name, SettingFile(f"pool.{name}", config, change))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every field that is no snapshot itself."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from _leaves(inner, (*path, field.name))
        elif inner is not None:  # None is a part that is switched off
            yield (*path, field.name)


def _text(value: Any) -> bytes:
    """Return plain values as lines.

    A table has its column heads in the first line. A mapping has a name in each line.
    """
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        rows = [
            " ".join(value[0]),
            *(" ".join(_word(item) for item in row.values()) for row in value),
        ]
    elif isinstance(value, Mapping):
        rows = [f"{name} {_word(item)}" for name, item in value.items()]
    else:
        rows = [_word(value)]
    return "".join(f"{row}\n" for row in rows).encode()


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(_word, value)) if value and not isinstance(value[0], list) else ""
    return "" if value is None else re.sub(r"\s+", " ", str(value))
