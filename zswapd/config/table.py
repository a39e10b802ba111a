# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of all settings.

A section is a frozen dataclass. Each field declares one setting, once, as
`name: type = setting(kind, default, help=…)`. The rest of the program takes from that field:

- the typed attribute (`config.pool.compressor`);
- the key in the file (`[pool]` `compressor = "lz4"`);
- the command line's `--set pool.compressor=lz4`;
- the control socket's `get` and `set`;
- the checks and the help.

The type checker compares the annotation of a field with its kind.

A default has the form in which a user writes it (`"min(50%, 4G)"`), because its value depends on
the machine. Only `zswapd.config.loader` can therefore build a section. `load()` without sources
gives the defaults.
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
    OptionalChoice,
    OptionalInteger,
    OptionalPath,
    OptionalSize,
    OptionalSwapSize,
    SwapSize,
    UserNames,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

T = TypeVar("T")

RETIRED = {
    "fuse.budget_us": "other tasks get their turn after 2000 µs of requests",
    "fuse.hook": "the hook always serves the swap files",
    "pool.recompress_gain": "a page keeps zstd if that saves 10 % of its compressed size",
    "pool.recompress_rate": "1000 pages are compressed again in a second at most",
    "service.io_flusher": "it is always on where the kernel permits it",
}
"""Settings of earlier versions by full name, and what holds instead.

A config file or a predecessor may still have them. Their values have no effect.
"""

RESERVED_FILE_NAMES = frozenset({"swap", "stats", "params", "cache"})
"""Names in the mount that are reserved for the daemon."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the table."""

    section: str
    key: str
    kind: Kind[object]
    default: object
    """The value as a file has it, or a function that returns it for a context."""
    help: str
    unit: str
    reloadable: bool
    """True if the setting can change while the daemon runs."""

    @property
    def dest(self) -> str:
        """The full name of the setting, `section.key`."""
        return f"{self.section}.{self.key}"

    def default_for(self, context: Context) -> object:
        """Return the default as a file has it."""
        return self.default(context) if callable(self.default) else self.default


def setting(
    kind: Kind[T],
    default: object | Callable[[Context], object],
    *,
    help: str,  # noqa: A002 - the table's own word, as in argparse
    unit: str = "",
    reloadable: bool = False,
) -> T:
    """Return the field of a section that declares a setting.

    Args:
        kind: reads and checks the value; its type must be the type of the field.
        default: the value as a file has it, or a function that returns it for a context.
        help: the description, without the default and the range.
        unit: unit of a plain number.
        reloadable: True if the setting can change while the daemon runs.
    """
    row = {"kind": kind, "default": default, "help": help, "unit": unit, "reloadable": reloadable}
    return cast("T", dataclasses.field(metadata=row))


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseSection:
    """[fuse]: the mount, and how the daemon fetches requests."""

    mountpoint: Path = setting(  # noqa: RUF009 - gives a dataclass field
        AbsolutePath(), "/run/zswapd/mnt", help="Directory where the swap files appear."
    )
    poll_us: int = setting(
        Integer(0, 100_000),
        400,
        help="Time to poll for the next request before the daemon sleeps; 0 sleeps at once.",
        unit="µs",
        reloadable=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapSection:
    """[swap]: the swap files, and how `zswapctl swapon` swaps on to them."""

    size: int | None = setting(
        OptionalSwapSize(), "min(50%, 4G)", help="Size of the swap file `swap`.", unit="bytes"
    )
    files: Mapping[str, int] = setting(
        Named(SwapSize(), reserved=RESERVED_FILE_NAMES),
        {},
        help=(
            "Further swap files, by name. An entry is a size, or a table with size and the settings"
            " of a client."
        ),
        unit="bytes",
    )
    priority: int = setting(
        Integer(0, 32767),
        100,
        help="Swap priority. The kernel fills the swap area with the highest priority first.",
        reloadable=True,
    )
    discard: bool = setting(
        Boolean(),
        default=True,
        help="Let the kernel report freed swap slots, so that the daemon can free their memory.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSection:
    """[pool]: the compression of pages, and the limits of their memory."""

    compressor: str = setting(
        Choice(), "lz4", help="Codec for new pages. Stored pages keep their codec.", reloadable=True
    )
    checksum: bool = setting(
        Boolean(),
        default=True,
        help="Store a checksum with each page and verify it at each load.",
        reloadable=True,
    )
    limit: int | None = setting(
        OptionalSize(100),
        "",
        help=(
            "Limit of the memory for stored pages. The lower of it and"
            " zv_page_count_policy_percent counts. If empty: only that limit applies, and with a"
            " backing 20% of memory."
        ),
        unit="bytes",
        reloadable=True,
    )
    accept_threshold_percent: int = setting(
        Integer(1, 100),
        90,
        help=(
            "With a backing: after the pool hit its limit, it takes pages again when it is down"
            " to this share of the limit."
        ),
        unit="%",
        reloadable=True,
    )
    incompressible: str = setting(
        Choice(("auto", "store", "refuse")),
        "auto",
        help=(
            "Treatment of a page that does not compress. store keeps it uncompressed. refuse"
            " sends it to the backing, or leaves it to the kernel if there is no backing. auto"
            " sends it to the backing, and keeps it if there is no backing or the backing does"
            " not take it."
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
            "While the pool's mean compressed size is above this, a page that compresses to more"
            " than this counts as incompressible."
        ),
        unit="bytes",
        reloadable=True,
    )
    zv_page_count_policy_percent: int = setting(
        Integer(1, 150),
        75,
        help=(
            "Limit of the memory for stored pages, as a share of all memory. The lower of it and"
            " limit counts."
        ),
        unit="%",
        reloadable=True,
    )
    recompress_age: int = setting(
        Integer(0, 10_000_000),
        0,
        help="Compress a page again, with zstd, after it was unused for this time; 0 for never.",
        unit="s",
        reloadable=True,
    )
    allocator: str = setting(
        Choice(("zsmalloc", "zbud")),
        "zsmalloc",
        help=(
            "Allocator that packs compressed pages into page frames. zsmalloc packs densely. zbud"
            " puts at most two pages into a frame."
        ),
    )
    max_zspage_frames: int = setting(
        Integer(1, 16),
        8,
        help=(
            "Limit of page frames that one zspage may join. More frames waste less memory at its"
            " end."
        ),
        unit="frames",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSection:
    """[cache]: pages of slow files, which stay compressed in memory while memory is plentiful."""

    limit: int | None = setting(
        OptionalSize(50),
        "25%",
        help="Limit of the memory for pages of cache volumes. If empty, there is no cache.",
        unit="bytes",
        reloadable=True,
    )
    volumes: Mapping[str, str] = setting(
        Named(BackingFile(("ro", "writethrough"))),
        {},
        help="Slow files to show as cache/NAME in the mount, by name.",
    )
    max_volumes: int = setting(
        Integer(1, 64),
        4,
        help="Limit of volumes at the same time. The daemon makes their threads when it starts.",
        unit="volumes",
    )
    queue_depth: int = setting(
        Integer(1, 64),
        4,
        help="Limit of reads and writes in flight for one backing file.",
        unit="requests",
    )
    check_ms: int = setting(
        Integer(0, 3_600_000),
        1000,
        help=(
            "When a volume is read, check its backing file for changes if the last check is older"
            " than this. Opening a volume always checks."
        ),
        unit="ms",
        reloadable=True,
    )
    sequential_cutoff: int | None = setting(
        OptionalSize(),
        "512M",
        help="Length of a sequential stream from which the pages it reads are not kept.",
        unit="bytes",
        reloadable=True,
    )
    allocator: str = setting(
        Choice(("zbud", "zsmalloc")),
        "zbud",
        help=(
            "Allocator that packs the pages into page frames. zbud can free single frames."
            " zsmalloc holds more pages."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySection:
    """[memory]: the shared memory that holds the pool."""

    arena: str = setting(
        Choice(("auto", "memfd", "tmpfs")),
        "auto",
        help=(
            "Kind of the pool's memory: a memfd, or a file on a tmpfs that is never swapped"
            " (kernel 6.4)."
        ),
    )
    reserve: int = setting(
        MemorySize(75),
        "min(1%, 16M)",
        help="Free memory held ready, so that a store does not wait for the kernel.",
        unit="bytes",
    )
    refill_wait_ms: int = setting(
        Integer(0, 10_000),
        250,
        help=(
            "Longest time for which a write waits for a refill of the reserve, before it is"
            " refused; 0 for no wait."
        ),
        unit="ms",
        reloadable=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BackingSection:
    """[backing]: a disk behind the pool, for pages that do not fit or are not worth memory."""

    path: Path | None = setting(  # noqa: RUF009 - gives a dataclass field
        OptionalPath(),
        "",
        help=(
            "File or block device with one slot for each page of the swap files. The daemon"
            " creates a file that is missing."
        ),
    )
    force: bool = setting(
        Boolean(),
        default=False,
        help="Use the backing even if it has a signature or foreign data, or is in memory.",
    )
    encrypt: bool = setting(
        Boolean(),
        default=True,
        help="Encrypt pages on the backing. The key is in the daemon's memory only.",
    )
    threads: int = setting(
        Integer(1, 64), 8, help="Limit of requests to the disk at the same time."
    )
    writeback: bool = setting(
        Boolean(),
        default=True,
        help="Send unused pages to the disk when the pool is nearly full.",
        reloadable=True,
    )
    promote: bool = setting(
        Boolean(),
        default=True,
        help=(
            "Move a page that is read from the disk back to the pool while the pool has room. A"
            " page that was old moves back at its second read."
        ),
        reloadable=True,
    )
    idle_age: int = setting(
        Integer(0, 10_000_000),
        0,
        help=(
            "Send a page to the disk after it was unused for this time, even if the pool has"
            " room; 0 for never."
        ),
        unit="s",
        reloadable=True,
    )
    incompressible_limit: int | None = setting(
        OptionalSize(100),
        "",
        help=(
            "Limit of the memory for uncompressed pages. Above it, the oldest of them go to the"
            " disk."
        ),
        unit="bytes",
        reloadable=True,
    )
    budget: int | None = setting(
        OptionalSize(),
        "",
        help="Limit of bytes that writeback may write in a day, to spare the disk.",
        unit="bytes",
        reloadable=True,
    )
    buffers: int = setting(
        MemorySize(75), "16M", help="Memory for pages in flight to and from the disk.", unit="bytes"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSection:
    """[service]: protections that keep the daemon from waiting for its own swap."""

    lock_memory: bool = setting(
        Boolean(), default=True, help="Keep the daemon's memory from being swapped out."
    )
    oom_score_adj: int = setting(
        Integer(-1000, 1000),
        -1000,
        help="The oom_score_adj of the daemon; -1000 keeps the OOM killer away from it.",
    )
    scheduling: str = setting(
        Choice(("nice", "rr", "normal")),
        "nice",
        help=(
            "Scheduling of the daemon on a busy processor: nice (nice value -3), rr (real-time),"
            " or normal (like any program)."
        ),
    )
    spare: bool = setting(
        Boolean(),
        default=True,
        help=(
            "Keep a second worker ready, with its memory populated. It takes over when the first"
            " worker dies."
        ),
    )
    hang_timeout: int = setting(
        Integer(0, 3600),
        10,
        help=(
            "The watchdog ends a worker whose event loop stands still for this time, and another"
            " worker takes over. 0 turns the watchdog off."
        ),
        unit="s",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSection:
    """[control]: the socket on which zswapctl reaches the daemon."""

    socket: Path = setting(  # noqa: RUF009 - gives a dataclass field
        AbsolutePath(socket=True), paths.SOCKET, help="Path of the control socket."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSection:
    """[metrics]: the metrics for Prometheus."""

    listen: str = setting(
        ListenAddress(), "127.0.0.1:9847", help="Address where http://…/metrics is served."
    )
    users: str = setting(
        UserNames(),
        "prometheus",
        help=(
            "Users of this machine that may read the metrics, besides root and the daemon's own"
            " user; * for all users."
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSection:
    """[log]: the messages that the daemon logs."""

    level: str = setting(
        Choice(("debug", "info", "warning", "error")),
        "info",
        help="Lowest severity that is logged.",
        reloadable=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSection:
    """[swap.files.NAME]: what one swap file may take of the pool, beside its size."""

    limit: int | None = setting(
        OptionalSize(100),
        "",
        help=(
            "Limit of the bytes that the file's compressed pages take in the pool. Above it, its"
            " oldest pages go to the disk. Without a disk its writes are refused."
        ),
        unit="bytes",
        reloadable=True,
    )
    weight: int = setting(
        Integer(1, 10_000),
        100,
        help=(
            "The file's share of a full pool, against the sum of all weights. Writeback takes pages"
            " first from the file that is most above its share."
        ),
        reloadable=True,
    )
    priority: int | None = setting(
        OptionalInteger(0, 32767),
        "",
        help="Swap priority of this file. If empty: swap.priority.",
        reloadable=True,
    )
    writeback: str = setting(
        Choice(("disk", "never")),
        "disk",
        help=(
            "never keeps the file's pages off the disk behind the pool. Writes are refused where"
            " the pool is full. Pages that are on the disk already stay there until they are read."
        ),
        reloadable=True,
    )
    compressor: str = setting(
        OptionalChoice(),
        "",
        help="Codec for new pages of this file. If empty: pool.compressor.",
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
"""The sections by name, in the order of docs/configuration.md."""


def _rows() -> dict[str, Setting]:
    rows = [
        Setting(section=section, key=field.name, **field.metadata)
        for section, cls in SECTIONS.items()
        for field in dataclasses.fields(cls)
    ]
    return {row.dest: row for row in rows}


SETTINGS: Mapping[str, Setting] = _rows()
"""The settings by full name."""
FILES = "swap.files"
CLIENT_SETTINGS: Mapping[str, Setting] = {
    field.name: Setting(section=f"{FILES}.NAME", key=field.name, **field.metadata)
    for field in dataclasses.fields(ClientSection)
}
"""The settings of [swap.files.NAME] by key, without `size`."""


def sections() -> Iterator[tuple[str, type[Any], list[Setting]]]:
    """Yield the name, the class and the settings of each section, for reference pages."""
    for name, cls in SECTIONS.items():
        yield name, cls, [row for row in SETTINGS.values() if row.section == name]
        if name == "swap":
            yield f"{FILES}.NAME", ClientSection, list(CLIENT_SETTINGS.values())
