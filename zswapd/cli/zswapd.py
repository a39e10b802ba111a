# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapd`: the daemon's command line.

It sets up the log, loads the settings, and calls the supervisor.
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
"""Time in seconds until a service manager may retry an invalid command line."""
_RUN = (
    "Serve swap files in the foreground. After SIGTERM or Ctrl-C the daemon swaps off and ends when"
    " all swapped-out pages are back in memory. If they do not fit, the daemon goes on."
)

_REFUSED_HINT = "check the limits of the process: `ulimit -a`"


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
        # The service manager retries at once. It must retry, because a dead daemon may have left
        # pages to serve (supervisor/settings.py).
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
            f"zswapd ends because a system call failed: {error}", hint=_REFUSED_HINT
        ) from error
    except MemoryError as error:
        raise ZswapdError(
            "zswapd ends because it got no memory", hint="free memory; check `ulimit -v`"
        ) from error


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="zswapd",
        description=(
            "Compressed swap in user space: swap files for the kernel, held compressed in memory."
        ),
        epilog="`zswapctl` swaps on and off and shows the daemon's state.",
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
    # For `zswapctl upgrade`: check that this program can take over from the running one.
    run.add_argument("--upgrade-check", metavar="JSON", help=argparse.SUPPRESS)
    config = commands.add_parser(
        "config",
        help="show and check settings",
        description="Show and check settings without a daemon.",
    )
    config_module.add_commands(config)
    return parser


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def _settings_help() -> str:
    """Return the table of settings, as wide as the terminal."""
    context = sources.context()
    lines = ["settings with their defaults (in the config file: [section] and key = value):"]
    for setting in SETTINGS.values():
        live = " Can change at run time." if setting.reloadable else ""
        text = f"{setting.help}{live} Takes {setting.kind.describe(context)}."
        lines.append(f"  {setting.dest} = {shown(setting.default_for(context))}")
        lines += textwrap.wrap(text, _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
