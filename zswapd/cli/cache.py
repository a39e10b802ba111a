# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl cache`: the commands of cache volumes, which show slow files through the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zswapd.cli.render import table_lines
from zswapd.units import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from zswapd.control.client import Client

    Command = Callable[[Client, argparse.Namespace], tuple[object, Iterable[str]]]


def _add(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    # Symbolic links are not resolved here: the daemon resolves the name at each check of the file.
    path = str(Path.cwd() / options.backing)
    report = cast(
        "dict[str, Any]", client.call("cache-add", name=options.name, path=path, mode=options.mode)
    )
    return report, [
        f"volume {report['name']} shows {report['path']}: {format_size(report['size'])},"
        f" {report['mode']}"
    ]


def _list(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast("dict[str, Any]", client.call("cache-list"))
    if not report["volumes"]:
        return report, ["there are no volumes; `zswapctl cache add NAME --backing PATH` adds one"]
    rows = [("Name", "Size", "Mode", "Pages", "Hits", "Backing file")]
    for row in report["volumes"]:
        hits = "-" if row["hit_ratio"] is None else f"{row['hit_ratio']:.1%}"
        rows.append(
            (
                row["name"],
                format_size(row["size"]),
                row["mode"],
                str(row["pages"]),
                hits,
                row["path"],
            )
        )
    lines = list(table_lines(rows))
    lines += [f"{row['name']}: {row['problem']}" for row in report["volumes"] if row["problem"]]
    if report["frozen"]:
        lines.append("frozen: the cache keeps no further pages until `zswapctl cache thaw`")
    return report, lines


def _remove(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    return client.call("cache-remove", name=options.name), [f"volume {options.name} is removed"]


def _invalidate(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast("dict[str, Any]", client.call("cache-invalidate", name=options.name))
    return report, [
        f"{report['dropped_pages']} pages of {options.name} dropped, and its page cache"
    ]


def _resize(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast("dict[str, Any]", client.call("cache-resize", name=options.name))
    return report, [f"volume {report['name']} is {format_size(report['size'])} long"]


def _freeze(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    return client.call("cache-freeze"), [
        "frozen: the cache keeps no further pages until `zswapctl cache thaw`"
    ]


def _thaw(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    return client.call("cache-thaw"), ["thawed: the cache keeps pages again"]


def add_commands(cache: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """Add the commands of `zswapctl cache`.

    Args:
        cache: the parser of `zswapctl cache`.
        shared: the parser with the options of every command.
    """
    commands = cache.add_subparsers(dest="cache_command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text[:1].upper() + text[1:] + ".", parents=[shared]
        )
        command.set_defaults(run=run)
        if named:
            command.add_argument("name", metavar="NAME", help="name of the volume")
        return command

    add_ = add("add", _add, "show a file or block device as cache/NAME in the mount")
    add_.add_argument("--backing", required=True, metavar="PATH", help="the file or block device")
    add_.add_argument(
        "--mode",
        choices=("ro", "writethrough"),
        default="ro",
        help="ro: read only; writethrough: writes go to the file at once (default: ro)",
    )
    add("list", _list, "show the volumes, and how well they are cached", named=False)
    add("remove", _remove, "remove a volume; processes that have it open get errors")
    add(
        "invalidate",
        _invalidate,
        "drop the cached pages of a volume, for example after its block device has changed",
    )
    add("resize", _resize, "set the size of a volume to the present size of its backing file")
    add("freeze", _freeze, "keep no further pages in the cache", named=False)
    add("thaw", _thaw, "end a freeze", named=False)
