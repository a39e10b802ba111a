# SPDX-License-Identifier: GPL-2.0-or-later
"""The parser of command lines.

argparse prints its usage and exits if a command or option is unknown. This parser raises a
UsageError, which `guarded` prints as all other errors. The hint has the nearest command or option,
or the command for the help.
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

    `--help` and an invalid command line end the program, as with argparse.

    Args:
        program: name of the program.
        make: returns the parser.
        argv: arguments in place of the process's own.
        options: the namespace to fill.

    Raises:
        SystemExit: the command line is invalid and the error is printed, or the help is printed.
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
    if not is_filled:  # the code is 0 if the reader of the help has closed its pipe
        raise SystemExit(code)


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageErrors. The parsers of its commands do the same."""

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as a UsageError.

        Raises:
            UsageError: always.
        """
        raise UsageError(message, hint=f"see `{self.prog} --help`")

    def parse_args(  # type: ignore[override] # argparse has overloads for namespaces of other types
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a whole command line.

        Raises:
            UsageError: a command, option or argument is unknown, missing or invalid.
        """
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse_unknown(unknown[0], self._chosen(options))
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - has no public name
            # Two names, because an extra letter and two swapped letters are equally near: "statsu"
            # may mean stats or status.
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
        """Return the parser of the command in the options."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
                command = action.choices.get(getattr(options, action.dest, ""))
                if isinstance(command, Parser):
                    return command._chosen(options)  # noqa: SLF001 - of the same class
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
