# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a command that fails.

It prints the error and a hint on standard error and returns an exit code. With --json it also
prints an object. Only a bug prints a traceback.
"""

from __future__ import annotations

import errno
import json
import sys
from typing import TYPE_CHECKING

from zswapd.cli import output
from zswapd.errors import ZswapdError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

INTERRUPTED = 130
"""Exit code after Ctrl-C, the same as in a shell: 128 + SIGINT."""
UNWRITTEN = 1
"""Exit code if standard output cannot be written, except for EPIPE."""


def guarded(
    program: str, command: Callable[[], int], options: argparse.Namespace | None = None
) -> int:
    """Run a command and return its exit code; print the error and a hint if it fails.

    With the option `json`, the error also goes to standard output: {"error": {"message": …,
    "hint": … or null, "exit_code": …}}.

    Args:
        program: name of the program, for the beginning of the lines.
        command: the command.
        options: options of the command line; they are read after a failure.
    """
    output.prepare()
    try:
        try:
            return _outcome(program, command, options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:  # the flush waited for the reader of standard output
        output.drop()
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        return 0
    except output.OutputError as error:
        if error.errno == errno.EPIPE:
            return 0
        print(f"{program}: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return UNWRITTEN


def _outcome(program: str, command: Callable[[], int], options: argparse.Namespace | None) -> int:
    """Run a command and return its exit code.

    Raises:
        OutputError: standard output cannot be written.
    """
    try:
        return command()
    except ZswapdError as error:
        return _explain(program, error, options)
    except BaseExceptionGroup as group:
        failure = _only_failure(group)
        if failure is None:
            raise
        return _explain(program, failure, options)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        _print_json(options, "interrupted", None, INTERRUPTED)
        return INTERRUPTED


def _only_failure(group: BaseExceptionGroup) -> ZswapdError | None:
    """Return the first ZswapdError of a group, or None if the group has other exceptions."""
    failures, rest = group.split(ZswapdError)
    if rest is not None or failures is None:
        return None
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, ZswapdError) else None


def _explain(program: str, error: ZswapdError, options: argparse.Namespace | None) -> int:
    print(f"{program}: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"{program}: hint: {error.hint}", file=sys.stderr)
    _print_json(options, error.message, error.hint, error.exit_code)
    return error.exit_code


def _print_json(
    options: argparse.Namespace | None, message: str, hint: str | None, code: int
) -> None:
    if getattr(options, "json", False):
        print(
            json.dumps({"error": {"message": message, "hint": hint, "exit_code": code}}), flush=True
        )
