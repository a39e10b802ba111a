# SPDX-License-Identifier: GPL-2.0-or-later
"""The check before an upgrade: can a worker of this program take over?

The check runs while the old worker serves. After the upgrade, the old program is not in
memory, and each new worker would fail like the one before. So the check stores pages of every kind
with every codec, takes them over as a successor does, and reads them back. It uses an arena of its
own, of a few hundred KiB.

Limit: the check does not find failures that only the real arena causes.
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
from zswapd.handover.roster import made_files
from zswapd.handover.state import READABLE_LAYOUTS as STATE_LAYOUTS
from zswapd.host import installation
from zswapd.host.installation import restart_daemon
from zswapd.worker import prepare

if TYPE_CHECKING:
    from zswapd.config import Config

_PAGES = 64
"""Number of pages of the swap file in the rehearsal."""


def check(config: Config, running: str) -> None:
    """Check that this program, with these settings, can take over from a running one.

    Args:
        config: the settings that this program would run with.
        running: the description that the running daemon gives of itself, as JSON.

    Raises:
        HandoverError: this program cannot take over, or the description is not valid.
    """
    try:
        identity = json.loads(running)
        layouts = (identity["arena_layout"], identity["state_layout"])
        shape = dict(identity["geometry"])
    except (ValueError, KeyError, TypeError) as error:
        raise HandoverError(
            "the running daemon's description of itself is not valid", hint="use `zswapctl upgrade`"
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
    made_for, wanted = identity.get("arena_label"), label(config, made_files(shape)).decode()
    if made_for is not None and made_for != wanted:  # older programs do not give it
        found = "; ".join(differences(parsed_label(made_for), parsed_label(wanted)))
        raise HandoverError(
            f"the running daemon's arena is for other settings: {found}",
            hint=f"put the old values back, or swap off to change them: {restart_daemon()}",
        )


def memory_of(running: str) -> int:
    """Return the memory, in bytes, that is 100 % for a running daemon.

    The sizes of its swap files depend on it, and have to stay. Older daemons do not give it; they
    use MemTotal.

    Args:
        running: see `check`.
    """
    try:
        return int(json.loads(running)["memory_total"])
    except (ValueError, KeyError, TypeError):
        return memory_total()


def try_takeover(config: Config) -> None:
    """Rehearse a takeover, from an arena that this process fills itself.

    Args:
        config: the settings that the program would run with.

    Raises:
        HandoverError: the rehearsal fails.
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
    """Return the settings with one swap file of _PAGES pages, and without cache and backing."""
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
