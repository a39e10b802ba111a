# SPDX-License-Identifier: GPL-2.0-or-later
"""The composition root of a worker: it makes the parts and connects them.

`build` makes every part from the settings, from the prepared threads and buffers of this process,
and from the resources that outlive a worker. Only this file knows both the concrete classes and the
configuration. Each part gets plain values. No function here awaits.

Invariants of the order:

- Poisoned memory of the shared state is replaced before it is read.
- A sign of life is given before the arena is read.
- Codecs are noted before a page can be stored with one.
"""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from zswapd import log as log_setup
from zswapd.config import with_files
from zswapd.core import crashpoints
from zswapd.core.core import Core, Inherited, store_codecs
from zswapd.core.reclaim.pressure import Pressure
from zswapd.core.reclaim.shrinker import Shrinker
from zswapd.errors import ConfigError
from zswapd.fuse import lowlevel
from zswapd.fuse.inodes import Directory
from zswapd.fuse.operations import Operations
from zswapd.fuse.session import Session
from zswapd.handover import costs
from zswapd.handover.areas import lost_copies_in, marks_bytes, marks_in, marks_of
from zswapd.handover.roster import Roster, original_names
from zswapd.handover.state import UPGRADE_WANTED, HookWord, Word
from zswapd.host.installation import restart_daemon
from zswapd.volumes import mounted
from zswapd.volumes.mounted import make_volumes
from zswapd.worker.client_files import ClientFiles
from zswapd.worker.cost import Cost
from zswapd.worker.disk import BackedPool
from zswapd.worker.emptying import identities, make_emptying
from zswapd.worker.files import add_files
from zswapd.worker.merging import Merging
from zswapd.worker.parent import Parent
from zswapd.worker.parts import Parts
from zswapd.worker.settings import FILES_BY, Settings
from zswapd.worker.shrink import Shrinking
from zswapd.worker.stop import Shutdown
from zswapd.worker.successor import StateSaver, restore
from zswapd.worker.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from zswapd.config import Config
    from zswapd.handover.resources import Resources
    from zswapd.handover.state import SharedState
    from zswapd.system.offload import Offload
    from zswapd.volumes.manager import Volumes
    from zswapd.worker.prepare import Prepared

log = logging.getLogger(__name__)

Built = tuple[Parts, StateSaver, ClientFiles]
NO_CEILING = 1 << 62
"""The cache's limit in frames until the shrinker has set a ceiling."""


def build(config: Config, prepared: Prepared, resources: Resources) -> Built:
    """Return the parts of a worker, the saver of their state, and the swap files that may change.

    Args:
        config: the configured settings.
        prepared: the protections, threads and buffers of this process.
        resources: the resources that outlive a worker.

    Raises:
        ArenaError: this program or these settings cannot read the arena.
    """
    state, parent = resources.state, Parent(resources.state, os.getppid())
    left = _refreshed(state)
    begun = state.words[Word.BEGUN] / 1e9 or time.monotonic()  # 0 if the supervisor predates 0.1.0
    parent.heartbeat()
    crashpoints.arm_from_environment(os.environ, state.words[Word.STARTED], is_takeover=True)
    roster, settings = _make_settings(config, state, left)
    current = settings.current
    state.note_codecs(store_codecs(current))
    disk = _make_disk(current, prepared, resources)
    core = _make_core(settings, parent, resources, disk, left, roster)
    directory, pressure = _make_directory(core, left, roster), Pressure()
    is_adopted = state.words[Word.STARTED] > 1 or state.hook_words[HookWord.INIT_SIZE] > 0
    session = _make_session(current, resources, disk, directory, is_adopted=is_adopted)
    cache = core.cache.cleancache if core.cache else None
    volumes = make_volumes(current, cache, directory, prepared.lanes, left) if cache else None
    transfers, handles = disk.transfers if disk else None, left if is_adopted else None
    session.hold_writes(core.store_memory, state.blame, wait_s=current.memory.refill_wait_ms / 1000)
    upkeep = _make_upkeep(current, prepared, core, pressure, disk, volumes)
    parts = Parts(
        settings=settings,
        parent=parent,
        cost=Cost(state, lambda: parent.pid if parent.is_alive() else 0),
        state=state,
        listener=resources.listener,
        core=core,
        session=session,
        directory=directory,
        volumes=volumes,
        disk=disk,
        pressure=pressure,
        upkeep=upkeep,
        shrinking=_make_shrinking(current, core, pressure, upkeep, left),
        shutdown=Shutdown(core, session, directory, state, prepared.swapoff_thread, parent.call),
        emptying=make_emptying(
            session, directory, core.devices, prepared.swapoff_thread, transfers, handles
        ),
        merging=_make_merging(
            core, session, directory, disk, prepared.swapoff_thread, left.get("merging", {})
        ),
        exporter=prepared.exporter,
        psi_thread=prepared.psi_thread,
        swapoff_thread=prepared.swapoff_thread,
        protections=prepared.protections,
        begun=begun,
        born=float(left.get("born", begun)),
        is_cold=prepared.is_cold,
    )
    return parts, _make_saver(parts, left), ClientFiles(parts, roster, config.swap_files())


def _make_settings(
    config: Config, state: SharedState, left: Mapping[str, Any]
) -> tuple[Roster, Settings]:
    """Return the swap files of the shared state, and the settings with these files."""
    kind = state.geometry.get("arena", {}).get("kind")
    roster = Roster(state, page_size=config.context.page_size, is_growable=kind == "tmpfs")
    sizes = {member.name: member.size for member in roster.members.values()}
    found = with_files(config, sizes, source=FILES_BY)
    return roster, Settings(found, left.get("settings", {}), config)


def _make_saver(parts: Parts, left: Mapping[str, Any]) -> StateSaver:
    """Return the saver of the parts' state, which the parts tell of each change."""
    # While an upgrade is wanted, the next supervisor has not yet read these settings.
    is_wanted = parts.state.words[Word.UPGRADE] == UPGRADE_WANTED
    saver = StateSaver(parts, left, checked=left.get("checked") if is_wanted else None)
    _connect(parts, saver)
    return saver


def _make_disk(config: Config, prepared: Prepared, resources: Resources) -> BackedPool | None:
    """Return the disk behind the pool; None without a backing."""
    if not prepared.disk:
        return None
    return BackedPool(config, resources.state, resources.backing, prepared.disk)


def _connect(parts: Parts, saver: StateSaver) -> None:
    """Have each part save its state after a change, and apply its settings."""
    parts.merging.when_changed = saver.save_state
    parts.session.operations.writers.when_changed = saver.save_state
    settings, core = parts.settings, parts.core
    settings.when_applied = saver.save_state
    settings.register_check(_check_cache)
    settings.register_check(
        lambda old, new: costs.check_change(old, new, marked=core.recompression.is_prepared)
    )
    settings.register(
        lambda config: parts.state.note_codecs(store_codecs(config)),
        core.apply,
        lambda config: parts.session.set_poll_us(config.fuse.poll_us),
        lambda config: parts.session.set_refill_wait(config.memory.refill_wait_ms / 1000),
        lambda config: log_setup.set_level(config.log.level),
    )
    if parts.disk:
        disk = parts.disk
        settings.register(lambda config: disk.set_poll_us(config.fuse.poll_us))
    if parts.volumes:
        settings.register(partial(mounted.apply, parts.volumes))
    if parts.shrinking and core.cache:
        shrinker, eviction = parts.shrinking.shrinker, core.cache.eviction

        def bound_shrinker(_config: Config) -> None:
            shrinker.limit_frames = eviction.limit_frames

        settings.register(bound_shrinker)


def add_setting_files(parts: Parts, saver: StateSaver) -> None:
    """Put `stats` and `params` into the mount."""
    settings = parts.settings
    first = saver.statistics(ages_sampled=False)
    add_files(parts.directory, first, saver.snapshot, lambda: settings.current, settings.change)


def _refreshed(state: SharedState) -> dict[str, Any]:
    """Replace poisoned pages of the shared state by other memory; return the saved document."""
    if renewed := state.refresh():
        log.error(
            "%d pages of the shared state had an uncorrectable error: other memory replaces them",
            renewed,
        )
    return state.load()


def _make_directory(core: Core, left: Mapping[str, Any], roster: Roster) -> Directory:
    """Return the directory of the mount, with the block files."""
    directory = Directory(born_ns=int(left.get("born_ns", time.time_ns())))
    for device in core.devices.values():
        directory.add_block_file(device, roster.members[device.name].inode)
    return directory


def _check_cache(old: Config, new: Config) -> None:
    """Refuse to switch the cache on or off.

    Raises:
        ConfigError: `new` switches the cache on or off.
    """
    if (new.cache.limit is None) != (old.cache.limit is None):
        raise ConfigError(
            "cache.limit cannot switch the cache on or off while the daemon runs",
            hint=f"set it in the config file, then {restart_daemon()}",
        )


def _make_core(
    settings: Settings,
    parent: Parent,
    resources: Resources,
    disk: BackedPool | None,
    left: Mapping[str, Any],
    roster: Roster,
) -> Core:
    """Return the core, rebuilt from the arena. A first worker's arena is empty."""
    state, configured = resources.state, settings.configured

    def add_marks() -> Mapping[str, memoryview]:
        """Add the marks of recompression to the shared state, for later workers too; it blocks.

        Return {} if the memory behind the areas belongs to files that came later.
        """
        if roster.is_changed:
            return {}
        return marks_of(state.extend(sum(marks_bytes(configured).values())), configured)

    lost, copies = roster.bitmaps()
    # The marks of the start, and memory that was added for marks, are in the order of its files.
    extension = memoryview(b"") if roster.is_changed else state.extension
    originals = original_names(state.geometry)
    inherited = Inherited(
        resources.arena,
        {**_of(originals, state.lost()), **lost},
        _of(originals, marks_in(state.areas)) or marks_of(extension, configured),
        left.get("core", {}),
        parent.heartbeat,
        add_marks,
        {**_of(originals, lost_copies_in(state.areas)), **copies},
        state.geometry.get("arena"),
        {member.name: member.swap_type for member in roster.members.values()},
        roster.made,
    )
    core = Core(settings.current, inherited=inherited, backing=disk.backing if disk else None)
    restore(core, left)
    return core


def _of(names: Collection[str], memory: Mapping[str, memoryview]) -> dict[str, memoryview]:
    return {name: area for name, area in memory.items() if name in names}


def _make_session(
    config: Config,
    resources: Resources,
    disk: BackedPool | None,
    directory: Directory,
    *,
    is_adopted: bool,
) -> Session:
    """Return the session that serves the files of the directory."""
    page_size = config.context.page_size
    hook: Any = lowlevel
    return Session(
        (
            disk.operations(directory, page_size)
            if disk
            else Operations(directory, page_size=page_size, takes_part=hook.takes_part)
        ),
        resources.mount,
        poll_us=config.fuse.poll_us,
        shared=resources.state.hook,
        adopt=is_adopted,
        resend=not os.environ.get("ZSWAPD_NO_RESEND"),  # for tests, as ZSWAPD_CRASH is
    )


def _make_merging(
    core: Core,
    session: Session,
    directory: Directory,
    disk: BackedPool | None,
    swapoff_thread: Offload,
    left: Mapping[str, Any],
) -> Merging:
    """Return the task that switches request merging off while a page cannot be read."""
    return Merging(
        list(core.devices.values()),
        [session.mountpoint / name for name in core.devices],
        identities=partial(identities, session, directory),
        swapoff_thread=swapoff_thread,
        is_prompt=disk.transfers.is_prompt if disk else lambda: True,
        left=left,
    )


def _make_upkeep(
    config: Config,
    prepared: Prepared,
    core: Core,
    pressure: Pressure,
    disk: BackedPool | None,
    volumes: Volumes | None,
) -> Upkeep:
    """Return the tasks that refill reserves and keep house."""
    return Upkeep(
        core,
        prepared.offload,
        yields=config.service.scheduling != "normal",
        has_small_heaps=prepared.has_small_heaps,
        needs_large_heaps=lambda: bool(disk or (volumes and volumes.volumes())),
        limits=pressure.limits,
    )


def _make_shrinking(
    config: Config, core: Core, pressure: Pressure, upkeep: Upkeep, left: Mapping[str, Any]
) -> Shrinking | None:
    """Return the task that shrinks the cache; None without a cache."""
    if core.cache is None:
        return None
    frames, context = core.frames, config.context
    shrinker = Shrinker(
        core.cache.eviction,
        lambda: frames.ephemeral_frames,
        total_frames=context.memory_total // context.page_size,
        limit_frames=core.cache.eviction.limit_frames,
    )
    shrinker.recall(int(left.get("ceiling", NO_CEILING)))
    return Shrinking(pressure, shrinker, partial(upkeep.trim, all_of_it=True))
