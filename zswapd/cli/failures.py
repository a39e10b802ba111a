# SPDX-License-Identifier: GPL-2.0-or-later
"""How a command ends when it fails: two lines for a person, an exit code for a script, a traceback only for a bug."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from zswapd.errors import ZswapdError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it."""


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit code; print what went wrong, and what to do about it.

    Args:
        program: the name that the lines begin with.
        command: the work.
    """
    try:
        code = command()
        sys.stdout.flush()
    except ZswapdError as error:
        return _explain(program, error)
    except BaseExceptionGroup as group:
        failure = _only_failure(group)
        if failure is None:
            raise
        return _explain(program, failure)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; keep the interpreter from flushing to it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _only_failure(group: BaseExceptionGroup) -> ZswapdError | None:
    """Return the failure that ended a nursery, or None if there was anything else in it."""
    failures, rest = group.split(ZswapdError)
    if rest is not None or failures is None:
        return None
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, ZswapdError) else None


def _explain(program: str, error: ZswapdError) -> int:
    print(f"{program}: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"{program}: hint: {error.hint}", file=sys.stderr)
    return error.exit_code
