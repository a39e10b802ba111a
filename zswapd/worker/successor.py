# SPDX-License-Identifier: GPL-2.0-or-later
"""The state for a successor that is not in the arena: settings, counters, and notes of the parts.

`StateSaver` saves it in the shared state, and `restore` gives it to the core of the next worker.
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
    from zswapd.worker.client_files import ClientFiles
    from zswapd.worker.parts import Parts

FRESH_S = 0.02
"""Time, s, in which statistics are returned again. To take them stops the event loop."""
_COUNTED = ("session", "control", "pressure", "shrinker", "files")
"""Names of the saved counters of earlier workers, without those of the core and of volumes."""


class StateSaver:
    """Statistics of all parts, and the document for a successor that has their counters.

    Args:
        parts: the parts of this worker.
        left: the document of the worker before.
        checked: see the attribute.

    Attributes:
        server: the server of the control socket, which counts its requests. It is set before the
            first statistics are taken.
        files: the swap files that may come and go, likewise.
        checked: the settings that the check before an upgrade has read, for the next supervisor.
        takeover_s: duration of this worker's takeover, s.
    """

    def __init__(self, parts: Parts, left: Mapping[str, Any], *, checked: object) -> None:
        self._parts = parts
        self._bases: dict[str, Any] = {name: left.get(name, {}) for name in _COUNTED}
        self.server: Server
        self.files: ClientFiles
        self.checked = checked
        self.takeover_s = 0.0
        self._taken: tuple[Snapshot, float] | None = None  # the last snapshot and its time
        self._saved_requests = -1

    def snapshot(self, *, ages_sampled: bool = False) -> Snapshot:
        """Return statistics for a client, at most FRESH_S old.

        They are saved before they are returned, so no counter of a successor is lower.

        Args:
            ages_sampled: see `Core.statistics`; the statistics are then taken now.
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
                "files": counters.export(now.files),
                "merging": parts.merging.remembered(),
                "cache_frozen": bool(core.cache and core.cache.cleancache.frozen),
                "volumes": parts.volumes.remember() if parts.volumes else {},
                "volume_counters": {volume.name: counters.export(volume) for volume in now.volumes},
                "shrinker": counters.export(now.shrinker) if now.shrinker else {},
                **({"ceiling": now.shrinker.ceiling_frames} if now.shrinker else {}),
            }
        )

    def save_if_used(self) -> bool:
        """Save the document if requests have come since the last call; return whether they have."""
        requests = self._parts.state.hook_words[HookWord.REQUESTS]
        if requests == self._saved_requests:
            return False
        self._saved_requests = requests
        self.save_state()
        return True

    def statistics(self, *, ages_sampled: bool) -> Snapshot:
        """Return the statistics of all parts, including those of earlier workers.

        Args:
            ages_sampled: see `Core.statistics`.
        """
        parts, bases = self._parts, self._bases
        shrinking, words = parts.shrinking, parts.state.words
        core = parts.core.statistics(ages_sampled=ages_sampled)
        return Snapshot(
            core=core,
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
            cost=parts.cost.statistics(core),
            files=counters.add(self.files.statistics(), bases["files"]),
        )


def restore(core: Core, left: Mapping[str, Any]) -> None:
    """Give a core the state that the worker before has saved."""
    if core.writeback:
        core.writeback.recall(left.get("writeback", {}))
    core.ages.recall(left.get("store_ages", ()))
    if left.get("frozen"):
        core.frontswap.freeze()
    if core.cache and left.get("cache_frozen"):
        core.cache.cleancache.freeze()
