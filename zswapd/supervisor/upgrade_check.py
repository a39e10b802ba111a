# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a worker of this program would come up: tried with a few pages, before the one that serves is told to leave.

Afterwards it would be too late: the old program is not in memory any more, and a worker that cannot rebuild its index is
followed by one that cannot either. So the check that comes before an upgrade stores pages of every kind with every codec, takes
them over as a successor does, and reads them back, all in an arena of its own of some hundred KiB.

Limit: what only the real arena would bring to light stays there.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from zswapd.core import compress
from zswapd.core.core import Core, Inherited
from zswapd.core.selftest import sample_pages
from zswapd.errors import HandoverError
from zswapd.fuse import lowlevel, lowlevel_problem
from zswapd.host import installation
from zswapd.worker import prepare

if TYPE_CHECKING:
    from zswapd.config import Config

_PAGES = 64
"""Pages of the swap file that is tried."""


def rehearse(config: Config) -> None:
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
            f"the installed program fails in a rehearsal of its takeover: {type(error).__name__}: {error}",
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
