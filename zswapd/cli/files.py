# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl files`: swap files come, go and change their size while the daemon runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from zswapd.cli.render import table_lines
from zswapd.units import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from zswapd.control.client import Client
    from zswapd.control.protocol import StatusReport

    Command = Callable[[Client, argparse.Namespace], tuple[object, Iterable[str]]]

_KEYS = ("limit", "weight", "priority", "writeback", "compressor")


def _list(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    status = cast("StatusReport", client.call("status"))
    rows = [
        ("File", "Size", "Stored", "Memory", "Limit", "Weight", "On disk", "Hits", "Disk reads")
    ]
    for file in status["files"]:
        limit = file.get("limit_bytes", 0)
        rows.append(
            (
                file["name"],
                format_size(file["size"]),
                format_size(file["stored_pages"] * status["page_size"]),
                format_size(file.get("object_bytes", 0)),
                format_size(limit) if limit else "-",
                str(file.get("weight", 100)),
                format_size(file.get("disk_pages", 0) * status["page_size"]),
                str(file.get("hits", 0)),
                str(file.get("disk_reads", 0)),
            )
        )
    return {"files": status["files"]}, table_lines(rows)


def _add(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    settings = {key: value for key in _KEYS if (value := getattr(options, key)) is not None}
    report = cast(
        "dict[str, Any]",
        client.call("files-add", name=options.name, size=options.size, settings=settings),
    )
    return report, [f"{report['file']} is there: {format_size(report['size'])}"]


def _remove(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast("dict[str, Any]", client.call("files-remove", name=options.name))
    return report, [f"{options.name} is removed, with {report['dropped_pages']} pages"]


def _resize(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast(
        "dict[str, Any]", client.call("files-resize", name=options.name, size=options.size)
    )
    return report, [f"{report['file']} is {format_size(report['size'])} long"]


def add_commands(
    files: argparse.ArgumentParser, common: Callable[[], argparse.ArgumentParser]
) -> None:
    """Add the commands of `zswapctl files`.

    Args:
        files: the parser of `zswapctl files`.
        common: returns a parser with the options of every command.
    """
    commands = files.add_subparsers(dest="files_command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str, *, named: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text[:1].upper() + text[1:] + ".", parents=[common()]
        )
        command.set_defaults(run=run)
        if named:
            command.add_argument("name", metavar="NAME", help="name of the swap file")
        return command

    size = "size of the file, such as 512M, 4G or 50%%"
    add("list", _list, "show the swap files, what they have and what they may take", named=False)
    add_ = add("add", _add, "add a swap file; it stays until it is removed or the daemon stops")
    add_.add_argument("--size", required=True, metavar="SIZE", help=size)
    for key, metavar, text in (
        ("limit", "SIZE", "limit of its compressed pages in the pool"),
        ("weight", "N", "its share of a full pool against the other files (default: 100)"),
        ("priority", "N", "its swap priority (default: swap.priority)"),
        ("writeback", "HOW", "disk or never (default: disk)"),
        ("compressor", "CODEC", "codec of its new pages (default: pool.compressor)"),
    ):
        add_.add_argument(f"--{key}", metavar=metavar, help=text)
    resize = add("resize", _resize, "change the size of a swap file that is not in use")
    resize.add_argument("--size", required=True, metavar="SIZE", help=size)
    add("remove", _remove, "remove a swap file that is not in use, with its pages")
