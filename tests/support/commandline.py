# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of a program, so that the tests cover each new one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator


def all_commands(
    parser: argparse.ArgumentParser, before: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command."""
    groups = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    for group in groups:
        for name, command in group.choices.items():
            yield from all_commands(command, (*before, name))
    if not groups:
        yield before
