# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command ends when it fails.

Two lines for a person, an exit code for a script, with --json an object too.

A traceback is for a bug only.
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
"""Exit code after Ctrl-C, as a shell has it."""
UNWRITTEN = 1
"""Exit code when standard output cannot be written,
for another reason than that its reader has left.
"""


def guarded(
    program: str, command: Callable[[], int], options: argparse.Namespace | None = None
) -> int:
    """Run a command and return its exit code; print what went wrong, and what to do about it.

    With `json` among the options that goes to stdout as well: {"error": {"message": …, "hint": … or
    null, "exit_code": …}}.

    Args:
        program: the name that the lines begin with.
        command: the work.
        options: those of the command line, looked at when it has failed.
    """
    output.prepare()
    try:
        try:
            return _outcome(program, command, options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:  # while standard output took no more
        output.drop()
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
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
    """Return the failure that ended a nursery, or None if there was anything else in it."""
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
