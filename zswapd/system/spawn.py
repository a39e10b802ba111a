# SPDX-License-Identifier: GPL-2.0-or-later
"""Start other programs from a process that serves pages.

This calls posix_spawn through ctypes, which releases the GIL. `subprocess` and `os.posix_spawn`
hold it until the child has called exec, and an exec that waits for memory would stop the page path.
A started program may write to swap and wait for memory like any program: it inherits neither
PR_SET_IO_FLUSHER nor the blocked signals of the calling thread.

Call it in an existing thread (system/offload.py), or where no page waits.

Sources: posix_spawn(3), prctl(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER = 57, 58
_SETSIGMASK = 0x08
_OPAQUE_BYTES = 1024
"""More than any C library has for a set of attributes, actions or signals."""
_END_S = 5.0
"""Time, s, to wait for the end of a killed program."""

_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A running program.

    Args:
        pid: its process id.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; return the exit code, minus the killing signal, or None if it runs."""
        if not self._poll.poll(seconds * 1000):
            return None
        _, status = os.waitpid(self._pid, 0)
        os.close(self._descriptor)
        return os.waitstatus_to_exitcode(status)

    def interrupt(self) -> None:
        """Kill it."""
        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


class Finished(NamedTuple):
    """The result of a program that has ended."""

    code: int
    """Exit code, or minus the signal that killed it."""
    out: bytes
    err: bytes


def spawn(command: Sequence[str], *, streams: Sequence[int] = ()) -> Child:
    """Start a program.

    Args:
        command: its name, looked up in PATH, and arguments.
        streams: what it gets as standard input, output, and so on; the others are this process'
            own.

    Raises:
        OSError: it cannot be started.
    """
    pid = ctypes.c_int()
    arguments = (ctypes.c_char_p * (len(command) + 1))(*map(os.fsencode, command), None)
    variables = [os.fsencode(f"{name}={value}") for name, value in os.environ.items()]
    environment = (ctypes.c_char_p * (len(variables) + 1))(*variables, None)
    actions, attributes, signals = (ctypes.create_string_buffer(_OPAQUE_BYTES) for _ in range(3))
    with contextlib.ExitStack() as undo:
        _libc.posix_spawn_file_actions_init(actions)
        undo.callback(_libc.posix_spawn_file_actions_destroy, actions)
        for number, descriptor in enumerate(streams):
            _libc.posix_spawn_file_actions_adddup2(actions, descriptor, number)
        _libc.posix_spawnattr_init(attributes)
        undo.callback(_libc.posix_spawnattr_destroy, attributes)
        _libc.sigemptyset(signals)
        _libc.posix_spawnattr_setsigmask(attributes, signals)
        _libc.posix_spawnattr_setflags(attributes, ctypes.c_short(_SETSIGMASK))
        with _without_io_flusher():
            error = _libc.posix_spawnp(
                ctypes.byref(pid), arguments[0], actions, attributes, arguments, environment
            )
    if error:
        raise OSError(error, os.strerror(error), command[0])
    return Child(pid.value)


def run(command: Sequence[str], *, limit: float) -> Finished:
    """Run a program to its end, without input.

    Args:
        command: see `spawn`.
        limit: seconds that it may take.

    Raises:
        OSError: it cannot be started.
        TimeoutError: it took longer, and was killed.
    """
    with contextlib.ExitStack() as undo:
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, null)
        out, err = (
            os.memfd_create(f"zswapd-{name}") for name in ("out", "err")
        )  # however much it says, it need not wait
        undo.callback(os.close, out)
        undo.callback(os.close, err)
        child = spawn(command, streams=(null, out, err))
        code = child.wait(limit)
        if code is None:
            child.interrupt()
            child.wait(_END_S)
            raise TimeoutError(f"{command[0]} has not ended within {limit:g} s")
        return Finished(code, _content(out), _content(err))


def _content(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


@contextlib.contextmanager
def _without_io_flusher() -> Iterator[None]:
    """Take the flag, which children inherit, off this thread for a moment."""
    was_on = _libc.prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1
    if was_on:
        _libc.prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0)
    try:
        yield
    finally:
        if was_on:
            _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
