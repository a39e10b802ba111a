# SPDX-License-Identifier: GPL-2.0-or-later
"""The options and commands of an argparse parser as plain data; argparse has no public way."""
# ruff: noqa: SLF001

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Option:
    """An option or a positional argument."""

    names: tuple[str, ...]
    """The option's names, such as `--set`; empty for a positional argument."""
    value: str
    """The name of the value; empty for a flag."""
    help: str
    form: str
    """The form in a synopsis: `[--set VALUE]`, `NAME...`."""


@dataclass(frozen=True)
class Command:
    """One command, such as `cache add`, with the options of its own."""

    name: str
    synopsis: str
    help: str
    description: str
    options: tuple[Option, ...]


def own_options(
    parser: argparse.ArgumentParser, *without: argparse.ArgumentParser
) -> tuple[Option, ...]:
    """Return a parser's options and arguments, except help and those of the parsers `without`."""
    known = {action.dest for other in without for action in other._actions}
    found = []
    for action in parser._actions:
        hidden = action.help == argparse.SUPPRESS or isinstance(
            action, argparse._SubParsersAction | argparse._HelpAction
        )
        if hidden or action.dest in known:
            continue
        value = (
            ""
            if action.nargs == 0
            else action.metavar or "|".join(map(str, action.choices or [action.dest.upper()]))
        )
        assert isinstance(value, str)
        text = (action.help or "") % {"prog": parser.prog}
        found.append(Option(tuple(action.option_strings), value, text, _form(action, value)))
    return tuple(found)


def commands(
    parser: argparse.ArgumentParser, *without: argparse.ArgumentParser, before: str = ""
) -> Iterator[Command]:
    """Yield the commands of a parser; a command with subcommands yields these instead of itself."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, sub in action.choices.items():
            full = f"{before}{name}"
            inner = list(commands(sub, *without, before=f"{full} "))
            if inner:
                yield from inner
                continue
            own = own_options(sub, *without)
            words = [option.form for option in own]
            yield Command(
                full, " ".join(words), helps[name], " ".join((sub.description or "").split()), own
            )


def _form(action: argparse.Action, value: str) -> str:
    words = " ".join([*action.option_strings[-1:], value]).strip()
    many = "..." if action.nargs in {"*", "+"} else ""
    is_needed = action.required if action.option_strings else action.nargs not in {"*", "?"}
    return words + many if is_needed else f"[{words}{many}]"
