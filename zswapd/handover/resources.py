# SPDX-License-Identifier: GPL-2.0-or-later
"""Resources: all that outlives a worker, as open files. The process that holds them can take over.

fuse       the connection of the mount; requests wait in the kernel while no process reads them
arena      every stored page (core/allocators/arena.py)
state      request buffer, settings changed at run time, counters, lost pages (handover/state.py)
socket     the listening control socket, and its lock; clients wait in its queue
backing    the file or device behind the pool, if one is configured
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from zswapd.handover.state import HookWord

if TYPE_CHECKING:
    from pathlib import Path

    from zswapd.control.listener import Listener
    from zswapd.core.allocators.segment import Segment
    from zswapd.fuse.mount import Mount
    from zswapd.handover.state import SharedState

NAMES: Final = ("fuse", "arena", "state", "socket", "lock", "backing")
"""The descriptors, in the order in which they are sent."""
STORED: Final = ("fuse", "arena", "state", "backing")
"""The descriptors that the service manager keeps. Socket and lock are made again without it."""


@dataclass(frozen=True, slots=True)
class Resources:
    """All that outlives a worker.

    Attributes:
        mount: the mount of the files.
        listener: the control socket.
        state: the shared state.
        arena: descriptor of the arena.
        backing: descriptor of the disk behind the pool; -1 for none.
        is_new: no worker has served the resources yet.
        made: path of the file behind the pool, if this start has made it; else None.
        segment: the attachment that keeps the arena locked, before Linux 6.4; else None.
    """

    mount: Mount
    listener: Listener
    state: SharedState
    arena: int
    backing: int
    is_new: bool
    made: Path | None = None
    segment: Segment | None = None

    def descriptors(self) -> dict[str, int]:
        """Return the open files by name, in the order of NAMES."""
        listening, lock = self.listener.descriptors()
        descriptors = (
            self.mount.descriptor,
            self.arena,
            self.state.fd,
            listening,
            lock,
            self.backing,
        )
        return {name: fd for name, fd in zip(NAMES, descriptors, strict=True) if fd >= 0}

    def close(self) -> None:
        """Unmount, remove the socket, and free the memory with all stored pages.

        A file behind the pool stays, unless this start has made it and no request has come.
        """
        is_unused = not self.state.hook_words[HookWord.REQUESTS]
        with contextlib.ExitStack() as steps:  # each step runs even if one before it fails
            if self.backing >= 0:
                steps.callback(os.close, self.backing)
            if self.made is not None and is_unused:
                steps.callback(self.made.unlink, missing_ok=True)
            steps.callback(os.close, self.arena)
            steps.callback(self.state.close)
            steps.callback(self.listener.close)
            steps.callback(self.mount.close)


class InheritedFiles(NamedTuple):
    """Resources of a dead supervisor, or of the program that this process ran before."""

    files: dict[str, int]
    """The descriptors by name."""
    worker: int
    """Process id of the worker that serves them; 0 if it is dead too, or unknown."""
