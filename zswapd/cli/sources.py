# SPDX-License-Identifier: GPL-2.0-or-later
"""Where zswapd's settings come from: the options that name them, and the Config that they make."""

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
    """Return a parser to inherit from."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="config file (default: /etc/zswapd/zswapd.toml, if it is there)",
    )
    parser.add_argument("--size", help="size of the swap file, such as 2G, 50%% or min(50%%, 4G)")
    parser.add_argument("--mountpoint", type=Path, metavar="DIR", help="where the files appear")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any setting; may be repeated",
    )
    return parser


def load_config(options: argparse.Namespace, *, memory: int = 0) -> Config:
    """Return the Config that files and options make.

    Args:
        options: parsed by `options()`.
        memory: see `config.load`.

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
    """Return what values are checked against on this machine."""
    return make_context(compress.names())
