# SPDX-License-Identifier: GPL-2.0-or-later
"""Geometry: the settings that cannot change while a daemon serves.

A supervisor writes them into the shared state. Every successor, and the check before an upgrade,
compares them with its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zswapd.config.shapes import differences
from zswapd.errors import HandoverError
from zswapd.host.installation import restart_daemon

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config


def describe_geometry(config: Config) -> dict[str, Any]:
    """Return the settings on which a successor has to agree with a running daemon."""
    backing = config.backing
    return {
        "mountpoint": str(config.fuse.mountpoint),
        "page_size": config.context.page_size,
        "files": config.swap_files(),
        "allocator": config.pool.allocator,
        "max_zspage_frames": config.pool.max_zspage_frames,
        "control.socket": str(config.control.socket),
        **(
            {"backing": f"{backing.path}{' (encrypted)' if backing.encrypt else ''}"}
            if backing.path
            else {}
        ),
    }


def check_geometry(config: Config, running: Mapping[str, Any]) -> None:
    """Check that a daemon with these settings can take over a running daemon's geometry.

    Args:
        config: the settings.
        running: the geometry in the running daemon's shared state.

    Raises:
        HandoverError: a setting differs; the message names all that do.
    """
    ours = describe_geometry(config)
    # Programs before 0.2.0 do not write these. The arena's label has some of them.
    unsaid = {key: ours[key] for key in ("max_zspage_frames", "control.socket")}
    running = {"allocator": "zsmalloc", **unsaid} | dict(running)
    known = (*ours, "backing")
    # The order of the files matters: a file's place is its number in every page's header.
    found = differences({key: running[key] for key in known if key in running}, ours)
    if found:
        raise HandoverError(
            f"the running daemon's {'; '.join(found)}",
            hint=f"put the old value back, or swap off to change it: {restart_daemon()}",
        )
