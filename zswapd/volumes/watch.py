# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks at a backing file without being asked, for as long as somebody has its volume open.

Whoever reads a mapping asks nobody while its pages are in the kernel's page cache. Without a look
of our own, a program that only reads memory would see for ever what was replaced.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from zswapd.errors import VolumeError

if TYPE_CHECKING:
    from zswapd.volumes.source import Source

LEAST_S = 0.25
"""Shortest time between two looks that nobody asked for."""
MOST_S = 1.0
"""Longest sleep: `check_s` may be changed meanwhile."""


class Watch:
    """Who has one volume open, and the looks that are made for them.

    Args:
        source: what is looked at.
        is_open: somebody may have it open already: a predecessor's opens are not known, so it is
            looked at to the end.
    """

    def __init__(self, source: Source, *, is_open: bool) -> None:
        self._source = source
        self._opens = self._unknown = int(is_open)
        self._opened = trio.Event()
        if is_open:
            self._opened.set()

    def opened(self) -> None:
        """Take note that somebody has it open."""
        self._opens += 1
        self._opened.set()

    def closed(self) -> None:
        """Take note that somebody has closed it, mappings included."""
        if self._opens > self._unknown:
            self._opens -= 1
            if not self._opens:
                self._opened = trio.Event()

    def end(self) -> None:
        """Have `run` find out that the volume was removed."""
        self._opened.set()

    async def run(self) -> None:
        """Look whenever that is due, until the volume is removed.

        What a look finds wrong is told to whoever asks.
        """
        while not self._source.is_gone:
            await self._opened.wait()
            await trio.sleep(min(max(self._source.remaining_s, LEAST_S), MOST_S))
            if self._opens:
                with contextlib.suppress(VolumeError):
                    await self._source.look_if_due()
