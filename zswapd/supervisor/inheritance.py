# SPDX-License-Identifier: GPL-2.0-or-later
"""Resources that come to a supervisor without asking a worker.

By the environment, or from the service manager.

- By the environment: the supervisor replaces its own program (`zswapctl upgrade`). Its files stay
  open, and ZSWAPD_ESTATE names them.
- From the service manager: supervisor and worker have died, and systemd's file descriptor store
  has kept the files.

The name of the variable is what 0.1.0 sets.
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
    """Return the environment for the program that takes this process' place.

    And let it inherit the files.
    """
    descriptors = resources.descriptors()
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - the system call
    return {
        **os.environ,
        _ENVIRONMENT: json.dumps({"pid": os.getpid(), "worker": worker, "files": descriptors}),
    }


def become_installed(resources: Resources, worker: int) -> None:
    """Become the installed program, which takes over resources and worker.

    Return only if it cannot be started.
    """
    environment = leave_in_environment(resources, worker)
    try:
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 - the same program, newer
    except OSError as error:
        log.error("the installed program cannot be started: %s", error.strerror)  # noqa: TRY400 - a reason, not a bug
        for descriptor in resources.descriptors().values():
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call


def find_inherited() -> InheritedFiles | None:
    """Return what there is to take over without asking anybody, None if there is nothing."""
    return from_environment() or from_service_manager()


def from_environment() -> InheritedFiles | None:
    """Return what this process was left with before it became this program."""
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
    """Return what systemd kept for us, None if there is nothing or not all.

    The protocol of sd_listen_fds(3): descriptors from 3 on, names in LISTEN_FDNAMES, meant for
    LISTEN_PID only.
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
    """Return the name under which the service manager keeps a descriptor."""
    return _STORE_PREFIX + name
