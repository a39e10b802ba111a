# SPDX-License-Identifier: GPL-2.0-or-later
"""Regular looks at the backing file of an open volume.

A program that reads a mapping sends no request while its pages are in the kernel's page cache.
Without a regular look it would see replaced data for ever.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from zswapd.errors import VolumeError

if TYPE_CHECKING:
    from zswapd.volumes.source import Source

LEAST_S = 0.25
"""Shortest time between two looks without a request, in seconds."""
MOST_S = 1.0
"""Longest sleep in seconds: `check_s` may change meanwhile."""


class Watch:
    """The number of opens of one volume, and the looks that are made for them.

    Args:
        source: the backing file.
        is_open: whether the volume may be open already. A predecessor's opens are not known, so the
            looks then go on until the volume is removed.
    """

    def __init__(self, source: Source, *, is_open: bool) -> None:
        self._source = source
        self._opens = self._unknown = int(is_open)
        self._opened = trio.Event()
        if is_open:
            self._opened.set()

    def opened(self) -> None:
        """Count an open."""
        self._opens += 1
        self._opened.set()

    def closed(self) -> None:
        """Count a close; a mapping keeps its file open."""
        if self._opens > self._unknown:
            self._opens -= 1
            if not self._opens:
                self._opened = trio.Event()

    def end(self) -> None:
        """Wake `run`, so that it finds the volume removed."""
        self._opened.set()

    async def run(self) -> None:
        """Look whenever a look is due, until the volume is removed.

        An error of a look is reported to the next request.
        """
        while not self._source.is_gone:
            await self._opened.wait()
            await trio.sleep(min(max(self._source.remaining_s, LEAST_S), MOST_S))
            if self._opens:
                with contextlib.suppress(VolumeError):
                    await self._source.look_if_due()
