# SPDX-License-Identifier: GPL-2.0-or-later
"""Volumes in the mount: `cache/NAME`, and the notifications of the kernel about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zswapd.fuse.session import MOST_WAITING, forget_inode, forget_name
from zswapd.paths import without_links
from zswapd.volumes.manager import KernelCache, Volumes, make_lane

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zswapd.config import Config
    from zswapd.core.frontends.cleancache import Cleancache
    from zswapd.fuse.inodes import Directory
    from zswapd.volumes.source import Lane
    from zswapd.volumes.volume import Volume

DIRECTORY = "cache"


class VolumeDirectory:
    """The directory `cache` of the mount, with one file for each volume.

    Args:
        directory: the root of the mount.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._inode = directory.add_directory(DIRECTORY)

    def add_cached_file(self, name: str, inode: int, file: Volume) -> None:
        """Show a volume (see `manager.Entries`)."""
        self._directory.add_cached_file(self._inode, name, inode, file)

    def remove_cached_file(self, inode: int) -> None:
        """Remove a volume from the directory."""
        self._directory.remove(inode)

    def forget(self, name: str) -> None:
        """Make the kernel forget a volume's name; blocks."""
        forget_name(self._inode, name)


def make_lanes(config: Config) -> tuple[Lane, ...]:
    """Start the threads for the maximum number of volumes."""
    if config.cache.limit is None:
        return ()
    return tuple(
        make_lane(number, config.cache.queue_depth) for number in range(config.cache.max_volumes)
    )


def make_volumes(
    config: Config,
    cache: Cleancache,
    directory: Directory,
    lanes: Sequence[Lane],
    left: Mapping[str, Any],
) -> Volumes:
    """Return the volumes of a worker, empty at first.

    Args:
        config: the settings.
        cache: the store of their pages.
        directory: the root of the mount.
        lanes: the result of `make_lanes`.
        left: the predecessor's state: `volumes`, and their counters as `volume_counters`.
    """
    entries = VolumeDirectory(directory)
    volumes = Volumes(
        cache,
        entries,
        KernelCache(forget_inode, entries.forget),
        mountpoint=without_links(config.fuse.mountpoint),
        page_size=config.context.page_size,
        lanes=lanes,
        most_waiting=MOST_WAITING,
        left=left.get("volumes", {}),
        base=left.get("volume_counters", {}),
    )
    apply(volumes, config)
    return volumes


def apply(volumes: Volumes, config: Config) -> None:
    """Apply the settings that can change at run time."""
    volumes.apply(check_s=config.cache.check_ms / 1000, cutoff=config.cache.sequential_cutoff)


def configured(config: Config) -> dict[str, tuple[str, str]]:
    """Return the (path, mode) of each configured volume by name."""
    parted = {name: written.partition(":") for name, written in config.cache.volumes.items()}
    return {name: (path, mode) for name, (mode, _, path) in parted.items()}
