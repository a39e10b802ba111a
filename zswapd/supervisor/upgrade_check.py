# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a worker of this program would come up.

Tried with a few pages, before the one that serves is told to leave.

Afterwards it would be too late: the old program is not in memory any more, and a worker that cannot
rebuild its index is followed by one that cannot either. So the check that comes before an upgrade
stores pages of every kind with every codec, takes them over as a successor does, and reads them
back, all in an arena of its own of some hundred KiB.

Limit: what only the real arena would bring to light stays there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING

from zswapd.config.loader import memory_total
from zswapd.config.shapes import differences
from zswapd.core import compress
from zswapd.core.allocators.arena import READABLE_LAYOUTS
from zswapd.core.core import Core, Inherited
from zswapd.core.selftest import sample_pages
from zswapd.core.sizing import label, parsed_label
from zswapd.errors import HandoverError
from zswapd.fuse import lowlevel, lowlevel_problem
from zswapd.handover.geometry import check_geometry
from zswapd.handover.state import READABLE_LAYOUTS as STATE_LAYOUTS
from zswapd.host import installation
from zswapd.host.installation import restart_daemon
from zswapd.worker import prepare

if TYPE_CHECKING:
    from zswapd.config import Config

_PAGES = 64
"""Pages of the swap file that is tried."""


def check(config: Config, running: str) -> None:
    """Say whether this program, with this configuration, can take over from a running one.

    Args:
        config: the settings that it would run with.
        running: what `zswapctl upgrade` was told by the running program, as JSON.

    Raises:
        HandoverError: it cannot, or cannot tell; the message says why.
    """
    try:
        identity = json.loads(running)
        layouts = (identity["arena_layout"], identity["state_layout"])
        shape = dict(identity["geometry"])
    except (ValueError, KeyError, TypeError) as error:
        raise HandoverError(
            "what the running daemon says of itself makes no sense", hint="use `zswapctl upgrade`"
        ) from error
    for what, theirs, ours in zip(
        ("arena", "shared state"), layouts, (READABLE_LAYOUTS, STATE_LAYOUTS), strict=True
    ):
        if theirs not in ours:
            raise HandoverError(
                f"the running daemon's {what} has layout {theirs}, the installed program knows"
                f" {ours}",
                hint=f"when there is time to swap off: {restart_daemon()}",
            )
    check_geometry(config, shape)
    made_for, wanted = identity.get("arena_label"), label(config).decode()
    if made_for is not None and made_for != wanted:  # older programs do not say
        found = "; ".join(differences(parsed_label(made_for), parsed_label(wanted)))
        raise HandoverError(
            f"the running daemon's arena is for other settings: {found}",
            hint=f"put the old values back, or swap off to change them: {restart_daemon()}",
        )


def memory_of(running: str) -> int:
    """Return what 100 % is for a running daemon, bytes: its swap files keep their sizes.

    Older ones go by MemTotal.

    Args:
        running: see `check`.
    """
    try:
        return int(json.loads(running)["memory_total"])
    except (ValueError, KeyError, TypeError):
        return memory_total()


def try_takeover(config: Config) -> None:
    """Take over from nobody.

    Args:
        config: the settings that the program would run with.

    Raises:
        HandoverError: it does not work.
    """
    if lowlevel is None:
        raise HandoverError(
            f"the installed program could not take the session over: {lowlevel_problem}",
            hint=f"install it again, whole: {installation.found().reinstall()}",
        )
    try:
        prepare.load(config)
        _take_over(_small(config))
    except Exception as error:
        raise HandoverError(
            f"the installed program fails in a rehearsal of its takeover: {type(error).__name__}:"
            f" {error}",
            hint="do not upgrade to it; report this as a bug",
        ) from error


def _small(config: Config) -> Config:
    """Return settings for a tiny swap file and nothing else."""
    size = config.context.page_size * _PAGES
    return dataclasses.replace(
        config,
        swap=dataclasses.replace(config.swap, size=size, files={}),
        memory=dataclasses.replace(config.memory, reserve=size, arena="memfd"),
        cache=dataclasses.replace(config.cache, limit=None, volumes={}),
        backing=dataclasses.replace(config.backing, path=None),
    )


def _take_over(config: Config) -> None:
    page_size = config.context.page_size
    first = Core(config)
    written: dict[int, bytes] = {}
    for codec in compress.names():
        first.zv.compressor = compress.get(codec)
        for page in sample_pages(page_size):
            number = len(written)
            if first.devices["swap"].write(number * page_size, memoryview(page)) is None:
                written[number] = page
    arena = os.dup(first.arena.fd)
    first.close()
    try:
        successor = Core(config, inherited=Inherited(arena))
    finally:
        os.close(arena)
    out = memoryview(bytearray(page_size))
    for number, page in written.items():
        successor.devices["swap"].read_into(number * page_size, out)
        if out != page:
            raise HandoverError(f"page {number} does not come back as it was")
    successor.check()
    successor.self_test()
    successor.close()
    if not written:
        raise HandoverError("no page can be stored")
