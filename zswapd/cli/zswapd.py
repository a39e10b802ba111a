# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapd`: the daemon's command line.

Sets the log up, knows where settings come from, hands over to the composition root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import textwrap
import time
from typing import TYPE_CHECKING, cast

from zswapd import __version__, log
from zswapd.cli import config as config_module
from zswapd.cli import sources, standard_files
from zswapd.cli.failures import guarded
from zswapd.cli.parsing import Parser, parse
from zswapd.config import SETTINGS, to_document
from zswapd.config.kinds import shown
from zswapd.errors import ZswapdError
from zswapd.host import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

AGAIN_S = 2.0
"""Time until a service manager may try a command line again that is not right."""
_RUN = (
    "Serve swap files in the foreground. SIGTERM and Ctrl-C swap off first and end the daemon when"
    " all that was swapped out is back in memory; if it does not fit, the daemon goes on."
)

_REFUSED_HINT = "look at the limits that it was started with: `ulimit -a`"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zswapd` and return its exit code.

    Args:
        argv: arguments in place of the process's own.
    """
    standard_files.complete()
    options = argparse.Namespace()
    try:
        parse("zswapd", make_parser, argv, options)
    except SystemExit as end:
        # A service manager tries again at once, and has to: there may be something to serve
        # (supervisor/settings.py).
        if end.code and "NOTIFY_SOCKET" in os.environ:
            time.sleep(AGAIN_S)
        raise
    return guarded("zswapd", lambda: cast("int", options.work(options)), options)


def _run(options: argparse.Namespace) -> int:
    log.setup("info")  # until the settings say otherwise
    machine.check()
    from zswapd import supervisor

    if options.upgrade_check is not None:
        config = sources.load_config(options, memory=supervisor.memory_of(options.upgrade_check))
        supervisor.check(config, options.upgrade_check)
        supervisor.try_takeover(config)
        print(json.dumps(to_document(config)))
        return 0
    standard_files.never_wait()
    try:
        return supervisor.run(
            lambda: sources.load_config(options), lambda work: guarded("zswapd", work)
        )
    except OSError as error:
        raise ZswapdError(
            f"zswapd ends, since the system refused something: {error}", hint=_REFUSED_HINT
        ) from error
    except MemoryError as error:
        raise ZswapdError(
            "zswapd ends for want of memory", hint="free some; look at `ulimit -v`"
        ) from error


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="zswapd",
        description=(
            "Compressed swap in user space: a file that the kernel can swap to, held compressed in"
            " memory."
        ),
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
        parents=[sources.options()],
    )
    run.set_defaults(work=_run)
    # For `zswapctl upgrade`: whether this program could take over from the one that asks.
    run.add_argument("--upgrade-check", metavar="JSON", help=argparse.SUPPRESS)
    config = commands.add_parser(
        "config", help="show and check settings", description="Settings, without a daemon."
    )
    config_module.add_commands(config)
    return parser


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def _settings_help() -> str:
    """Return the table of settings, as wide as the terminal."""
    context = sources.context()
    lines = ["settings, in the config file as [section] and key = value, with their defaults:"]
    for setting in SETTINGS.values():
        live = " Can change at run time." if setting.reloadable else ""
        text = f"{setting.help}{live} Takes {setting.kind.describe(context)}."
        lines.append(f"  {setting.dest} = {shown(setting.default_for(context))}")
        lines += textwrap.wrap(text, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
