# SPDX-License-Identifier: GPL-2.0-or-later
"""Handlers of `zswapctl cache` in a running worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zswapd.errors import ControlError
from zswapd.host.installation import restart_daemon

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.control.protocol import VolumeReport
    from zswapd.core.frontends.cleancache import Cleancache
    from zswapd.volumes.manager import Volumes
    from zswapd.volumes.volume import Volume


class CacheCommands:
    """Handlers over one worker's volumes.

    Args:
        volumes: all volumes; None if the settings have no cache.
        cache: the store of their pages; None likewise.
        remember: saves the changed state for a successor.
    """

    def __init__(
        self, volumes: Volumes | None, cache: Cleancache | None, remember: Callable[[], None]
    ) -> None:
        self._maybe = volumes, cache
        self._remember = remember

    def handlers(self) -> dict[str, Any]:
        """Return the handlers by command."""
        return {
            "cache-add": self._add,
            "cache-list": self._list,
            "cache-remove": self._remove,
            "cache-invalidate": self._invalidate,
            "cache-resize": self._resize,
            "cache-freeze": self._freeze,
            "cache-thaw": self._thaw,
        }

    def _parts(self) -> tuple[Volumes, Cleancache]:
        volumes, cache = self._maybe
        if volumes is None or cache is None:
            raise ControlError(
                "there is no cache: cache.limit is empty",
                hint=f"set cache.limit in the settings, then {restart_daemon()}",
            )
        return volumes, cache

    async def _add(self, name: str, path: str, mode: str = "ro") -> VolumeReport:
        volume = await self._parts()[0].add(name, path, mode)
        self._remember()
        return _report(volume)

    def _list(self) -> dict[str, Any]:
        volumes, cache = self._parts()
        statistics = {item.name: item for item in volumes.statistics()}
        rows = []
        for volume in volumes.volumes():
            counted = statistics[volume.name]
            reads = counted.hits + counted.misses
            rows.append(
                {
                    **_report(volume),
                    "hit_ratio": counted.hits / reads if reads else None,
                    "pages": counted.pages,
                }
            )
        return {"volumes": rows, "frozen": cache.frozen}

    async def _remove(self, name: str) -> dict[str, Any]:
        volumes, _cache = self._parts()
        volumes.find(name)
        await volumes.remove(name)
        self._remember()
        return {"removed": name}

    async def _invalidate(self, name: str) -> dict[str, Any]:
        volumes, _cache = self._parts()
        volume = volumes.find(name)
        pages = volume.drop()
        await volume.renew()  # wait until the kernel has dropped its pages too
        return {"name": name, "dropped_pages": pages}

    async def _resize(self, name: str) -> VolumeReport:
        """Adopt the present length of the backing file."""
        volume = self._parts()[0].find(name)
        await volume.renew()
        return _report(volume)

    def _freeze(self) -> dict[str, Any]:
        self._parts()[1].freeze()
        self._remember()
        return {"frozen": True}

    def _thaw(self) -> dict[str, Any]:
        self._parts()[1].thaw()
        self._remember()
        return {"frozen": False}


def _report(volume: Volume) -> VolumeReport:
    failure = volume.source.failure
    return {
        "name": volume.name,
        "path": volume.path,
        "mode": volume.mode,
        "size": volume.size,
        "problem": None if failure is None else str(failure),
    }
