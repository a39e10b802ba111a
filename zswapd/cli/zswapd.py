# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapd`: the daemon's command line. Builds the Config, sets the log up, and hands over to the composition root."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd import __version__, compress, log
from zswapd.cli.failures import guarded
from zswapd.config import SETTINGS, Context, load, parse_assignment
from zswapd.config.kinds import shown
from zswapd.config.loading import memory_total
from zswapd.pages import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zswapd.config import Config

_RUN = (
    "Serve swap files in the foreground. SIGTERM and Ctrl-C swap off first and end the daemon when all that was swapped out is "
    "back in memory; if it does not fit, the daemon goes on."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zswapd` and return its exit code.

    Args:
        argv: arguments in place of the process's own.
    """
    return guarded("zswapd", lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    log.setup(config.log.level)
    from zswapd import supervisor  # after the Config: a mistake in it is told without waiting for the daemon's imports

    if options.upgrade_check is not None:
        supervisor.check(config, options.upgrade_check)
        return 0
    return supervisor.run(config, lambda work: guarded("zswapd", work))


def _config(options: argparse.Namespace) -> Config:
    assignments = [(*parse_assignment(text), "--set") for text in options.set]
    if options.size is not None:
        assignments.append(("swap.size", options.size, "--size"))
    if options.mountpoint is not None:
        assignments.append(("fuse.mountpoint", str(options.mountpoint.absolute()), "--mountpoint"))
    return load(codecs=compress.names(), file=options.config, assignments=assignments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zswapd",
        description="Compressed swap in user space: a file that the kernel can swap to, held compressed in memory.",
        epilog="`zswapctl` switches swap on and off and shows what is stored.",
    )
    parser.add_argument("--version", action="version", version=f"zswapd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="serve swap files until SIGTERM",
        description=textwrap.fill(_RUN, _width()),
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "--config", type=Path, metavar="FILE", help="config file (default: /etc/zswapd/zswapd.toml, if it is there)"
    )
    run.add_argument("--size", help="size of the swap file, such as 2G, 50%% or min(50%%, 4G)")
    run.add_argument("--mountpoint", type=Path, metavar="DIR", help="where the files appear")
    run.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any setting; may be repeated")
    # For `zswapctl upgrade`: whether this program could take over from the one that asks.
    run.add_argument("--upgrade-check", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def _settings_help() -> str:
    """Return the table of settings, as wide as the terminal."""
    context = Context(memory_total(), PAGE_SIZE, frozenset(compress.names()))
    lines = ["settings, in the config file as [section] and key = value, with their defaults:"]
    for setting in SETTINGS.values():
        live = " Can change at run time." if setting.reloadable else ""
        text = f"{setting.help}{live} Takes {setting.kind.describe(context)}."
        lines.append(f"  {setting.dest} = {shown(setting.default_for(context))}")
        lines += textwrap.wrap(text, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
