# SPDX-License-Identifier: GPL-2.0-or-later
"""Resources that a supervisor inherits: no worker is asked for them.

- By the environment: the supervisor replaces its own program (`zswapctl upgrade`). Its files stay
  open, and ZSWAPD_ESTATE names them. Version 0.1.0 sets the same variable.
- From the service manager: supervisor and worker are dead, and systemd's file descriptor store has
  kept the files.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Final

from zswapd.handover.resources import STORED, InheritedFiles

if TYPE_CHECKING:
    from zswapd.handover.resources import Resources

log = logging.getLogger(__name__)

_ENVIRONMENT: Final = "ZSWAPD_ESTATE"
_STORE_PREFIX: Final = "zswapd-"


def leave_in_environment(resources: Resources, worker: int) -> dict[str, str]:
    """Make the files inheritable; return the environment for the program that replaces this one."""
    descriptors = resources.descriptors()
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - the system call
    return {
        **os.environ,
        _ENVIRONMENT: json.dumps({"pid": os.getpid(), "worker": worker, "files": descriptors}),
    }


def become_installed(resources: Resources, worker: int) -> None:
    """Become the installed program, which takes over the resources and the worker.

    Return only if the program cannot be started.
    """
    environment = leave_in_environment(resources, worker)
    try:
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 - the same program, newer
    except OSError as error:
        log.error("the installed program cannot be started: %s", error.strerror)  # noqa: TRY400 - a reason, not a bug
        for descriptor in resources.descriptors().values():
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call


def find_inherited() -> InheritedFiles | None:
    """Return the files that this process has inherited; None if there are none."""
    return from_environment() or from_service_manager()


def from_environment() -> InheritedFiles | None:
    """Return the files that the program before this one has left in this process; else None."""
    text = os.environ.pop(_ENVIRONMENT, "")
    if not text:
        return None
    left = json.loads(text)
    if left["pid"] != os.getpid():
        return None
    for descriptor in left["files"].values():
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call
    return InheritedFiles(left["files"], left["worker"])


def from_service_manager() -> InheritedFiles | None:
    """Return the files that systemd has kept; None if one of them is missing.

    The protocol is that of sd_listen_fds(3). Descriptors begin at 3, LISTEN_FDNAMES has their
    names, and they are for the process LISTEN_PID only.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    if pid != str(os.getpid()) or not count.isdecimal():
        return None
    given = {
        name.removeprefix(_STORE_PREFIX): 3 + number
        for number, name in enumerate(names[: int(count)])
    }
    for descriptor in range(3, 3 + int(count)):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call
    if not set(STORED) - {"backing"} <= set(given):
        return None
    return InheritedFiles({name: given[name] for name in STORED if name in given}, 0)


def stored_name(name: str) -> str:
    """Return the name of a descriptor in the service manager's store."""
    return _STORE_PREFIX + name
