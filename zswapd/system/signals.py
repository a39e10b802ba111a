# SPDX-License-Identifier: GPL-2.0-or-later
"""The signals of the daemon's processes: blocked, and read from a descriptor.

The default action of most signals ends or stops a process, which would harm the readers of its
pages. So supervisor, worker and spare block all signals. Supervisor and worker read their signals
with signalfd(2), which names the sender: a worker obeys only its supervisor. (Python's sigtimedwait
returns an invented signal after SIGSTOP and SIGCONT.) A blocked signal stays blocked across fork
and exec, so no signal gets through in between.

A worker has a session of its own. A terminal sends its signals to a process group, and a shell
sends SIGSTOP to one (`kill -STOP %1`), which no process can block.

FAULTS are not blocked in worker and spare, because their handler (faulthandler) writes the stack to
the log. If a program sends one, the process ends, and the next worker takes over. A fault of the
supervisor itself ends it, although the signal is blocked.

The C library reserves the signals 32 and 33: it neither blocks nor ignores them for its callers,
and has no handler for 32 before pthread_cancel(3), which these processes do not call. So these two
are ignored by the system call itself.

Source: signal(7).
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import struct
from typing import NamedTuple

FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT})
"""Signals of a fault: the worker writes its stack to the log, and ends."""
CATCHABLE = frozenset(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}

SI_USER, SI_KERNEL = 0, 0x80
"""Origins of a signal, `si_code`: kill(2) or pidfd_send_signal(2), and the kernel itself."""

_RESERVED = (32, 33)
"""Signals that the C library reserves."""
_RT_SIGACTION = {
    ("x86_64", 8): 13,
    ("aarch64", 8): 134,
    ("riscv64", 8): 134,
    ("loongarch64", 8): 134,
    ("ppc64", 8): 173,
    ("ppc64le", 8): 173,
    ("s390x", 8): 174,
    ("i686", 4): 174,
    ("armv7l", 4): 174,
}
"""Number of the system call by machine and bytes of a pointer.

The handler is the first word of its structure.
"""
_SIGACTION_WORDS = 16
"""Number of words that is enough for the structure on all of these machines."""
_SFD_CLOEXEC, _SFD_NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
_SIGINFO = struct.Struct("=IiiI112x")
"""struct signalfd_siginfo: signal, errno, code, process id, and more that is not used."""
_SIGSET_BYTES, _KERNEL_SIGSET_BYTES = 128, 8
_MOST = 16

_libc = ctypes.CDLL(None, use_errno=True)


class Received(NamedTuple):
    """A signal that has come."""

    number: int
    code: int
    """Its origin, `si_code`."""
    sender: int
    """Process id of the sender; 0 if it is in a namespace that is not visible."""

    @property
    def name(self) -> str:
        """The name of the signal."""
        return name_of(self.number)


class SignalFile:
    """The signals of this process as a file that can be waited for (signalfd).

    Args:
        numbers: the signals, which all threads have blocked.
    """

    def __init__(self, numbers: frozenset[int]) -> None:
        wanted = ctypes.create_string_buffer(_SIGSET_BYTES)
        _libc.sigemptyset(wanted)
        for number in numbers:
            _libc.sigaddset(wanted, number)
        self.descriptor: int = _libc.signalfd(-1, wanted, _SFD_CLOEXEC | _SFD_NONBLOCK)
        if self.descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "signalfd")

    def wait(self, seconds: float) -> list[Received]:
        """Wait for signals; return them, [] if none comes in this time."""
        poll = select.poll()  # a descriptor may be above 1023
        poll.register(self.descriptor, select.POLLIN)
        poll.poll(seconds * 1000)
        return self.read()

    def read(self) -> list[Received]:
        """Return the signals that have come; [] if there are none."""
        try:
            data = os.read(self.descriptor, _MOST * _SIGINFO.size)
        except BlockingIOError:
            return []
        return [
            Received(number, code, pid) for number, _errno, code, pid in _SIGINFO.iter_unpack(data)
        ]

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def block_signals() -> None:
    """Block all signals in this thread and in the threads and processes that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, CATCHABLE)
    number = _RT_SIGACTION.get((os.uname().machine, ctypes.sizeof(ctypes.c_void_p)))
    if number is not None:
        ignore = (ctypes.c_ulong * _SIGACTION_WORDS)(signal.SIG_IGN)
        for reserved in _RESERVED:
            _libc.syscall(number, reserved, ignore, None, _KERNEL_SIGSET_BYTES)


def become_servant() -> None:
    """Begin a new session, and unblock FAULTS; called before this process has threads."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FAULTS)


def ignore_signals() -> None:
    """Have the programs that this process starts ignore most signals: only SIGKILL ends a swapoff.

    A blocked signal can be fetched although it is ignored. SIGCHLD is not ignored: the kernel would
    reap the dead children, and their exit codes would be lost.
    """
    for number in CATCHABLE - FAULTS - {signal.SIGCHLD}:
        signal.signal(number, signal.SIG_IGN)


def lift_limits() -> int | None:
    """Lift the limits of processor time and of a file's size, as far as this process may.

    The kernel ends a process that exceeds the first. Beyond the second, fallocate(2) on the arena
    fails.

    Returns:
        The limit of processor time that stays, s; None for no limit.
    """
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
        _soft, hard = resource.getrlimit(limit)
        for wanted in ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (hard, hard)):
            try:
                resource.setrlimit(limit, wanted)
            except (OSError, ValueError):
                continue
            break
    seconds = resource.getrlimit(resource.RLIMIT_CPU)[1]
    return None if seconds == resource.RLIM_INFINITY else seconds


def is_hangup(received: Received) -> bool:
    """Say whether a SIGHUP means that the terminal is gone, and is not a request to reload.

    The kernel sends it to the foreground job of the terminal, and the shell to its other jobs.
    """
    if received.code == SI_KERNEL:
        return True
    return received.sender == os.getsid(0) != os.getpid() and not _has_terminal()


def name_of(number: int) -> str:
    """Return the name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True
