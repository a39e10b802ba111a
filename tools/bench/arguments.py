# SPDX-License-Identifier: GPL-2.0-or-later
"""Arguments for argparse, and their types, which all workloads share.

They refuse a bad argument before the measurement. A file that cannot be written would otherwise
cost all its minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PICTURES = (".svg", ".png", ".pdf")


def numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """Return an argument type: whole numbers from `low` to `high`, separated by commas.

    Each number is in the result once, in the given order.
    """

    def parse(text: str) -> list[int]:
        try:
            found = list(dict.fromkeys(int(word) for word in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no list of whole numbers, such as {low},{high}"
            ) from None
        if not all(low <= number <= high for number in found):
            raise argparse.ArgumentTypeError(f"{text}: numbers are from {low} to {high}")
        return found

    return parse


def names(known: Callable[[], list[str]], what: str) -> Callable[[str], list[str]]:
    """Return an argument type: names that `known` returns, separated by commas, each once."""

    def parse(text: str) -> list[str]:
        given = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in given if name not in known()]:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {', '.join(unknown)}; there are {', '.join(known())}"
            )
        return given

    return parse


def new_file(text: str) -> Path:
    """Return a path that a file can be written to."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written: its directory is missing, or it is a directory"
        )
    return path


def picture(text: str) -> Path:
    """Return a path that a plot can be written to."""
    path = new_file(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text}: a plot is one of {', '.join(PICTURES)}")
    return path


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json, the path of a file for the results."""
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything to FILE")


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add the options --json, and --check for the exit code."""
    add_json(parser)
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure does not hold")


def directory(text: str) -> Path:
    """Return the path of an existing directory."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path
