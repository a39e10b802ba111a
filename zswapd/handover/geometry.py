# SPDX-License-Identifier: GPL-2.0-or-later
"""What of the settings cannot change while a daemon serves: whoever takes over has to agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zswapd.worker import disk

if TYPE_CHECKING:
    from zswapd.config import Config


def of(config: Config) -> dict[str, Any]:
    """Return what a successor has to agree with a running daemon on."""
    return {
        "mountpoint": str(config.fuse.mountpoint),
        "page_size": config.context.page_size,
        "files": config.swap_files(),
        "allocator": config.pool.allocator,
        "max_zspage_frames": config.pool.max_zspage_frames,
        "fuse.hook": config.fuse.hook,
        "control.socket": str(config.control.socket),
        **disk.geometry(config),
    }
