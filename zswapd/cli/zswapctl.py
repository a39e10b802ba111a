# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl`: shows the daemon's state, changes its settings, and swaps on and off.

Each command is one function from the options to a report. The report is printed as lines, or as one
JSON object with --json. `zswapctl status` must start fast. This module therefore imports neither
trio nor the page path, and a command imports the modules that only it needs.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zswapd import __version__, paths
from zswapd.cli import cache as cache_module
from zswapd.cli import files as files_module
from zswapd.cli import render, standard_files
from zswapd.cli.failures import guarded
from zswapd.cli.parsing import Parser, parse
from zswapd.control.client import Client
from zswapd.errors import ConfigError, UsageError
from zswapd.host.configfiles import configured_socket
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from zswapd.control.protocol import StatusReport
    from zswapd.swapdevice import Attachment

    Command = Callable[[Client, argparse.Namespace], tuple[object, Iterable[str]]]
    """Returns the report for --json, and the lines to print without --json."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zswapctl` and return its exit code.

    Args:
        argv: arguments in place of the process's own.
    """
    standard_files.complete()
    options = argparse.Namespace()
    parse("zswapctl", make_parser, argv, options)
    # SIGTERM acts like Ctrl-C: it also stops the child process that is in swapoff.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return guarded("zswapctl", lambda: _run(options), options)


def _run(options: argparse.Namespace) -> int:
    options.socket = options.socket or daemon_socket()
    with Client(options.socket) as client:
        report, lines = options.run(client, options)
        if options.json:
            if report is not None:
                print(json.dumps(report, indent=2))
        else:
            for line in lines:
                print(line)
    return 0


def daemon_socket(root: Path = Path("/")) -> Path:
    """Return the path of the daemon's control socket.

    The path comes from the config files of `zswapd run`, otherwise it is the default. If only the
    default socket exists, the default is returned: the daemon may have started before
    `control.socket` was changed.

    Args:
        root: directory that holds /etc and /run, for tests.
    """
    default = root / paths.SOCKET.lstrip("/")
    configured = configured_socket(root)
    if configured is None or (default.is_socket() and not configured.is_socket()):
        return default
    return configured


def _status(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.cli import swap as swap_module

    status = cast("StatusReport", client.call("status"))
    attached = swap_module.attachments(status)
    files = [{**file, **_swap_report(attached[file["name"]])} for file in status["files"]]
    return {**status, "files": files}, render.status_lines(status, attached)


def _swap_report(loop: Attachment | None) -> dict[str, object]:
    swap = loop.swap if loop else None
    return {
        "device": loop.device if loop else None,
        "swapped_out": swap.used if swap else None,
        "priority": swap.priority if swap else None,
    }


def _stats(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    statistics = cast("dict[str, Any]", client.call("stats"))
    return statistics, render.statistics_lines(statistics)


def _get(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    settings = cast("dict[str, Any]", client.call("get", keys=options.key))
    return settings, render.setting_lines(settings)


def _set(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.config import parse_assignment

    settings = cast(
        "dict[str, Any]",
        client.call("set", settings=dict(map(parse_assignment, options.assignment))),
    )
    if any(name.startswith("swap.files.") and name.endswith(".limit") for name in settings):
        _warn_of_limits(client, settings)
    return settings, render.setting_lines(settings)


def _warn_of_limits(client: Client, settings: Mapping[str, Any]) -> None:
    """Print a warning for each file that has more in the pool than its new limit."""
    for file in cast("StatusReport", client.call("status"))["files"]:
        limit, held = file.get("limit_bytes", 0), file.get("object_bytes", 0)
        if f"swap.files.{file['name']}.limit" in settings and 0 < limit < held:
            print(
                f"zswapctl: warning: {file['name']} has {format_size(held)} in the pool, more than"
                f" its limit of {format_size(limit)}; its oldest pages go to the disk, or its new"
                " pages are refused if they cannot",
                file=sys.stderr,
            )


def _reset(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    if bool(options.key) == options.all:
        raise ConfigError("reset needs either settings or --all", hint="name settings, or --all")
    settings = cast("dict[str, Any]", client.call("reset", keys=options.key))
    return settings, render.setting_lines(settings)


def _freeze(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    return client.call("freeze"), [
        "frozen: stores are refused until `zswapctl thaw`; stored pages can be read"
    ]


def _thaw(client: Client, _: argparse.Namespace) -> tuple[object, Iterable[str]]:
    return client.call("thaw"), ["thawed: pages are stored again"]


def _compact(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast("dict[str, int]", client.call("compact", progress=_news(options)))
    before, after = report["frames_before"], report["frames_after"]
    return report, [f"{before - after} of {before} frames freed, {after} in use"]


def _pages(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    """Print pages as they arrive, because there may be millions.

    With --json, each page is an object on its own line. The last object has the sums.
    """

    def show(news: object) -> None:
        part = cast("dict[str, Any]", news)
        for number, state, codec, size, age in part["pages"]:
            if options.json:
                row = {
                    "file": part["file"],
                    "page": number,
                    "state": state,
                    "codec": codec,
                    "bytes": size,
                    "age_s": age,
                }
                print(json.dumps(row))
            else:
                print(render.page_line(part["file"], number, state, codec, size, age))

    if not options.json:
        print(render.page_line("File", "Page", "State", "Codec", "Bytes", "Unused s"))
    file = {"file": options.name} if options.name else {}
    counts = cast("dict[str, dict[str, int]]", client.call("pages", progress=show, **file))["pages"]
    if options.json:
        print(json.dumps({"pages": counts}))
    return None, [
        f"{sum(counts.values())} pages:"
        f" {', '.join(f'{count} {state}' for state, count in counts.items()) or 'none'}"
    ]


def _news(options: argparse.Namespace) -> Callable[[object], None]:
    """Return a function that shows progress in one moving line, on a terminal without --json."""

    def show(news: object) -> None:
        if sys.stderr.isatty() and not options.json and isinstance(news, dict):
            text = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in news.items())
            print(f"\r\x1b[K{text}\r", end="", file=sys.stderr, flush=True)

    return show


def _shrink(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast(
        "dict[str, int]", client.call("shrink", progress=_news(options), frames=options.amount)
    )
    given, left = (format_size(report[name] * report["page_size"]) for name in ("frames", "left"))
    return report, [f"{report['frames']} frames given back, {given}; the cache has {left}"]


def _writeback(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    how: dict[str, object] = {"idle": True} if options.mark_idle else {}
    if options.incompressible:
        how["incompressible"] = True
    if options.pages is not None:
        how["pages"] = options.pages
    if options.mark_idle and (len(how) > 1 or options.idle is not None):
        raise UsageError(
            "--mark-idle sends no pages and cannot be combined with other options",
            hint="send pages with a second `zswapctl writeback`",
        )
    if options.idle is not None:
        how["unused"] = options.idle
    report = cast("dict[str, int]", client.call("writeback", progress=_news(options), **how))
    return report, [
        (
            "all pages are marked as unused"
            if options.mark_idle
            else f"{report['written_back']} pages moved from the pool to the disk"
        )
    ]


def _duplicates(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    file = {"file": options.name} if options.name else {}
    report = cast("dict[str, Any]", client.call("duplicates", progress=_news(options), **file))
    return report, render.duplicate_lines(report)


def _recompress(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    report = cast("dict[str, int]", client.call("recompress", progress=_news(options)))
    saved = format_size(report["saved_bytes"])
    return report, [
        f"{report['recompressed']} pages compressed again, {saved} saved; {report['in_vain']} pages"
        " gained too little"
    ]


def _swapon(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.cli import swap as swap_module

    if options.tune:
        from zswapd.system.advice import raise_min_free_kbytes

        raise_min_free_kbytes()
    report = swap_module.swapon(
        client,
        _names(options, ["swap"]),
        priority=options.priority,
        discard=options.discard,
        force=options.force,
    )
    _warn(report, options)
    return report, [
        f"{row['file']} is swapped on as {row['device']}: {format_size(row['size'])}, priority"
        f" {row['priority']}, {'with' if row['discard'] else 'without'} discard"
        for row in report["swapped_on"]
    ]


def _warn(report: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the warnings of a report, which has them for `--json` itself."""
    if not options.json:
        for warning in report["warnings"]:
            print(f"zswapctl: warning: {warning}", file=sys.stderr)


def _names(options: argparse.Namespace, default: list[str]) -> list[str] | None:
    """Return the files that the options name, otherwise the default; None for --all."""
    return None if options.all else options.name or default


def _swapoff(client: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.cli import swap as swap_module

    show = swap_module.SwapoffProgress(quiet=options.json)
    report = swap_module.swapoff(client, _names(options, []), force=options.force, show=show)
    _warn(report, options)
    return report, [f"{device} is swapped off and detached" for device in report["swapped_off"]]


def _upgrade(_: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.cli import upgrade

    report = upgrade.upgrade(options.socket, _news(options))
    return report, [
        f"zswapd {report['old_version']} was replaced by {report['version']} in"
        f" {report['seconds']:.1f} s; worker {report['worker']} serves"
    ]


def _top(_: Client, options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.cli import top  # imports curses

    if options.once or options.json or not sys.stdout.isatty():
        return top.once(options.socket, options.interval)
    top.live(options.socket, options.interval)
    return None, []


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _amount(text: str) -> int:
    """Return a number of pages. The text is a number of pages, or a size that is rounded up."""
    if text.isdecimal():
        return _count(text)
    from zswapd.config.loader import memory_total
    from zswapd.config.sizes import ValueRefused, parse_size
    from zswapd.pages import PAGE_SIZE

    try:
        return -(-parse_size(text, memory_total=memory_total()).bytes // PAGE_SIZE)
    except ValueRefused as refused:
        raise argparse.ArgumentTypeError(
            f"{text!r} {refused.message}; write a number of pages, or a size: 64M, 1G, 5%"
        ) from None


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time from 0.1 to 3600 s")
    return value


def _priority(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value <= 32767:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 32767")
    return value


def common(**defaults: object) -> Parser:
    """Return a parent parser with the options that may stand before and after the command.

    Args:
        defaults: the defaults, which only the parser before the command has.
    """
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    help_ = (
        "control socket of the daemon (default: control.socket of the config file, otherwise"
        f" {paths.SOCKET})"
    )
    parser.add_argument("--socket", type=Path, metavar="PATH", help=help_)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, also for an error"
    )
    parser.set_defaults(**defaults)
    return parser


def _add_swap_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    """Add `swapon` and `swapoff`."""
    swapon = add(
        "swapon", _swapon, "swap on: loop device, mkswap, swapon; a failed step undoes all steps"
    )
    swapon.add_argument("name", nargs="*", metavar="NAME", help="swap files (default: swap)")
    swapon.add_argument(
        "--all",
        action="store_true",
        help="all swap files that are off; it is no error if there are none",
    )
    swapon.add_argument(
        "--tune",
        action="store_true",
        help="first raise vm.min_free_kbytes, if it is less than recommended",
    )
    swapon.add_argument(
        "--priority", type=_priority, metavar="N", help="swap priority (default: swap.priority)"
    )
    swapon.add_argument(
        "--no-discard", dest="discard", action="store_false", help="do not discard freed slots"
    )
    swapon.add_argument(
        "--force",
        action="store_true",
        help="swap on even if a protection against a hanging machine is off",
    )
    swapoff = add("swapoff", _swapoff, "swap off, if the swapped-out pages fit into memory")
    swapoff.add_argument(
        "name", nargs="*", metavar="NAME", help="swap files (default: all that are on)"
    )
    swapoff.add_argument(
        "--all", action="store_true", help="all that are on; it is no error if there are none"
    )
    swapoff.add_argument(
        "--force", action="store_true", help="swap off even if the pages may not fit into memory"
    )


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="zswapctl",
        description="Show and control a running zswapd, and swap on and off.",
        parents=[common(socket=None, json=False)],
    )
    parser.add_argument("--version", action="version", version=f"zswapctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = common()  # one for all commands: a parser takes half a millisecond

    def add(name: str, run: Command, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text[:1].upper() + text[1:] + ".", parents=[shared]
        )
        command.set_defaults(run=run)
        return command

    add("status", _status, "show the stored pages, their memory, the swap files and protections")
    add("stats", _stats, "show all counters")
    _add_top_command(add)
    _add_settings_commands(add)
    _add_writeback_command(add)
    add("recompress", _recompress, "compress all pages again with zstd, if that saves enough")
    _add_swap_commands(add)
    files = commands.add_parser(
        "files",
        help="add, remove and resize swap files while the daemon runs",
        description="Add, remove and resize swap files while the daemon runs.",
    )
    files_module.add_commands(files, common)
    cache = commands.add_parser(
        "cache",
        help="show slow files through the cache",
        description="Manage cache volumes, which show slow files through the cache.",
    )
    cache_module.add_commands(cache, shared)
    add("freeze", _freeze, "refuse further stores; stored pages stay readable")
    add("thaw", _thaw, "end a freeze")
    shrink = add(
        "shrink",
        _shrink,
        "evict the least recently used pages of the cache and give their memory to the system",
    )
    shrink.add_argument(
        "amount",
        type=_amount,
        metavar="SIZE",
        help="amount of memory, such as 64M, 1G or 5%%; a plain number counts page frames",
    )
    add("upgrade", _upgrade, "replace the running program with the installed one, while swap is on")
    _add_page_commands(add)
    return parser


def _add_page_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    """Add `pages`, `duplicates` and `compact`."""
    pages = add(
        "pages",
        _pages,
        "show the state of each page: compressed, same-filled, raw, writing, disk or lost; with"
        " --json one object a line, the sums last",
    )
    pages.add_argument("name", nargs="?", metavar="NAME", help="swap file (default: all)")
    duplicates = add(
        "duplicates",
        _duplicates,
        "estimate how many stored pages are the same page twice, and what one copy would save",
    )
    duplicates.add_argument("name", nargs="?", metavar="NAME", help="swap file (default: all)")
    add("compact", _compact, "move stored objects together and free memory")


def _add_top_command(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    top_ = add("top", _top, "show the daemon's activity every second, until q is pressed")
    top_.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="S",
        help="time between two screens in seconds (default: 1)",
    )
    top_.add_argument("--once", action="store_true", help="print one screen and end")


def _add_settings_commands(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    get = add("get", _get, "show settings and their origins")
    get.add_argument(
        "key", nargs="*", metavar="SECTION.KEY", help="settings to show (default: all)"
    )
    set_ = add("set", _set, "change settings while the daemon runs, all of them or none")
    set_.add_argument(
        "assignment", nargs="+", metavar="SECTION.KEY=VALUE", help="a setting and its new value"
    )
    reset = add(
        "reset", _reset, "return settings that were changed at run time to their configured values"
    )
    reset.add_argument("key", nargs="*", metavar="SECTION.KEY", help="settings to reset")
    reset.add_argument("--all", action="store_true", help="reset all changed settings")


def _add_writeback_command(add: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    writeback = add(
        "writeback", _writeback, "send pages to the disk behind the pool, the oldest first"
    )
    writeback.add_argument(
        "--pages",
        type=_amount,
        metavar="N",
        help="limit: N pages, or a size such as 64M (default: all)",
    )
    writeback.add_argument(
        "--incompressible", action="store_true", help="only pages that are stored uncompressed"
    )
    writeback.add_argument(
        "--idle", type=_count, metavar="SECONDS", help="only pages that were unused for this time"
    )
    writeback.add_argument(
        "--mark-idle",
        action="store_true",
        help="send no page, but mark all pages as unused until they are used again",
    )
