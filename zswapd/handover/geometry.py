# SPDX-License-Identifier: GPL-2.0-or-later
"""Geometry: the settings that cannot change while a daemon serves.

A supervisor writes them into the shared state. Every successor, and the check before an upgrade,
compares them with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zswapd.config.shapes import differences
from zswapd.errors import HandoverError
from zswapd.handover.roster import added_names
from zswapd.host.installation import restart_daemon

if TYPE_CHECKING:
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
    ours, running = _without_comers(describe_geometry(config), running)
    # Programs before 0.2.0 do not write these. The arena's label has some of them.
    unsaid = {key: ours[key] for key in ("max_zspage_frames", "control.socket")}
    running = {"allocator": "zsmalloc", **unsaid} | dict(running)
    known = (*ours, "backing")
    found = differences({key: running[key] for key in known if key in running}, ours)
    if found:
        raise HandoverError(
            f"the running daemon's {'; '.join(found)}",
            hint=f"put the old value back, or swap off to change it: {restart_daemon()}",
        )


def _without_comers(
    ours: dict[str, Any], running: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both geometries without the files that may differ.

    A file that the running daemon lacks is added after the takeover, if its shared state can grow.
    A file that has come at run time need not be in the settings, nor one that was removed. With a
    roster, the order of the files has no meaning: their numbers are in it.
    """
    if not isinstance(running["files"], Mapping):  # damaged, which the comparison finds
        return ours, dict(running)
    theirs, files = dict(running["files"]), dict(ours["files"])
    roster = running.get("roster")
    if roster or running.get("arena", {}).get("kind") == "tmpfs":
        theirs_only, ours_only = set(theirs) - set(files), set(files) - set(theirs)
        theirs = {n: s for n, s in theirs.items() if n not in theirs_only & added_names(running)}
        files = {n: s for n, s in files.items() if n not in ours_only or n == "swap"}
    if roster:
        theirs, files = dict(sorted(theirs.items())), dict(sorted(files.items()))
    return {**ours, "files": files}, {**running, "files": theirs}
