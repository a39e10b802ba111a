# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines: an unknown command or option is an error like all others, with a hint.

argparse would print its usage and exit; here it raises a UsageError, which `guarded` prints in two
lines, and with --json as an object. The hint names the command or option that is nearest, or the
help.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from zswapd.cli.failures import guarded
from zswapd.errors import UsageError
from zswapd.host import hints

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def parse(
    program: str,
    make: Callable[[], Parser],
    argv: Sequence[str] | None,
    options: argparse.Namespace,
) -> None:
    """Parse a command line into `options`.

    `--help`, and a command line that is not right, end the program, as argparse has it.

    Args:
        program: its name.
        make: makes its parser.
        argv: arguments in place of the process's own.
        options: to be filled.

    Raises:
        SystemExit: something in it is unknown or missing, and was said; or the help was asked for.
    """
    is_filled = False

    def fill() -> int:
        nonlocal is_filled
        try:
            make().parse_args(argv, options)
            is_filled = True
        except UsageError:
            options.json = "--json" in (sys.argv[1:] if argv is None else argv)
            raise
        return 0

    code = guarded(program, fill, options)
    if not is_filled:  # also with 0: the reader of the help has left
        raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are UsageErrors; so are those of the parsers of its commands."""

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse refuses.

        Raises:
            UsageError: always.
        """
        raise UsageError(message, hint=f"see `{self.prog} --help`")

    def parse_args(  # type: ignore[override] # argparse has overloads for namespaces of other types
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a whole command line.

        Raises:
            UsageError: something in it is unknown or missing.
        """
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse_unknown(unknown[0], self._chosen(options))
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - argparse has no other name for it
            # A letter too many and two that changed places are as near: statsu is stats or status.
            meant = " or ".join(
                f"`{self.prog} {name}`" for name in hints.near(str(value), known, 2)
            )
            hint = f"did you mean {meant}?" if meant else f"commands are: {', '.join(known)}"
            raise UsageError(f"unknown command {value!r}", hint=hint)
        near = hints.nearest(str(value), known)
        name = "/".join(action.option_strings) or action.metavar or action.dest
        meant = f"did you mean {near}? " if near else ""
        raise UsageError(
            f"{name} cannot be {value!r}", hint=f"{meant}it is one of: {', '.join(known)}"
        )

    def _chosen(self, options: argparse.Namespace) -> Parser:
        """Return the parser of the command that was found."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
                command = action.choices.get(getattr(options, action.dest, ""))
                if isinstance(command, Parser):
                    return command._chosen(options)  # noqa: SLF001 - one of its own
        return self

    def _refuse_unknown(self, word: str, command: Parser) -> NoReturn:
        if not word.startswith("-"):
            raise UsageError(f"unexpected argument {word!r}", hint=f"see `{command.prog} --help`")
        name = word.partition("=")[0]
        near = hints.nearest(name, {*command._option_string_actions, *self._option_string_actions})
        otherwise = f"see `{command.prog} --help`"
        raise UsageError(
            f"unknown option {name}",
            hint=f"did you mean {near}? {otherwise}" if near else otherwise,
        )
