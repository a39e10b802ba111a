# SPDX-License-Identifier: GPL-2.0-or-later
"""Open the file or device behind the pool for all workers, or check it before a start."""

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
"""The first Linux version that sends requests again that a dead worker has not answered."""


def open_backing(config: Config) -> int:
    """Open the file or device of `backing.path`; return its descriptor, -1 without a backing.

    Raises:
        BackingError: the file or device cannot be used.
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
    """Check the file or device of `backing.path`.

    Limit: nothing is changed, so failures that only a change would show are not found.

    Raises:
        BackingError: the file or device cannot be used.
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
                "older kernels lose the requests that wait for the disk when a worker dies: leave"
                " backing.path empty"
            ),
        )
