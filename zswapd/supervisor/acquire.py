# SPDX-License-Identifier: GPL-2.0-or-later
"""Find the resources of a supervisor: take them over from another process, or make them.

The sources, in this order:

1. the program that this program replaces in the same process, or the service manager's file
   descriptor store (inheritance.py);
2. an orphaned worker: over the control socket (orphan.py), or, if the worker does not answer, by
   copying its open files (unresponsive.py);
3. new resources, if there are none to take over.

Invariant: nothing is written until all files are found to fit. Files that do not fit stay open in
the process that holds them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zswapd.control.listener import Listener, supervisor_of
from zswapd.core.allocators.segment import Segment
from zswapd.core.sizing import lost_bitmap_bytes, make_arena
from zswapd.errors import AlreadyRunningError, HandoverError, ZswapdError
from zswapd.fuse.mount import MAX_IO, Mount
from zswapd.handover import costs
from zswapd.handover.areas import all_areas
from zswapd.handover.geometry import check_geometry, describe_geometry
from zswapd.handover.key import make_key
from zswapd.handover.resources import Resources
from zswapd.handover.state import SharedState, Word
from zswapd.host.installation import look_into_log
from zswapd.supervisor import orphan, unresponsive
from zswapd.supervisor.backing import open_backing
from zswapd.swapdevice.state import left_on

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config
    from zswapd.handover.resources import InheritedFiles

log = logging.getLogger(__name__)


def find_resources(config: Config, left: InheritedFiles | None) -> tuple[Resources, int]:
    """Take over the resources that exist, or make new ones.

    After an exception, the worker that serves goes on serving.

    Args:
        config: the settings.
        left: the files that this process has inherited; None if there are none.

    Returns:
        The resources, and the process id of the worker that serves them. The process id is 0 if no
        worker lives.

    Raises:
        AlreadyRunningError: a supervisor lives.
        ZswapdError: the resources can be neither taken over nor made.
    """
    if left is not None and left.worker:
        return adopt_resources(config, left.files), left.worker
    try:
        return (
            _counted(adopt_resources(config, left.files)) if left else make_resources(config)
        ), 0
    except AlreadyRunningError as refusal:
        # A worker lives. It has the stored files, and the control socket.
        stored = left.files if left else {}
        patience = min(config.service.hang_timeout or orphan.ANSWER_S, orphan.ANSWER_S)
        try:
            descriptors, worker = orphan.inherit(config.control.socket, limit=patience)
        except TimeoutError:
            if supervisor_of(config.control.socket):
                raise refusal from None
            return _take_from_the_silent(config, stored), 0
        except ZswapdError:
            raise refusal from None
    for descriptor in stored.values():
        os.close(descriptor)
    resources = adopt_resources(config, descriptors)
    # Between the worker's answer and our claim, another program may have taken over and died.
    worker = unresponsive.living_worker(resources.state) or worker
    log.info("worker %d has lost its supervisor: taking over", worker)
    return resources, worker


def _counted(resources: Resources) -> Resources:
    """Count the death of an orphan."""
    resources.state.words[Word.DEATHS] += 1
    return resources


def _take_from_the_silent(config: Config, stored: dict[str, int]) -> Resources:
    """End an orphaned worker that does not answer; return the resources that it served."""
    if not stored:
        descriptors, worker = unresponsive.take_descriptors(config.control.socket)
        resources = adopt_resources(config, descriptors)
        unresponsive.end(worker)
        return _counted(resources)
    if worker := unresponsive.worker_in(stored["state"]):
        unresponsive.end(worker)
    return _counted(adopt_resources(config, stored, seize=True))


def make_resources(config: Config) -> Resources:
    """Make new resources. After an exception, the system is as before.

    Raises:
        AlreadyRunningError: another daemon has the control socket.
        ArenaError: the kernel gives no memory, or less than the settings need.
        ConfigError: the settings need more memory than this machine has.
        BackingError: the disk behind the pool cannot be used.
        MountError: the files cannot be mounted.
        PermissionsError: this process may not mount the files.
    """
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(Listener(config.control.socket))
        costs.check(config)
        log.info("memory before the first page: %s", costs.summed(costs.at_start(config)))
        store = config.backing.path.resolve() if config.backing.path else None
        is_new = store is not None and not store.exists()
        backing = open_backing(config)
        if backing >= 0:
            undo.callback(os.close, backing)
        if store is not None and is_new:
            undo.callback(store.unlink)
        arena, segment, description = _new_arena(config)
        undo.callback(os.close, arena)
        mount = undo.enter_context(Mount(config.fuse.mountpoint, left_on=left_on))
        shape = {
            **describe_geometry(config),
            "made": [str(path) for path in mount.made],
            "device": mount.device,
            "arena": description,
        }
        state = SharedState.new(
            shape,
            lost=lost_bitmap_bytes(config),
            max_io=MAX_IO,
            kind=config.memory.arena,
            areas=all_areas(config),
        )
        undo.callback(state.close)
        if backing >= 0:
            make_key(state)
        resources = Resources(
            mount,
            listener,
            state,
            arena,
            backing,
            is_new=True,
            made=store if is_new else None,
            segment=segment,
        )
        undo.pop_all()
    return resources


def _new_arena(config: Config) -> tuple[int, Segment | None, dict[str, Any]]:
    """Make the arena; return its file, the attachment that keeps it locked, and its description.

    The mapping is closed, because the supervisor never reads the arena.
    """
    arena = make_arena(config)
    try:
        return os.dup(arena.fd), Segment.find(arena.fd), arena.description()
    finally:
        arena.close()


def adopt_resources(
    config: Config, descriptors: Mapping[str, int], *, seize: bool = False
) -> Resources:
    """Take over the files that another process has served.

    The descriptors then belong to the resources.

    Args:
        config: the settings.
        descriptors: the files by name.
        seize: take the control socket, although a dead or unresponsive worker has it open.

    Raises:
        HandoverError: the files have another layout or geometry.
        AlreadyRunningError: a supervisor lives. Without `socket` among the descriptors, also: a
            worker lives.
    """
    state = SharedState(descriptors["state"])
    check_geometry(config, state.geometry)
    if config.backing.path and "backing" not in descriptors:
        raise HandoverError("the disk behind the pool was not handed over", hint=look_into_log())
    listener = Listener(config.control.socket)
    if "socket" in descriptors:
        listener.adopt(descriptors["socket"], descriptors["lock"])
    elif seize:
        listener.seize()
    else:
        listener.open()
    mount = Mount(config.fuse.mountpoint)
    mount.adopt(
        descriptors["fuse"],
        [Path(path) for path in state.geometry["made"]],
        state.geometry.get("device", 0),
    )
    arena = descriptors["arena"]
    return Resources(
        mount,
        listener,
        state,
        arena,
        descriptors.get("backing", -1),
        is_new=False,
        segment=Segment.find(arena),
    )
