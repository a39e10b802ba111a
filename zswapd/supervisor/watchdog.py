# SPDX-License-Identifier: GPL-2.0-or-later
"""The watchdog: it says whether a worker hangs, which is to give no sign of life for too long.

A worker gives two signs of life a second while it serves. While it rebuilds, it gives one for each
stretch of the arena. So the limit need not grow with the arena. In three cases the limit is longer:

- A worker that was not a spare first has to find its memory. It has START_S until its first sign.
- Before any worker has served, the whole reserve is populated in one step, and no page waits. The
  limit is START_S, and START_S more for each GiB of swap files.
- If workers in a row are ended before they serve, the limit is too short for this machine. Each
  worker has twice the time of the one before.

Time in which the supervisor itself did not run does not count (`ignore`). The machine may have been
suspended or busy.
"""

from __future__ import annotations

START_S = 60.0
"""Time, s, that a worker has until its first sign of life."""
MOST_DOUBLINGS = 6
"""Limit of the doublings: a factor of 64."""


class Watchdog:
    """The watchdog of all workers of a supervisor, one at a time.

    Args:
        limit: longest silence, s; 0 for no limit.
        swap_bytes: size of all swap files together.
    """

    def __init__(self, limit: float, swap_bytes: int) -> None:
        self._limit = limit
        self._building_s = START_S * (1 + (swap_bytes >> 30))
        self._first_s = 0.0
        self._is_building = False
        self._factor = 1
        self._signs: tuple[int, ...] = ()
        self._seen = 0.0

    def begin(
        self,
        now: float,
        signs: tuple[int, ...],
        *,
        is_forked: bool,
        is_building: bool,
        early_deaths: int,
    ) -> None:
        """Begin to watch a new worker.

        Args:
            now: the time, s.
            signs: the present values of the words that change with each sign of life.
            is_forked: the worker was not a spare, and has to find its memory.
            is_building: no worker has ever served.
            early_deaths: number of workers in a row that died before serving.
        """
        self._signs, self._seen = signs, now
        self._first_s = START_S if is_forked else 0.0
        self._is_building = is_building
        self._factor = 1 << min(early_deaths, MOST_DOUBLINGS)

    def ignore(self, seconds: float) -> None:
        """Leave a time out of the silence."""
        self._seen += seconds

    def silence(self, now: float, signs: tuple[int, ...]) -> float:
        """Return the time, s, since the worker's last sign of life."""
        if signs != self._signs:
            self._signs, self._seen, self._first_s = signs, now, 0.0
        return now - self._seen

    def has_expired(self, now: float, signs: tuple[int, ...], *, serves: bool) -> bool:
        """Say whether the worker has been silent for too long.

        Args:
            now: the time, s.
            signs: see `begin`.
            serves: the worker has said that it serves.
        """
        silence = self.silence(now, signs)
        if not self._limit:
            return False
        if serves:
            return silence >= self._limit
        if self._is_building:
            return silence >= self._building_s
        return silence >= max(self._limit, self._first_s) * self._factor
