# SPDX-License-Identifier: GPL-2.0-or-later
"""The worker's part of the disk behind the pool: threads, buffers, and the tasks of writeback.

These outlive a worker: the file's descriptor, which is locked and open for the daemon alone, and in
the shared state the key, the claims, and for each swap file a map of the pages that are in their
slots.

Invariant: the key is made once, and only the shared state has it. When the last process that has
the shared state is dead, no process can decrypt the disk.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from zswapd.core.backing._disk import Cipher, Queue
from zswapd.core.backing.lifeline import Lifeline
from zswapd.core.backing.store import SlotStore, make_buffers
from zswapd.core.backing.transfers import RUN_MAX, Transfers
from zswapd.core.disk import CoreDisk
from zswapd.fuse import lowlevel
from zswapd.fuse.deferred import BackedOperations
from zswapd.fuse.mount import MAX_IO
from zswapd.handover.areas import BACKING_CLAIMS, SLOTS, WITNESS
from zswapd.handover.key import find_key
from zswapd.handover.roster import made_files, original_names
from zswapd.system import set_normal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zswapd.config import Config
    from zswapd.control.protocol import BackingReport
    from zswapd.core.core import Core, CoreStatistics
    from zswapd.fuse.inodes import Directory
    from zswapd.handover.state import SharedState

log = logging.getLogger(__name__)

THREAD = "backing"
"""Name of the threads that wait for the disk."""
LOOK_S = 0.1
"""Time, s, between two looks for pages to write back."""
BUSY_LOOK_S = 0.02
"""The same, s, while the pool is in use. At 200 MiB/s, the pool gets 1000 pages in this time."""
PAUSE_S = 0.002
"""Pause, s, while no write can begin. A few requests end in this time."""
ALONE_LOOK_S, ALONE_LOOK_MAX_S = 0.005, 0.5
"""Shortest and longest time, s, between two looks for threads of dead processes that still write.

Requests wait for the end of these threads.
"""
AHEAD = 64
"""Read-ahead of a sequential reader, in pages.

A virtual disk takes 0.2 ms for a read. A reader consumes about 64 pages in this time.
"""
SPIN_NS = 200_000
"""Longest busy wait of a thread for the next read, ns.

A reader sends its next read within about 50 µs, unless the event loop runs other tasks.
"""
COMPACT_TURNS = 16
"""Steps of writeback between two looks for zspages to compact."""


@dataclass(frozen=True, slots=True)
class DiskThreads:
    """The threads and buffers for the disk, made before the worker serves.

    Attributes:
        queue: requests to the disk, which the threads execute.
        buffers: memory for pages in transfer.
        lanes: for each thread, a buffer of the longest request, in which it encrypts; empty without
            encryption.
    """

    queue: Queue
    buffers: memoryview
    lanes: tuple[memoryview, ...]


def prepare(config: Config) -> DiskThreads | None:
    """Make and return threads and buffers; return None without a backing."""
    if not config.backing.path:
        return None
    threads, page_size = config.backing.threads, config.context.page_size
    lanes = (
        make_buffers(RUN_MAX * page_size, page_size)
        for _ in range(threads if config.backing.encrypt else 0)
    )
    queue = Queue()
    for _ in range(threads):
        threading.Thread(target=_work, args=(queue,), daemon=True).start()
    return DiskThreads(queue, make_buffers(config.backing.buffers, page_size), tuple(lanes))


def _work(queue: Queue) -> None:
    """Execute requests in this thread; never return."""
    with contextlib.suppress(OSError):
        Path("/proc/thread-self/comm").write_text(THREAD)
    set_normal()
    queue.work()


class BackedPool:
    """The disk behind the pool of one worker.

    Args:
        config: the settings.
        state: the shared state.
        fd: the descriptor that `open_backing` has returned; not -1.
        prepared: the threads and buffers of this process.

    Attributes:
        backing: the disk as the core uses it.
        fd: as above.
        transfers: reads and writes slots.

    Raises:
        BackingError: the key is not valid.
    """

    def __init__(self, config: Config, state: SharedState, fd: int, prepared: DiskThreads) -> None:
        self.fd = fd
        self._lowlevel: Any = lowlevel
        page_size = config.context.page_size
        self._lifeline = Lifeline(state.fd)
        self._state = state
        self._queue = prepared.queue
        self.set_poll_us(config.fuse.poll_us)
        cipher = Cipher(find_key(state), prepared.lanes) if config.backing.encrypt else None
        self.transfers = Transfers(
            SlotStore(fd, page_size, cipher),
            self._queue.submit,
            page_size=page_size,
            buffers=prepared.buffers,
            depth=config.backing.threads,
            claims=state.area(BACKING_CLAIMS).cast("Q"),
        )
        originals, first = original_names(state.geometry), 0
        bases: dict[str, int] = {}
        for name, size in made_files(state.geometry).items():
            bases[name], first = first, first + size // page_size
        maps: Mapping[str, memoryview] = {
            name: state.area(SLOTS + name) for name in config.swap_files() if name in originals
        }
        witnesses = {
            name: area for name in maps if (area := state.areas.get(WITNESS + name)) is not None
        }
        self.backing = CoreDisk(self.transfers, maps, witnesses, bases)
        self._operations: BackedOperations | None = None
        self._release()

    def set_poll_us(self, poll_us: int) -> None:
        """Bound the threads' busy wait by the hook's busy wait for the next request."""
        self._queue.spin_ns = min(poll_us * 1000, SPIN_NS)

    def report(self, config: Config, core: CoreStatistics) -> BackingReport:
        """Return the disk's part of `zswapctl status`."""
        writeback = core.writeback
        return {
            "path": str(config.backing.path),
            "pages": sum(device.bd_count for device in core.backed),
            "encrypted": config.backing.encrypt,
            "trouble": self.transfers.trouble,
            "budget_left": (
                writeback.budget_left_bytes if writeback and writeback.budget_bytes else None
            ),
        }

    def operations(self, directory: Directory, page_size: int) -> BackedOperations:
        """Return the request handlers for the files of a mount."""
        hook = self._lowlevel

        self._operations = BackedOperations(
            directory,
            page_size=page_size,
            transfers=self.transfers,
            unique=hook.unique,
            reply=hook.reply,
            blame=self._state.blame,
            max_io=MAX_IO,
            takes_part=hook.takes_part,
            ahead=AHEAD * page_size,
        )
        return self._operations

    async def run(self, core: Core) -> None:
        """Take the disk's answers, and write pages back when there is a reason; never return."""
        self._lowlevel.on_disk_ready(self._queue.fd, self._disk_ready)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer)
            nursery.start_soon(self._write_back, core)
            nursery.start_soon(self._await_the_dead)

    async def _answer(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._queue.fd)
            self._disk_ready()

    @trio.lowlevel.enable_ki_protection
    def _disk_ready(self) -> None:
        """Run the callbacks of requests that have ended."""
        for done, code in self._queue.ended():
            done(code)

    async def _write_back(self, core: Core) -> None:
        writeback = core.writeback
        while writeback is not None:
            await trio.sleep(BUSY_LOOK_S if writeback.look() else LOOK_S)
            turns = 0
            while why := writeback.wanted():
                begun = writeback.step(why)
                self.transfers.kick()
                # After a takeover, the pages to write may be behind many pages that are absent.
                is_on = writeback.in_flight or writeback.commanded or writeback.is_looking
                if not begun and not is_on and why != "incompressible":
                    break
                turns += 1
                if not turns % COMPACT_TURNS and core.wants_compaction():
                    core.compact_step()
                # Other tasks run between two steps.
                await trio.sleep(0 if begun or writeback.is_looking else PAUSE_S)

    async def _await_the_dead(self) -> None:
        """Release the transfers that wait for writes of dead processes, when these have ended."""
        pause = ALONE_LOOK_S
        while self.transfers.holds_any:
            await trio.sleep(pause)
            pause = min(2 * pause, ALONE_LOOK_MAX_S)
            self._release()

    def _release(self) -> None:
        if self.transfers.holds_any and self._lifeline.is_alone():
            self.transfers.release_held()

    def look(self) -> None:
        """Try a failed device again, and drop the read-ahead of idle readers, every 0.5 s."""
        self.transfers.probe()
        if self._operations is not None:
            self._operations.look()
