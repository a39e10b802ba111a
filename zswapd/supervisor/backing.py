# SPDX-License-Identifier: GPL-2.0-or-later
"""The file or device behind the pool.

As the supervisor opens it for all workers, or checks it before a start.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from zswapd.core.backing.store import check_store, open_store
from zswapd.core.sizing import slots_needed
from zswapd.errors import BackingError
from zswapd.paths import without_links

if TYPE_CHECKING:
    from zswapd.config import Config

_RESEND = (6, 9)
"""The first Linux that sends the requests of a dead worker again: those that waited for the disk.
"""


def open_backing(config: Config) -> int:
    """Open what `backing.path` names, for all workers to come.

    Return its descriptor, -1 if there is no backing.

    Raises:
        BackingError: it cannot be used.
    """
    path = config.backing.path
    if not path:
        return -1
    _check_kernel()
    mountpoint = without_links(config.fuse.mountpoint)
    return open_store(
        path,
        slots_needed(config),
        config.context.page_size,
        mountpoint=mountpoint,
        force=config.backing.force,
    )


def check_backing(config: Config) -> None:
    """Do nothing if what `backing.path` names could be opened.

    Nothing is changed, so some causes of a failure are not seen.

    Raises:
        BackingError: it cannot be used.
    """
    path = config.backing.path
    if path:
        _check_kernel()
        mountpoint, force = without_links(config.fuse.mountpoint), config.backing.force
        check_store(
            path, slots_needed(config), config.context.page_size, mountpoint=mountpoint, force=force
        )


def _check_kernel() -> None:
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or (int(release[1]), int(release[2])) < _RESEND:
        raise BackingError(
            f"a backing needs Linux 6.9, this is {os.uname().release}",
            hint=(
                "before it, requests that wait for the disk would die with their worker: set"
                " backing.path to nothing"
            ),
        )
