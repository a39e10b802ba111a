# SPDX-License-Identifier: GPL-2.0-or-later
"""When a worker counts as hanging: it has given no sign of life for too long.

It gives one twice a second while it serves, and one for each stretch of the arena that it rebuilds,
so how long it may be silent does not depend on how much there is. Three cases are other ones:

- one that was forked on the spot has to find its memory first, where there may be none: START_S
  until its first sign;
- before anybody has ever served, a reserve of any size is populated in one go, and nobody's pages
  are waited for: START_S for each GiB of swap files;
- where one after the other is ended before it serves, the limit is too short for this machine: each
  gets twice the time of the one before.

Time in which the supervisor itself did not run (a suspended machine, a busy one) is held against
nobody (`ignore`).
"""

from __future__ import annotations

START_S = 60.0
"""What a worker may take until its first sign of life."""
MOST_DOUBLINGS = 6


class Watchdog:
    """The look-out for one worker after the other.

    Args:
        limit: longest silence, s; 0 for any.
        swap_bytes: of all swap files.
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
        """Look out for a new worker.

        Args:
            now: a time, s.
            signs: the words that change when it gives a sign of life, as they are.
            is_forked: it has to find its memory.
            is_building: nobody has ever served.
            early_deaths: workers in a row that died before they served.
        """
        self._signs, self._seen = signs, now
        self._first_s = START_S if is_forked else 0.0
        self._is_building = is_building
        self._factor = 1 << min(early_deaths, MOST_DOUBLINGS)

    def ignore(self, seconds: float) -> None:
        """Do not count some time."""
        self._seen += seconds

    def silence(self, now: float, signs: tuple[int, ...]) -> float:
        """Return for how long the worker has given no sign of life, s."""
        if signs != self._signs:
            self._signs, self._seen, self._first_s = signs, now, 0.0
        return now - self._seen

    def has_expired(self, now: float, signs: tuple[int, ...], *, serves: bool) -> bool:
        """Say whether the worker has been silent for too long.

        Args:
            now: the time.
            signs: see `begin`.
            serves: it has said so.
        """
        silence = self.silence(now, signs)
        if not self._limit:
            return False
        if serves:
            return silence >= self._limit
        if self._is_building:
            return silence >= self._building_s
        return silence >= max(self._limit, self._first_s) * self._factor
