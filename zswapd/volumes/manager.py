# SPDX-License-Identifier: GPL-2.0-or-later
"""All cache volumes: made by configuration or command, and restored by a successor.

Each volume has threads of its own (a `Lane`). They are made at start for the maximum number of
volumes. So a backing file that hangs does not block the threads of another volume. A lane is reused
when all its threads are idle.

A successor restores the volumes from `remember`, with their inode numbers, so files stay open. Its
cleancache is empty. Pages in the kernel's page cache stay, with two exceptions: the first look
finds a change of the backing file since the predecessor's last look, or the predecessor had
notifications of the kernel under way.
"""

from __future__ import annotations

import logging
import mmap
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import trio

from zswapd import counters
from zswapd.errors import VolumeError, ZswapdError
from zswapd.host.hints import did_you_mean
from zswapd.host.installation import restart_daemon
from zswapd.system.offload import Offload
from zswapd.volumes.file_io import Signature
from zswapd.volumes.gate import Places
from zswapd.volumes.source import Lane
from zswapd.volumes.volume import GATES, MODES, RUN_BYTES, Volume

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from zswapd.core.frontends.cleancache import Cleancache
    from zswapd.volumes.statistics import VolumeStatistics

log = logging.getLogger(__name__)

FIRST_INODE = 1 << 41
"""First inode number of a volume. Numbers rise, and no number is used twice.

So the kernel cannot mistake the cached pages of one volume for those of another.
"""


class Entries(Protocol):
    """The directory in which volumes appear."""

    def add_cached_file(self, name: str, inode: int, file: Volume) -> None:
        """Show a volume.

        Raises:
            ConfigError: the name cannot be a file's name, or is taken.
        """

    def remove_cached_file(self, inode: int) -> None:
        """Remove a volume from the directory."""


@dataclass(frozen=True, slots=True)
class KernelCache:
    """Notifications that make the kernel drop its cache. They block, and never raise for no entry.

    Attributes:
        forget_inode: drops the pages and attributes of an inode.
        forget_name: drops a name in the volumes' directory.
    """

    forget_inode: Callable[[int], None]
    forget_name: Callable[[str], None]


class Volumes:
    """All volumes of one worker.

    Args:
        cache: the store of their pages.
        entries: the directory in which they appear.
        kernel: drops the kernel's copies.
        mountpoint: our mount. No backing file may lie on it.
        page_size: bytes in a page.
        lanes: threads, one lane for each possible volume.
        most_waiting: requests of all volumes that may wait at once.
        left: the result of a predecessor's `remember`; {} for none.
        base: cumulative counters of a predecessor's volumes, by name.
    """

    def __init__(
        self,
        cache: Cleancache,
        entries: Entries,
        kernel: KernelCache,
        *,
        mountpoint: Path,
        page_size: int,
        lanes: Sequence[Lane],
        most_waiting: int,
        left: Mapping[str, Any],
        base: Mapping[str, Any],
    ) -> None:
        self._cache = cache
        self._entries = entries
        self._kernel = kernel
        self._mountpoint = mountpoint
        self._page_size = page_size
        self._lanes = tuple(lanes)
        self._places = Places(most_waiting, GATES * len(self._lanes))
        self._left = left
        self._base = base
        self._next = int(left.get("next", FIRST_INODE))
        self._seen: set[str] = set(left.get("seen", ()))
        self._volumes: dict[str, Volume] = {}
        self._nursery: trio.Nursery | None = None
        self._check_s = 1.0
        self._cutoff: int | None = None

    async def run(
        self,
        configured: Mapping[str, tuple[str, str]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run the volumes until cancelled.

        The volumes exist when this has started. Their backing files are looked at later.

        Args:
            configured: (path, mode) of each volume by name. A volume that a predecessor knew is
                restored as the predecessor left it.
            task_status: see trio.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for known in self._left.get("volumes", ()):
                signature = Signature(*known["signature"]) if known["signature"] else None
                self._make_or_complain(
                    known["name"], known["path"], known["mode"], known["inode"], signature
                )
            for name, (path, mode) in configured.items():
                if name not in self._seen:
                    self._seen.add(name)
                    self._make_or_complain(name, path, mode, None, None)
            task_status.started()
            await trio.sleep_forever()

    def _make_or_complain(
        self, name: str, path: str, mode: str, inode: int | None, signature: Signature | None
    ) -> None:
        try:
            volume = self._make(name, path, mode, inode=inode, signature=signature)
        except ZswapdError as error:
            log.error("cache volume %s is missing: %s", name, error)  # noqa: TRY400 - a reason, not a bug
            return
        assert self._nursery is not None
        self._nursery.start_soon(self._first_look, volume)

    @staticmethod
    async def _first_look(volume: Volume) -> None:
        """Report a bad backing file early. Requests would find it later too."""
        try:
            await volume.refresh()
        except VolumeError as error:
            if not volume.source.is_gone:
                log.warning("cache volume %s cannot be used yet: %s", volume.name, error)

    def apply(self, *, check_s: float, cutoff: int | None) -> None:
        """Apply settings to all volumes, present and future.

        Args:
            check_s: maximum seconds between two looks at a backing file in use.
            cutoff: bytes after which pages of a sequential stream are not kept; None for never.
        """
        self._check_s, self._cutoff = check_s, cutoff
        for volume in self._volumes.values():
            volume.source.check_s, volume.cutoff = check_s, cutoff

    # Commands.

    async def add(self, name: str, path: str, mode: str) -> Volume:
        """Make a volume. It can be opened when this returns.

        Raises:
            VolumeError: the backing file cannot be used, or the name or all lanes are in use.
            ConfigError: the name cannot be a file's name.
        """
        if mode not in MODES:
            raise VolumeError(f"there is no mode {mode!r}", hint=f"modes are: {', '.join(MODES)}")
        if not PurePosixPath(path).is_absolute() or "\0" in path:
            raise VolumeError(f"{path!r} is not an absolute path")
        volume = self._make(name, path, mode, inode=None, signature=None)
        try:
            await volume.source.look()
        except BaseException:
            self._discard(volume)
            raise
        return volume

    def _make(
        self, name: str, path: str, mode: str, *, inode: int | None, signature: Signature | None
    ) -> Volume:
        assert self._nursery is not None, "run() comes first"
        if name in self._volumes:
            raise VolumeError(
                f"there is a volume {name} already",
                hint=f"choose another name; or `zswapctl cache remove {name}` first",
            )
        used = [volume.lane for volume in self._volumes.values()]
        lane = next((lane for lane in self._lanes if lane not in used and lane.is_idle), None)
        if lane is None:
            raise VolumeError(
                f"there are threads for {len(self._lanes)} volumes, and all are in use",
                hint=(
                    "`zswapctl cache list` shows hanging backing files; or raise"
                    f" cache.max_volumes in the settings, then {restart_daemon()}"
                ),
            )
        is_inherited = inode is not None
        if inode is None:
            inode, self._next = self._next, self._next + 1
        volume = Volume(
            name,
            path,
            mode,
            inode=inode,
            cache=self._cache,
            lane=lane,
            places=self._places,
            mountpoint=self._mountpoint,
            nursery=self._nursery,
            tell_kernel=self._kernel.forget_inode,
            page_size=self._page_size,
            signature=signature,
            may_be_open=is_inherited,
        )
        try:
            self._entries.add_cached_file(name, inode, volume)
        except ZswapdError:
            volume.close()
            raise
        volume.source.check_s, volume.cutoff = self._check_s, self._cutoff
        self._volumes[name] = volume
        return volume

    async def remove(self, name: str) -> None:
        """Remove a volume. Programs that have it open get ESTALE.

        Raises:
            VolumeError: no volume has this name.
        """
        volume = self.find(name)
        self._discard(volume)
        # The notification takes locks in the kernel that a hanging reader may hold.
        with trio.move_on_after(1):
            await volume.lane.notices.run(self._kernel.forget_name, name, abandon=True)

    def _discard(self, volume: Volume) -> None:
        del self._volumes[volume.name]
        self._entries.remove_cached_file(volume.inode)
        volume.close()

    def find(self, name: str) -> Volume:
        """Return the volume of this name.

        Raises:
            VolumeError: no volume has this name.
        """
        if name not in self._volumes:
            names = f"volumes: {', '.join(self._volumes) or 'there are none'}"
            raise VolumeError(
                f"there is no volume {name}", hint=did_you_mean(name, self._volumes, names)
            )
        return self._volumes[name]

    def volumes(self) -> list[Volume]:
        """Return all volumes, oldest first."""
        return list(self._volumes.values())

    # State for a successor, and statistics.

    def remember(self) -> dict[str, Any]:
        """Return the volumes in JSON form. A successor restores them from it."""
        volumes = [
            {
                "name": volume.name,
                "path": volume.path,
                "mode": volume.mode,
                "inode": volume.inode,
                "signature": (
                    list(asdict(vouched).values()) if (vouched := volume.vouched) else None
                ),
            }
            for volume in self._volumes.values()
        ]
        return {"next": self._next, "seen": sorted(self._seen), "volumes": volumes}

    def statistics(self) -> tuple[VolumeStatistics, ...]:
        """Return a snapshot of each volume; its counters include those of earlier workers."""
        return tuple(
            counters.add(volume.statistics(), self._base.get(volume.name, {}))
            for volume in self._volumes.values()
        )


def make_lane(number: int, queue_depth: int) -> Lane:
    """Start the threads for one volume.

    Args:
        number: of the lane. The threads' names contain it, and the supervisor recognises them by
            name (supervisor/reaper.py).
        queue_depth: maximum of reads and writes of the volume under way.
    """
    return Lane(
        reads=Offload(f"volume{number}-read", queue_depth),
        checks=Offload(f"volume{number}-look"),
        notices=Offload(f"volume{number}-tell"),
        buffers=[_make_buffer() for _ in range(queue_depth)],
    )


def _make_buffer() -> mmap.mmap:
    """Return a buffer that is left out of core dumps.

    It is not touched here. The reads populate it in the kernel, without the GIL.
    """
    buffer = mmap.mmap(-1, RUN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_DONTDUMP)
    return buffer
