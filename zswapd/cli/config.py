# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapd config`: show the settings and their origins, check them, print the defaults.

It reads the same sources as `zswapd run` (sources.py) and does not ask the daemon. A file can
therefore be checked before the daemon reads it.
"""

from __future__ import annotations

import json
import sys
import textwrap
from typing import TYPE_CHECKING

from zswapd.cli import output, render, sources
from zswapd.config import SECTIONS, SETTINGS, describe
from zswapd.config.kinds import shown
from zswapd.config.table import sections
from zswapd.handover import costs
from zswapd.host.configfiles import config_files

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator

    from zswapd.config import Context

    Command = Callable[[argparse.Namespace], tuple[object, Iterable[str]]]
    """Returns the report for --json, and the lines to print without --json."""

WIDTH = 80
"""Columns of the template."""


def run(options: argparse.Namespace) -> int:
    """Run one of the commands of `add_commands` and return the exit code.

    Raises:
        ConfigError: a source is refused.
    """
    report, lines = options.show(options)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for line in lines:
            print(line)
    return 0


def _show(options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    settings = describe(sources.load_config(options), options.key)
    return settings, render.setting_lines(settings)


def _check(options: argparse.Namespace) -> tuple[object, Iterable[str]]:
    from zswapd.supervisor.start_check import check  # imports most of the program

    config = sources.load_config(options)
    found = check(config)
    begun, full = costs.at_start(config), costs.books(config)
    for text in found.warnings:
        print(f"zswapd: warning: {text}", file=sys.stderr)
    for text in found.unchecked:
        print(f"zswapd: not checked: {text}", file=sys.stderr)
    files = [str(path) for path in config_files(options.config)]
    lines = [f"{path}: valid" for path in files] or [
        "there is no config file; the defaults are valid"
    ]
    lines += [
        f"memory before the first page: {costs.summed(begun)}",
        f"books of full swap files: {costs.summed(full)}",
    ]
    return {
        "ok": True,
        "files": files,
        "warnings": found.warnings,
        "unchecked": found.unchecked,
        "bytes_at_start": begun,
        "bytes_of_books": full,
    }, lines


def _defaults(_: argparse.Namespace) -> tuple[object, Iterable[str]]:
    context = sources.context()
    report = {
        row.dest: {
            "default": row.default_for(context),
            "takes": row.kind.describe(context),
            "unit": row.unit,
            "reloadable": row.reloadable,
            "help": row.help,
        }
        for row in SETTINGS.values()
    }
    lines = template(context)
    # TOML is UTF-8, so output in another character set has to be ASCII.
    return report, lines if output.has_unicode(sys.stdout) else map(output.plain, lines)


def template(context: Context) -> Iterator[str]:
    """Yield the lines of a config file that has each setting and its default as a comment.

    Args:
        context: the context of the defaults.
    """
    yield "# Settings of zswapd; see zswapd.toml(5). Each comment has a setting's default."
    for section, cls, rows in sections():
        yield ""
        yield from _remark((cls.__doc__ or "").partition(": ")[2])
        # A table of a file that does not exist would be an error.
        yield f"[{section}]" if section in SECTIONS else f"#[{section}]"
        for row in rows:
            live = " Can change at run time." if row.reloadable else ""
            yield ""
            yield from _remark(f"{row.help} Takes {row.kind.describe(context)}.{live}")
            indent = "" if section in SECTIONS else "  "
            yield f"#{indent}{row.key} = {shown(row.default_for(context))}"


def _remark(text: str) -> list[str]:
    text = text[:1].upper() + text[1:]
    return textwrap.wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def add_commands(config: argparse.ArgumentParser) -> None:
    """Add the commands of `zswapd config`.

    Args:
        config: the parser of `zswapd config`.
    """
    commands = config.add_subparsers(dest="config_command", required=True, metavar="COMMAND")

    def add(
        name: str, show: Command, text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        description = text[:1].upper() + text[1:] + "."
        command = commands.add_parser(
            name, help=text, description=description, parents=list(parents)
        )
        command.add_argument(
            "--json", action="store_true", help="print one JSON object, also for an error"
        )
        command.set_defaults(work=run, show=show)
        return command

    show_ = add(
        "show",
        _show,
        "show the settings that `zswapd run` would use, and the origin of each",
        sources.options(),
    )
    show_.add_argument(
        "key", nargs="*", metavar="SECTION.KEY", help="settings to show (default: all)"
    )
    add("check", _check, "check the settings, and report an error with its line", sources.options())
    add(
        "defaults", _defaults, "print a config file with every setting, its meaning and its default"
    )
