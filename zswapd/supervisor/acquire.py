# SPDX-License-Identifier: GPL-2.0-or-later
"""The estate: everything that a worker leaves to the next one, as open files. Whoever holds them can take over.

    fuse       the connection of the mount; requests wait in the kernel while nobody reads them
    arena      every stored page (core/allocators/arena.py)
    state      request buffer, settings changed at run time, counters, lost pages (handover/state.py)
    socket     the listening control socket, and its lock; clients wait in its queue

A supervisor has them from one of three sources, tried in this order: the program that it replaces
in the same process (upgrade in place: by environment), a worker whose supervisor is dead
(orphan.py: over the control socket; unresponsive.py: out of that process), the service manager's
file descriptor store (after both have died, or the worker does not answer). If there is none, it
makes them.

Invariant: a file that is not adopted stays open with its holder; nothing is written until all of them were found to fit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zswapd.config.loader import memory_total
from zswapd.config.shapes import differences
from zswapd.control.listener import Listener
from zswapd.core import core, recompressing
from zswapd.core.allocators.arena import READABLE_LAYOUTS
from zswapd.core.sizing import label, lost_bitmap_bytes, make_arena, parsed_label
from zswapd.errors import HandoverError
from zswapd.fuse.mount import MAX_IO, Mount
from zswapd.handover import costs, geometry
from zswapd.handover.state import READABLE_LAYOUTS as STATE_LAYOUTS
from zswapd.handover.state import HookWord, SharedState
from zswapd.host.installation import look_into_log, restart_daemon
from zswapd.swapdevice.state import left_on
from zswapd.worker import disk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config

log = logging.getLogger(__name__)

NAMES = ("fuse", "arena", "state", "socket", "lock", "backing")
"""The descriptors, in the order in which they are sent; `backing` is there if one is configured."""
STORED = ("fuse", "arena", "state", "backing")
"""Those that the service manager keeps: without the other two, a new socket is made."""
_ENVIRONMENT = "ZSWAPD_ESTATE"
_STORE_PREFIX = "zswapd-"


@dataclass(frozen=True, slots=True)
class Estate:
    """All that outlives a worker."""

    mount: Mount
    listener: Listener
    state: SharedState
    arena: int
    backing: int
    """The disk behind the pool, -1 for none."""
    is_new: bool
    """Nobody has served it yet."""
    made: Path | None = None
    """The file behind the pool, if it was made along with the rest."""

    def descriptors(self) -> dict[str, int]:
        """Return the open files by name, in the order of NAMES."""
        listening, lock = self.listener.descriptors()
        descriptors = (self.mount.descriptor, self.arena, self.state.fd, listening, lock, self.backing)
        return {name: fd for name, fd in zip(NAMES, descriptors, strict=True) if fd >= 0}

    def close(self) -> None:
        """Unmount, remove the socket, give the memory back: the end of what was stored.

        A file behind the pool stays, unless it was made for this and no request has ever come.
        """
        is_unused = not self.state.hook_words[HookWord.REQUESTS]
        with contextlib.ExitStack() as steps:  # each is done whatever becomes of those before it
            if self.backing >= 0:
                steps.callback(os.close, self.backing)
            if self.made is not None and is_unused:
                steps.callback(self.made.unlink, missing_ok=True)
            steps.callback(os.close, self.arena)
            steps.callback(self.state.close)
            steps.callback(self.listener.close)
            steps.callback(self.mount.close)


class Left(NamedTuple):
    """An estate whose supervisor is no more."""

    files: dict[str, int]
    """The descriptors by name."""
    worker: int
    """Process id of the worker that serves it; 0 if both are dead, or nobody said."""


def check_geometry(config: Config, running: Mapping[str, Any]) -> None:
    """Refuse to take over what this configuration does not describe.

    Raises:
        HandoverError: naming what differs.
    """
    ours = geometry.of(config)
    # What older programs do not say of themselves; the arena's label has some of it all the same.
    unsaid = {key: ours[key] for key in ("max_zspage_frames", "fuse.hook", "control.socket")}
    running = {"allocator": "zsmalloc", **unsaid} | dict(running)
    known = (*ours, "backing")
    # Files have numbers by their order, which stand in every header of a page.
    found = differences({key: running[key] for key in known if key in running}, ours)
    if found:
        raise HandoverError(
            f"the running daemon's {'; '.join(found)}",
            hint=f"put the old value back, or swap off to change it: {restart_daemon()}",
        )


def check(config: Config, running: str) -> None:
    """Say whether this program, with this configuration, can take over from a running one.

    Args:
        config: the settings that it would run with.
        running: what `daemon.identity` said of the running program, as JSON.

    Raises:
        HandoverError: it cannot, or cannot tell; the message says why.
    """
    try:
        identity = json.loads(running)
        layouts = (identity["arena_layout"], identity["state_layout"])
        shape = dict(identity["geometry"])
    except (ValueError, KeyError, TypeError) as error:
        raise HandoverError("what the running daemon says of itself makes no sense", hint="use `zswapctl upgrade`") from error
    for what, theirs, ours in zip(("arena", "shared state"), layouts, (READABLE_LAYOUTS, STATE_LAYOUTS), strict=True):
        if theirs not in ours:
            raise HandoverError(
                f"the running daemon's {what} has layout {theirs}, the installed program knows {ours}",
                hint=f"when there is time to swap off: {restart_daemon()}",
            )
    check_geometry(config, shape)
    made_for, wanted = identity.get("arena_label"), label(config).decode()
    if made_for is not None and made_for != wanted:  # older programs do not say
        found = "; ".join(differences(parsed_label(made_for), parsed_label(wanted)))
        raise HandoverError(
            f"the running daemon's arena is for other settings: {found}",
            hint=f"put the old values back, or swap off to change them: {restart_daemon()}",
        )


def memory_of(running: str) -> int:
    """Return what 100 % is for a running daemon, bytes: its swap files keep their sizes.

    Older ones go by MemTotal.

    Args:
        running: see `check`.
    """
    try:
        return int(json.loads(running)["memory_total"])
    except (ValueError, KeyError, TypeError):
        return memory_total()


def make(config: Config) -> Estate:
    """Make everything anew.

    Raises:
        AlreadyRunningError: another daemon has the control socket.
        ArenaError: the kernel gives no memory, or there is less than the settings take.
        ConfigError: the settings take more memory than this machine has.
        BackingError: the disk behind the pool cannot be used.
        MountError, PermissionsError: the files cannot be mounted. In all cases everything is as before.
    """
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(Listener(config.control.socket))
        costs.check(config)
        store = config.backing.path.resolve() if config.backing.path else None
        is_new = store is not None and not store.exists()
        backing = disk.open_backing(config)
        if backing >= 0:
            undo.callback(os.close, backing)
        if store is not None and is_new:
            undo.callback(store.unlink)
        arena, description = _new_arena(config)
        undo.callback(os.close, arena)
        mount = undo.enter_context(Mount(config.fuse.mountpoint, left_on=left_on))
        shape = {
            **geometry.of(config),
            "made": [str(path) for path in mount.made],
            "device": mount.device,
            "arena": description,
        }
        areas = {**core.areas(config), **disk.areas(config), **recompressing.areas(config)}
        state = SharedState.new(shape, lost=lost_bitmap_bytes(config), max_io=MAX_IO, kind=config.memory.arena, areas=areas)
        undo.callback(state.close)
        if backing >= 0:
            disk.make_key(state)
        estate = Estate(mount, listener, state, arena, backing, is_new=True, made=store if is_new else None)
        undo.pop_all()
    return estate


def _new_arena(config: Config) -> tuple[int, dict[str, Any]]:
    """Make the arena; return its file and its description, and let go of all else.

    The supervisor never looks into the arena.
    """
    arena = make_arena(config)
    try:
        return os.dup(arena.fd), arena.description()
    finally:
        arena.close()


def adopt(config: Config, descriptors: Mapping[str, int], *, seize: bool = False) -> Estate:
    """Take over what another process has served; the descriptors belong to the estate from then on.

    Args:
        config: the settings.
        descriptors: the files by name.
        seize: take the control socket although a worker that is dead, or as good as that, has it open.

    Raises:
        HandoverError: it is of another layout or shape.
        AlreadyRunningError: there is a supervisor, or without `socket` among the descriptors, a worker.
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
    mount.adopt(descriptors["fuse"], [Path(path) for path in state.geometry["made"]], state.geometry.get("device", 0))
    return Estate(mount, listener, state, descriptors["arena"], descriptors.get("backing", -1), is_new=False)


def leave_in_environment(estate: Estate, worker: int) -> dict[str, str]:
    """Return the environment for the program that takes this process' place, and let it inherit the files."""
    descriptors = estate.descriptors()
    for descriptor in descriptors.values():
        os.set_inheritable(descriptor, True)  # noqa: FBT003 - the system call
    return {**os.environ, _ENVIRONMENT: json.dumps({"pid": os.getpid(), "worker": worker, "files": descriptors})}


def become_installed(estate: Estate, worker: int) -> None:
    """Become the installed program, which takes over estate and worker; return only if it cannot be started."""
    environment = leave_in_environment(estate, worker)
    try:
        os.execve(sys.executable, sys.orig_argv, environment)  # noqa: S606 - the same program, newer
    except OSError as error:
        log.error("the installed program cannot be started: %s", error.strerror)  # noqa: TRY400 - a reason, not a bug
        for descriptor in estate.descriptors().values():
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call


def left_behind() -> Left | None:
    """Return what there is to take over without asking anybody, None if there is nothing."""
    return from_environment() or from_service_manager()


def from_environment() -> Left | None:
    """Return what this process was left with before it became this program."""
    text = os.environ.pop(_ENVIRONMENT, "")
    if not text:
        return None
    left = json.loads(text)
    if left["pid"] != os.getpid():
        return None
    for descriptor in left["files"].values():
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call
    return Left(left["files"], left["worker"])


def from_service_manager() -> Left | None:
    """Return what systemd kept for us, None if there is nothing or not all.

    The protocol of sd_listen_fds(3): descriptors from 3 on, names in LISTEN_FDNAMES, meant for LISTEN_PID only.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    if pid != str(os.getpid()) or not count.isdecimal():
        return None
    given = {name.removeprefix(_STORE_PREFIX): 3 + number for number, name in enumerate(names[: int(count)])}
    for descriptor in range(3, 3 + int(count)):
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the system call
    if not set(STORED) - {"backing"} <= set(given):
        return None
    return Left({name: given[name] for name in STORED if name in given}, 0)


def stored_name(name: str) -> str:
    """Return the name under which the service manager keeps a descriptor."""
    return _STORE_PREFIX + name
