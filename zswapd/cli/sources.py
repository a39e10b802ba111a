# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of zswapd that name sources of settings, and the Config of these sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.cli.parsing import Parser
from zswapd.config import load, parse_assignment
from zswapd.config.loader import make_context
from zswapd.core import compress

if TYPE_CHECKING:
    import argparse

    from zswapd.config import Config, Context


def options() -> Parser:
    """Return a parent parser with the options."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config file (default: /etc/zswapd/zswapd.toml, if it exists)",
    )
    parser.add_argument("--size", help="size of the swap file, such as 2G, 50%% or min(50%%, 4G)")
    parser.add_argument(
        "--mountpoint", type=Path, metavar="DIR", help="directory where the swap files appear"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="a setting and its value; can be repeated",
    )
    return parser


def load_config(options: argparse.Namespace, *, memory: int = 0) -> Config:
    """Return the Config of the files and the options.

    Args:
        options: options that a parser of `options()` has parsed.
        memory: bytes that are 100 % of a size; 0 for the memory of the machine now.

    Raises:
        ConfigError: a source cannot be read, or a setting is refused.
    """
    assignments = [(*parse_assignment(text), "--set") for text in options.set]
    if options.size is not None:
        assignments.append(("swap.size", options.size, "--size"))
    if options.mountpoint is not None:
        assignments.append(("fuse.mountpoint", str(options.mountpoint.absolute()), "--mountpoint"))
    return load(
        codecs=compress.names(), file=options.config, assignments=assignments, memory=memory
    )


def context() -> Context:
    """Return the context of the checks on this machine."""
    return make_context(compress.names())
