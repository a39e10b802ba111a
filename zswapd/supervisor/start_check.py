# SPDX-License-Identifier: GPL-2.0-or-later
"""Check whether `zswapd run` would start with the settings, without starting it.

Each check calls the function that a start calls, without the step that follows. The check keeps
nothing made, open for writing, truncated, bound or locked.

- If a start would be refused, the check raises the same class of error.
- If a start would go on with a complaint, the check returns a warning.
- If this process lacks the rights for a check, the result lists it as unchecked.

A running daemon with the same control socket has the mountpoint, the backing and the port of the
metrics. The checks take them as free.
"""

from __future__ import annotations

import os
import pwd
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zswapd.control.listener import check_place, is_served
from zswapd.core.allocators.arena import open_shared_memory
from zswapd.errors import VolumeError
from zswapd.fuse import require_hook
from zswapd.fuse.mount import Mount
from zswapd.handover import costs
from zswapd.metrics.peers import EVERYBODY
from zswapd.paths import without_links
from zswapd.supervisor.backing import check_backing
from zswapd.system.protections import limit_protection
from zswapd.volumes.file_io import refuse_unusable
from zswapd.volumes.mounted import configured

if TYPE_CHECKING:
    from zswapd.config import Config


@dataclass(frozen=True, slots=True)
class StartFindings:
    """The findings that are no errors.

    Attributes:
        warnings: complaints of a start, and commands that would be refused later.
        unchecked: checks that this process could not make, each with its reason.
    """

    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check(config: Config) -> StartFindings:
    """Check all files, memory and ports that the settings name.

    Args:
        config: the settings.

    Raises:
        ZswapdError: a start would be refused. The class is the one that the start would raise.
    """
    found = StartFindings()
    is_running = is_served(config.control.socket)
    if is_running:
        found.unchecked.append(
            "a daemon runs with this control socket, and uses memory, mountpoint, backing and port"
        )
    else:
        costs.check(config)
    if os.geteuid() == 0:
        _check_as_root(config, is_running=is_running)
    else:
        found.unchecked.append("only root can check control socket, mountpoint, arena and backing")
    found.warnings.extend(config.without_effect())
    _check_volumes(config, found)
    _check_metrics(config, found, is_running=is_running)
    _check_limits(found)
    return found


def _check_as_root(config: Config, *, is_running: bool) -> None:
    """Make the checks that only root may make, in the order of a start."""
    if is_running:
        return
    check_place(config.control.socket)
    check_backing(config)
    require_hook()
    os.close(open_shared_memory(config.memory.arena)[0])
    Mount(config.fuse.mountpoint).check()


def _check_volumes(config: Config, found: StartFindings) -> None:
    """Refuse what can never be a volume's backing file; warn of a file that is missing now."""
    mountpoint = without_links(config.fuse.mountpoint)
    for name, (path, mode) in configured(config).items():
        at = config.origins(f"cache.volumes.{name}")
        try:
            refuse_unusable(path, mountpoint)
            if not os.access(path, os.R_OK | (os.W_OK if mode != "ro" else 0)):
                wanted = "read" if mode == "ro" else "read and written"
                found.warnings.append(f"{at}: cache.volumes.{name}: {path} cannot be {wanted}")
        except VolumeError as error:
            raise VolumeError(
                f"{at}: cache.volumes.{name}: {error.message}", hint=error.hint
            ) from error
        except OSError as error:
            found.warnings.append(f"{at}: cache.volumes.{name}: {path}: {error.strerror}")


def _check_metrics(config: Config, found: StartFindings, *, is_running: bool) -> None:
    host, _, port = config.metrics.listen.rpartition(":")
    if port and not is_running:
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # the same option as the listener of the metrics
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            found.warnings.append(
                f"{config.origins('metrics.listen')}: metrics.listen {config.metrics.listen}:"
                f" {error.strerror}"
            )
    # The default names a user that few machines have, so only a given value is checked.
    if not port or "metrics.users" not in config.given:
        return
    for user in config.metrics.users.split():
        if user != EVERYBODY and not _is_user(user):
            found.warnings.append(
                f"{config.origins('metrics.users')}: metrics.users: there is no user {user}"
            )


def _is_user(user: str) -> bool:
    if user.isdecimal():
        return True
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _check_limits(found: StartFindings) -> None:
    """Warn of a memory limit because of which `zswapctl swapon` would be refused.

    Limit: the daemon is assumed to run in the memory cgroup of this process.
    """
    protection = limit_protection()
    if not protection.on:
        found.warnings.append(
            f"memory limit: {protection.detail} ({protection.hint}); `zswapctl swapon` would be"
            " refused"
        )
