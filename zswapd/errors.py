# SPDX-License-Identifier: GPL-2.0-or-later
"""The exceptions of zswapd.

A failure is an exception. A refusal (a store that policy rejects) is a result, and not in here.
Each class has `exit_code` for the command line and `errno_` for FUSE. Exit codes are unique, so
that a script can tell them apart (`tests/unit/test_errors.py`). Low layers raise, and only the
edges (cli, fuse, control) translate.

A cause has the same code in every command. `systemctl status` shows the names that systemd gives
some codes (systemd.exec(5), "Process Exit Codes"). Codes 2 to 7 have the names of LSB init scripts,
64 to 78 those of sysexits.h. A code of these ranges is used only where its name fits: 2
INVALIDARGUMENT, 4 NOPERMISSION, 69 UNAVAILABLE, 70 SOFTWARE, 71 OSERR, 73 CANTCREAT, 75 TEMPFAIL,
78 CONFIG. All others are shown as numbers.
"""

from __future__ import annotations

import errno


class ZswapdError(Exception):
    """Base of all failures with a message for the user.

    Args:
        message: the failure, with the name of the file, value or device.
        hint: the remedy, as a sentence or a command.
    """

    exit_code = 1
    errno_ = errno.EIO
    filled = 0
    """Bytes before the failed page of a read that are correct, and may go to the reader."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(ZswapdError):
    """The command line has an unknown command or option, or lacks one; nothing was done."""

    exit_code = 2
    errno_ = errno.EINVAL


class ConfigError(ZswapdError):
    """A setting is unknown, of the wrong type or out of range; nothing was applied."""

    exit_code = 78
    errno_ = errno.EINVAL


class MountError(ZswapdError):
    """The file system cannot be mounted or unmounted; nothing was left mounted."""

    exit_code = 73
    errno_ = errno.EBUSY


class PermissionsError(ZswapdError):
    """The process lacks a privilege or a device node that the job needs."""

    exit_code = 4
    errno_ = errno.EPERM


class ControlError(ZswapdError):
    """The control socket cannot be made or reached, or the daemon refused the command."""

    exit_code = 69
    errno_ = errno.EPROTO


class AlreadyRunningError(ControlError):
    """Another daemon has the control socket."""

    exit_code = 14
    errno_ = errno.EBUSY


class SwapDeviceError(ZswapdError):
    """A swap file is missing, a change of its loop device or swap was undone, or pages are lost.

    Pages are lost if the daemon ends for good in the middle of swapoff.
    """

    exit_code = 71
    errno_ = errno.EBUSY


class HeadroomError(SwapDeviceError):
    """The swapped-out data does not fit into memory, so swapoff was not tried."""

    exit_code = 75
    errno_ = errno.ENOMEM


class ProtectionError(ZswapdError):
    """A protection against a hanging machine is off, and was not waived with --force."""

    exit_code = 8
    errno_ = errno.EPERM


class ArenaError(ZswapdError):
    """The shared memory that holds the pool cannot be made, mapped or populated."""

    exit_code = 9
    errno_ = errno.ENOMEM


class CorruptedPageError(ZswapdError):
    """A stored page does not decompress or does not match its checksum; its reader gets EIO.

    A page that was never stored or was discarded reads as zeros, without this error.
    """

    exit_code = 10
    errno_ = errno.EIO


class LostPageError(ZswapdError):
    """The last write of a page was refused: neither its old nor its new data exists."""

    exit_code = 11
    errno_ = errno.EIO


class DiscardError(ZswapdError):
    """The rest of a partly discarded page could not be kept: the page is lost if it had data."""

    exit_code = 12
    errno_ = errno.ENOSPC


class VolumeError(ZswapdError):
    """A cache volume cannot be made, found or read.

    Args:
        message: see `ZswapdError`, as for `hint`.
        errno_: what a reader or writer of the volume gets, if it is not EIO.
    """

    exit_code = 15
    errno_ = errno.EIO

    def __init__(self, message: str, *, hint: str | None = None, errno_: int | None = None) -> None:
        super().__init__(message, hint=hint)
        if errno_ is not None:
            self.errno_ = errno_


class ClientError(ZswapdError):
    """A swap file cannot come, go or change its size while the daemon runs; nothing was changed."""

    exit_code = 17
    errno_ = errno.EBUSY


class HandoverError(ZswapdError):
    """A running session cannot be taken over; the worker that serves it goes on."""

    exit_code = 13
    errno_ = errno.EBUSY


class BackingError(ZswapdError):
    """The file or device behind the pool cannot be used; nothing was changed on it."""

    exit_code = 16
    errno_ = errno.EIO


class MachineError(ZswapdError):
    """The program does not know this kind of machine; nothing was started."""

    exit_code = 19
    errno_ = errno.ENOEXEC


class InvariantError(ZswapdError):
    """A `check()` found lists or counts that contradict each other: this is a bug."""

    exit_code = 70
    errno_ = errno.EIO


OLD_EXIT_CODES: dict[int, type[ZswapdError]] = {
    2: ConfigError,
    3: MountError,
    5: ControlError,
    6: SwapDeviceError,
    7: HeadroomError,
}
"""Exit codes that daemons before 0.2.0 send over the control socket, to `zswapctl upgrade`."""
