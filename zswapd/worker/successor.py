# SPDX-License-Identifier: GPL-2.0-or-later
"""What a successor has to know and does not find in the arena: saved in the shared state.

`StateSaver` saves it, and `restore` gives it to the parts of the next worker.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from zswapd import __version__, counters
from zswapd.handover.state import HookWord, Word
from zswapd.metrics.snapshot import Snapshot, WorkerStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.control.server import Server
    from zswapd.core.core import Core
    from zswapd.worker.parts import Parts

FRESH_S = 0.02
"""Age of statistics that are returned again, however often a client asks.

Taking them stops the event loop.
"""
_COUNTED = ("session", "control", "pressure", "shrinker")
"""Names under which counters of earlier workers are saved, beside those of the core and of volumes.
"""


class StateSaver:
    """Statistics of all parts, and the document for a successor that has their counters.

    Args:
        parts: of this worker.
        left: the document of the worker before.

    Attributes:
        server: of the control socket, whose requests are counted; set before the first statistics.
        checked: the settings that the check before an upgrade has read, for the next supervisor.
        takeover_s: how long this worker's takeover took, s.
    """

    def __init__(self, parts: Parts, left: Mapping[str, Any], *, checked: object) -> None:
        self._parts = parts
        self._bases: dict[str, Any] = {name: left.get(name, {}) for name in _COUNTED}
        self.server: Server
        self.checked = checked
        self.takeover_s = 0.0
        self._taken: tuple[Snapshot, float] | None = None  # and when
        self._saved_requests = -1

    def snapshot(self, *, ages_sampled: bool = False) -> Snapshot:
        """Return statistics for somebody outside, at most FRESH_S old.

        They are saved before they are returned: no successor's counters are less.

        Args:
            ages_sampled: see `Core.statistics`; the statistics are of this moment then.
        """
        now = time.monotonic()
        taken = self._taken
        if taken is None or ages_sampled or now - taken[1] >= FRESH_S:
            self._taken = taken = self.statistics(ages_sampled=ages_sampled), now
            self.save_state(taken[0])
        return taken[0]

    def save_state(self, now: Snapshot | None = None) -> None:
        """Save the document in the shared state.

        Args:
            now: the statistics, if they have just been taken.
        """
        now = now or self.statistics(ages_sampled=False)
        parts, core = self._parts, self._parts.core
        parts.state.save(
            {
                "configured": parts.settings.document,
                "checked": self.checked,
                "settings": parts.settings.changes,
                "frozen": core.frontswap.frozen,
                "writeback": core.writeback.remember() if core.writeback else {},
                "writers": parts.session.operations.writers.remember(),
                "swapped_on": parts.emptying.remember(),
                "store_ages": core.ages.remember(),
                "born": parts.born,
                "born_ns": parts.directory.born_ns,
                "core": counters.export(now.core),
                "session": counters.export(now.fuse),
                "control": counters.export(now.control),
                "pressure": counters.export(now.pressure),
                "merging": parts.merging.remembered(),
                "cache_frozen": bool(core.cache and core.cache.cleancache.frozen),
                "volumes": parts.volumes.remember() if parts.volumes else {},
                "volume_counters": {volume.name: counters.export(volume) for volume in now.volumes},
                "shrinker": counters.export(now.shrinker) if now.shrinker else {},
                **({"ceiling": now.shrinker.ceiling_frames} if now.shrinker else {}),
            }
        )

    def save_if_used(self) -> bool:
        """Save the document if requests have come since the last time; say whether they have."""
        requests = self._parts.state.hook_words[HookWord.REQUESTS]
        if requests == self._saved_requests:
            return False
        self._saved_requests = requests
        self.save_state()
        return True

    def statistics(self, *, ages_sampled: bool) -> Snapshot:
        """Return the statistics of all parts, those of earlier workers included.

        Args:
            ages_sampled: see `Core.statistics`.
        """
        parts, bases = self._parts, self._bases
        shrinking, words = parts.shrinking, parts.state.words
        return Snapshot(
            core=parts.core.statistics(ages_sampled=ages_sampled),
            fuse=counters.add(parts.session.statistics(), bases["session"]),
            control=counters.add(self.server.statistics(), bases["control"]),
            pressure=counters.add(parts.pressure.statistics(), bases["pressure"]),
            volumes=parts.volumes.statistics() if parts.volumes else (),
            shrinker=counters.add(shrinking.shrinker.statistics(), bases["shrinker"])
            if shrinking
            else None,
            worker=WorkerStatistics(
                version=__version__,
                number=words[Word.STARTED],
                deaths=words[Word.DEATHS],
                broken=words[Word.BROKEN],
                takeover_seconds=self.takeover_s,
                supervised=parts.parent.is_alive(),
                poisoned_requests=parts.state.hook_words[HookWord.POISONED],
                uptime_seconds=time.monotonic() - parts.born,
                protections={item.name: item.on for item in parts.protections},
            ),
        )


def restore(core: Core, left: Mapping[str, Any]) -> None:
    """Have a core go on with what the worker before has saved."""
    if core.writeback:
        core.writeback.recall(left.get("writeback", {}))
    core.ages.recall(left.get("store_ages", ()))
    if left.get("frozen"):
        core.frontswap.freeze()
    if core.cache and left.get("cache_frozen"):
        core.cache.cleancache.freeze()
