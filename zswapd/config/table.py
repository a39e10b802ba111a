# SPDX-License-Identifier: GPL-2.0-or-later
"""The settings, in one table.

Sections are frozen dataclasses, and each field carries what its setting needs.

A field is declared once, as `name: type = setting(kind, default, help=…)`. From that come the typed
attribute (`config.pool.compressor`), the key in the file (`[pool]` `compressor = "lz4"`), the
command line's `--set pool.compressor=lz4`, the control socket's `get` and `set`, the checks, and
the help. Its annotation is checked against its kind by the type checker.

Defaults are written as a user would write them (`"min(50%, 4G)"`), since what they come to depends
on the machine; hence no section can be built without `zswapd.config.loader`, and `load()` without
arguments gives the defaults.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from zswapd import paths
from zswapd.config.kinds import (
    AbsolutePath,
    BackingFile,
    Boolean,
    Choice,
    Context,
    Integer,
    Kind,
    ListenAddress,
    MemorySize,
    Named,
    OptionalPath,
    OptionalSize,
    OptionalSwapSize,
    SwapSize,
    UserNames,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

T = TypeVar("T")

RESERVED_FILE_NAMES = frozenset({"swap", "stats", "params", "cache"})
"""Names in the mountpoint that are the daemon's own, now or by plan."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table."""

    section: str
    key: str
    kind: Kind[object]
    default: object
    """As written in a file, or a function of the context that returns that."""
    help: str
    unit: str
    reloadable: bool
    """Can change while the daemon runs."""

    @property
    def dest(self) -> str:
        """The setting's full name, `section.key`."""
        return f"{self.section}.{self.key}"

    def default_for(self, context: Context) -> object:
        """Return the default in its written form."""
        return self.default(context) if callable(self.default) else self.default


def setting(
    kind: Kind[T],
    default: object | Callable[[Context], object],
    *,
    help: str,  # noqa: A002 - the table's own word, as in argparse
    unit: str = "",
    reloadable: bool = False,
) -> T:
    """Declare a section's field.

    Args:
        kind: how the value is read and checked; its type must be the field's.
        default: the value as a user would write it, or a function that gives it.
        help: one sentence, without the default and the range.
        unit: of a plain number.
        reloadable: whether it can change while the daemon runs.
    """
    row = {"kind": kind, "default": default, "help": help, "unit": unit, "reloadable": reloadable}
    return cast("T", dataclasses.field(metadata=row))


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseSection:
    """[fuse]: where the files appear, and how requests are fetched."""

    mountpoint: Path = setting(  # noqa: RUF009 - gives a dataclass field
        AbsolutePath(), "/run/zswapd/mnt", help="Directory where the swap files appear."
    )
    hook: bool = setting(
        Boolean(),
        default=True,
        help=(
            "Serve reads, writes and discards without pyfuse3's detour; without it there is no"
            " discard."
        ),
    )
    poll_us: int = setting(
        Integer(0, 100_000),
        400,
        help="How long to look out for the next request before going to sleep; 0 sleeps at once.",
        unit="µs",
        reloadable=True,
    )
    budget_us: int = setting(
        Integer(100, 1_000_000),
        2000,
        help="Longest time to serve requests before other tasks get their turn.",
        unit="µs",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSection:
    """[swap]: the swap files, and how `zswapctl swapon` switches them on."""

    size: int | None = setting(
        OptionalSwapSize(), "min(50%, 4G)", help="Size of the file `swap`.", unit="bytes"
    )
    files: Mapping[str, int] = setting(
        Named(SwapSize(), reserved=RESERVED_FILE_NAMES),
        {},
        help="Further swap files, by name.",
        unit="bytes",
    )
    priority: int = setting(
        Integer(0, 32767),
        100,
        help="Swap priority: the kernel fills the highest first.",
        reloadable=True,
    )
    discard: bool = setting(
        Boolean(),
        default=True,
        help="Have the kernel say which slots became free, so that their memory comes back.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSection:
    """[pool]: how pages are compressed, and how much memory they may take."""

    compressor: str = setting(
        Choice(), "lz4", help="Codec for new pages; stored pages keep theirs.", reloadable=True
    )
    checksum: bool = setting(
        Boolean(),
        default=True,
        help="Checksum stored pages and check at each load.",
        reloadable=True,
    )
    limit: int | None = setting(
        OptionalSize(100),
        "",
        help=(
            "Most memory that stored pages may take; the lower of it and"
            " zv_page_count_policy_percent counts. Without a word: no limit but that one, or 20% of"
            " memory with a backing."
        ),
        unit="bytes",
        reloadable=True,
    )
    accept_threshold_percent: int = setting(
        Integer(1, 100),
        90,
        help=(
            "With a backing: once the limit was hit, pages are taken again when the pool is down to"
            " this part of it."
        ),
        unit="%",
        reloadable=True,
    )
    incompressible: str = setting(
        Choice(("auto", "store", "refuse")),
        "auto",
        help=(
            "What becomes of a page that does not compress: store keeps it as it is; refuse sends"
            " it to the backing or leaves it to the kernel; auto sends it to the backing, and keeps"
            " it where there is none or it does not take it."
        ),
        reloadable=True,
    )
    zv_max_zsize: int = setting(
        Integer(32),
        lambda context: context.page_size * 7 // 8,
        help="A page that compresses to more than this counts as incompressible.",
        unit="bytes",
        reloadable=True,
    )
    zv_max_mean_zsize: int = setting(
        Integer(32),
        lambda context: context.page_size * 5 // 8,
        help=(
            "Stores that would raise the mean compressed size above this are refused while it is"
            " above."
        ),
        unit="bytes",
        reloadable=True,
    )
    zv_page_count_policy_percent: int = setting(
        Integer(1, 150),
        75,
        help=(
            "Most memory that stored pages may take, of all memory; the lower of it and limit"
            " counts."
        ),
        unit="%",
        reloadable=True,
    )
    recompress_age: int = setting(
        Integer(0, 10_000_000),
        0,
        help="Compress pages again, with zstd, that were not used for so long; 0 for never.",
        unit="s",
        reloadable=True,
    )
    recompress_rate: int = setting(
        Integer(1, 1_000_000),
        1000,
        help="Most pages that are compressed again in a second; one takes about 30 µs.",
        unit="pages",
        reloadable=True,
    )
    recompress_gain: int = setting(
        Integer(0, 99),
        10,
        help=(
            "A page is kept with zstd if that saves so much of its compressed size; else it is not"
            " tried again."
        ),
        unit="%",
        reloadable=True,
    )
    allocator: str = setting(
        Choice(("zsmalloc", "zbud")),
        "zsmalloc",
        help=(
            "What packs compressed pages into page frames: zsmalloc densely, zbud at most two a"
            " frame."
        ),
    )
    max_zspage_frames: int = setting(
        Integer(1, 16),
        8,
        help="Most page frames that one zspage may join to waste less at its end.",
        unit="frames",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSection:
    """[cache]: pages of slow files, kept compressed while memory is plentiful."""

    limit: int | None = setting(
        OptionalSize(50),
        "25%",
        help=(
            "Most memory that pages of cache volumes may take, half of all at most; without it"
            " there is no cache."
        ),
        unit="bytes",
        reloadable=True,
    )
    volumes: Mapping[str, str] = setting(
        Named(BackingFile(("ro", "writethrough"))),
        {},
        help="Slow files to be shown as cache/NAME in the mount, by name.",
    )
    max_volumes: int = setting(
        Integer(1, 64),
        4,
        help="Volumes there may be at once; their threads are made at start.",
        unit="volumes",
    )
    queue_depth: int = setting(
        Integer(1, 64),
        4,
        help="Reads and writes of one backing file under way at once.",
        unit="requests",
    )
    check_ms: int = setting(
        Integer(0, 3_600_000),
        1000,
        help=(
            "How old a look at a backing file may be, for changes underneath, when its volume is"
            " read; opening always looks."
        ),
        unit="ms",
        reloadable=True,
    )
    sequential_cutoff: int | None = setting(
        OptionalSize(),
        "512M",
        help="Bytes in a row after which what is read is no longer kept.",
        unit="bytes",
        reloadable=True,
    )
    allocator: str = setting(
        Choice(("zbud", "zsmalloc")),
        "zbud",
        help=(
            "What packs them into page frames: zbud gives single frames back, zsmalloc holds more."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySection:
    """[memory]: the shared memory that holds the pool."""

    arena: str = setting(
        Choice(("auto", "memfd", "tmpfs")),
        "auto",
        help=(
            "What the pool's memory is: a memfd, or a file on a tmpfs that is never swapped (kernel"
            " 6.4)."
        ),
    )
    reserve: int = setting(
        MemorySize(75),
        "64M",
        help="Free memory held ready, so that a store never has to ask the kernel.",
        unit="bytes",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingSection:
    """[backing]: a disk behind the pool, for what does not fit or is not worth memory."""

    path: Path | None = setting(  # noqa: RUF009 - gives a dataclass field
        OptionalPath(),
        "",
        help=(
            "File or block device with a slot for each page of the swap files; a file is made if"
            " missing."
        ),
    )
    force: bool = setting(
        Boolean(),
        default=False,
        help="Take it although it carries a signature or foreign data or is in memory.",
    )
    encrypt: bool = setting(
        Boolean(),
        default=True,
        help="Encrypt what is written there, with a key that is nowhere else.",
    )
    threads: int = setting(Integer(1, 64), 8, help="Requests to the disk at a time.")
    writeback: bool = setting(
        Boolean(),
        default=True,
        help="Send pages that are not used to the disk when the pool is nearly full.",
        reloadable=True,
    )
    promote: bool = setting(
        Boolean(),
        default=True,
        help=(
            "A page that is read from the disk returns to the pool while that has room; one that"
            " was old, at the second read."
        ),
        reloadable=True,
    )
    idle_age: int = setting(
        Integer(0, 10_000_000),
        0,
        help="Send pages there, need or not, that were not used for so long; 0 for never.",
        unit="s",
        reloadable=True,
    )
    incompressible_limit: int | None = setting(
        OptionalSize(100),
        "",
        help=(
            "Most memory for pages that are stored as they are; above it the oldest of them go to"
            " the disk."
        ),
        unit="bytes",
        reloadable=True,
    )
    budget: int | None = setting(
        OptionalSize(),
        "",
        help="Most that writeback may write in a day, to spare the disk.",
        unit="bytes",
        reloadable=True,
    )
    buffers: int = setting(
        MemorySize(75),
        "16M",
        help="Memory for pages on their way to the disk and back.",
        unit="bytes",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSection:
    """[service]: what keeps the daemon from waiting for its own swap."""

    lock_memory: bool = setting(
        Boolean(), default=True, help="Keep the daemon's memory from being swapped out."
    )
    io_flusher: bool = setting(
        Boolean(),
        default=True,
        help="Tell the kernel that the daemon writes out dirty memory (PR_SET_IO_FLUSHER).",
    )
    oom_score_adj: int = setting(
        Integer(-1000, 1000), -1000, help="The daemon's place on the OOM killer's list."
    )
    scheduling: str = setting(
        Choice(("nice", "rr", "normal")),
        "nice",
        help=(
            "How the daemon gets a busy processor: by its nice value, as a real-time task, or like"
            " everybody."
        ),
    )
    spare: bool = setting(
        Boolean(),
        default=True,
        help=(
            "Keep a second worker ready, with its memory in hand, that takes over when the first"
            " one dies."
        ),
    )
    hang_timeout: int = setting(
        Integer(0, 3600),
        10,
        help=(
            "How long a worker's event loop may stand still before it is ended and another takes"
            " over; 0 waits for ever."
        ),
        unit="s",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSection:
    """[control]: how zswapctl reaches the daemon."""

    socket: Path = setting(  # noqa: RUF009 - gives a dataclass field
        AbsolutePath(socket=True), paths.SOCKET, help="Path of the control socket."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSection:
    """[metrics]: what Prometheus is told."""

    listen: str = setting(
        ListenAddress(), "127.0.0.1:9847", help="Where http://…/metrics is served."
    )
    users: str = setting(
        UserNames(),
        "prometheus",
        help=(
            "Users of this machine who may read them, besides root and the daemon's own; * for all."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """[log]: what is written to the log."""

    level: str = setting(
        Choice(("debug", "info", "warning", "error")),
        "info",
        help="Least severity that is logged.",
        reloadable=True,
    )


SECTIONS: Mapping[str, type[Any]] = {
    "fuse": FuseSection,
    "swap": SwapSection,
    "pool": PoolSection,
    "cache": CacheSection,
    "memory": MemorySection,
    "backing": BackingSection,
    "service": ServiceSection,
    "control": ControlSection,
    "metrics": MetricsSection,
    "log": LogSection,
}
"""The sections by their name in the file, in the order of the reference page."""


def _rows() -> dict[str, Setting]:
    rows = [
        Setting(section=section, key=field.name, **field.metadata)
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    ]
    return {row.dest: row for row in rows}


SETTINGS: Mapping[str, Setting] = _rows()
"""Every setting by its full name."""
