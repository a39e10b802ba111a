# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk behind the pool, as a worker has it: put together from the configuration, an open file and the shared state.

What outlives a worker: the file's descriptor (locked, and open for us alone), and in the shared state the key, the claims, and
for each swap file which of its pages are in their slots. The key is made once and is nowhere else: when the last process that
has the shared state is gone, what is on the disk means nothing to anybody.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from xxhash import xxh3_64_digest

from zswapd.core.backing._disk import Cipher, Queue
from zswapd.core.backing.lifeline import Lifeline
from zswapd.core.backing.store import KEY_BYTES, SlotStore, check_store, make_buffers, open_store
from zswapd.core.backing.transfers import CLAIMS, RUN_MAX, Transfers
from zswapd.core.disk import CoreDisk
from zswapd.core.sizing import slot_map_sizes, slots_needed, witness_sizes
from zswapd.errors import BackingError
from zswapd.fuse import lowlevel, lowlevel_problem
from zswapd.fuse.deferred import BackedOperations
from zswapd.fuse.mount import MAX_IO
from zswapd.handover.state import RESENT, HookWord
from zswapd.host import installation
from zswapd.paths import without_links
from zswapd.system import stand_back

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
_KEY, _CLAIMS, _SLOTS = "backing.key", "backing.claims", "slots:"
_KEY_COPY, _WITNESS = "backing.key.copy", "held:"
_CHECK_BYTES = 8
"""Behind each copy of the key."""
LOOK_S = 0.1
"""Time between two looks at whether pages should go to the disk."""
BUSY_LOOK_S = 0.02
"""The same while the pool is used: at 200 MiB/s it fills by a thousand pages meanwhile."""
PAUSE_S = 0.002
"""Time in which some requests are done, when no more can be begun."""
ALONE_LOOK_S, ALONE_LOOK_MAX_S = 0.005, 0.5
"""The same between two looks at whether threads of a dead process still write: requests wait for their end."""
AHEAD = 64
"""Pages that are read at a time ahead of a reader in order: a virtual disk takes 0.2 ms, in which he gets through as many."""
SPIN_NS = 200_000
"""Longest wait of a thread for the next read: a reader comes back within some 50 µs, unless the event loop has its turn."""
COMPACT_TURNS = 16
"""Steps of writeback between two looks at whether compaction pays."""
_RESEND = (6, 9)
"""The first Linux that can send again what a dead worker had put off until the disk would answer."""


def geometry(config: Config) -> dict[str, Any]:
    """Return what a successor has to agree on; {} without a backing."""
    backing = config.backing
    return {"backing": f"{backing.path}{' (encrypted)' if backing.encrypt else ''}"} if backing.path else {}


def areas(config: Config) -> dict[str, int]:
    """Return the memory that has to outlive a worker, by name; {} without a backing."""
    if not config.backing.path:
        return {}
    maps = {_SLOTS + name: size for name, size in slot_map_sizes(config).items()}
    witnesses = {_WITNESS + name: size for name, size in witness_sizes(config).items()}
    # The copy stands at the end of its area, in another page than the key.
    return {_KEY: KEY_BYTES, _CLAIMS: 8 * CLAIMS, **maps, **witnesses, _KEY_COPY: mmap.PAGESIZE + KEY_BYTES + _CHECK_BYTES}


def make_key(state: SharedState) -> None:
    """Put a random key into a new shared state."""
    key = os.urandom(KEY_BYTES)
    state.area(_KEY)[:] = key
    _copy_key(state, key)


def _copy_key(state: SharedState, key: bytes) -> None:
    state.area(_KEY_COPY)[-KEY_BYTES - _CHECK_BYTES :] = key + xxh3_64_digest(key)


def find_key(state: SharedState) -> memoryview:
    """Return the key, which is taken from its copy should it have changed by itself.

    An older program has made no copy; its key is believed as it is. A wrong key makes no wrong
    data, since what it decrypts does not match its checksum, but it would cost all pages that are
    on the disk.
    """
    key = state.area(_KEY)
    if _KEY_COPY in state.areas:
        copy = bytes(state.area(_KEY_COPY)[-KEY_BYTES - _CHECK_BYTES :])
        whole, check = copy[:KEY_BYTES], copy[KEY_BYTES:]
        if xxh3_64_digest(whole) != check:
            _copy_key(state, bytes(key))
        elif whole != key:
            log.error("the key of the backing has changed by itself in memory: its copy is used")
            key[:] = whole
    return key


def open_backing(config: Config) -> int:
    """Open what `backing.path` names, for all workers to come; return its descriptor, -1 if there is no backing.

    Raises:
        BackingError: it cannot be used.
    """
    path = config.backing.path
    if not path:
        return -1
    _check_kernel()
    mountpoint = without_links(config.fuse.mountpoint)
    return open_store(path, slots_needed(config), config.context.page_size, mountpoint=mountpoint, force=config.backing.force)


def check_backing(config: Config) -> None:
    """Do nothing if what `backing.path` names could be opened.

    Nothing is changed, so some causes of a failure are not seen.

    Raises:
        BackingError: it cannot be used.
    """
    path = config.backing.path
    if path:
        _check_kernel()
        mountpoint, force = without_links(config.fuse.mountpoint), config.backing.force
        check_store(path, slots_needed(config), config.context.page_size, mountpoint=mountpoint, force=force)


def _check_kernel() -> None:
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or (int(release[1]), int(release[2])) < _RESEND:
        raise BackingError(
            f"a backing needs Linux 6.9, this is {os.uname().release}",
            hint="before it, requests that wait for the disk would die with their worker: set backing.path to nothing",
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a process has in hand before it needs it.

    Attributes:
        queue: of requests to the disk, which threads do.
        buffers: memory for pages on their way.
        lanes: and for each thread, as long as a request, where it encrypts what it writes; none if nothing is to be encrypted.
    """

    queue: Queue
    buffers: memoryview
    lanes: tuple[memoryview, ...]


def prepare(config: Config) -> Prepared | None:
    """Make threads and buffers; None without a backing."""
    if not config.backing.path:
        return None
    threads, page_size = config.backing.threads, config.context.page_size
    lanes = (make_buffers(RUN_MAX * page_size, page_size) for _ in range(threads if config.backing.encrypt else 0))
    queue = Queue()
    for _ in range(threads):
        threading.Thread(target=_work, args=(queue,), daemon=True).start()
    return Prepared(queue, make_buffers(config.backing.buffers, page_size), tuple(lanes))


def _work(queue: Queue) -> None:
    """Do requests in this thread, from now on."""
    with contextlib.suppress(OSError):
        Path("/proc/thread-self/comm").write_text(THREAD)
    stand_back()
    queue.work()


class BackedPool:
    """One worker's side of it.

    Args:
        config: the settings.
        state: what goes from worker to worker.
        fd: what `open_backing` has returned; not -1.
        prepared: what the process has in hand.

    Attributes:
        backing: what the core gets.
        fd: as above.
        transfers: how slots are read and written.

    Raises:
        BackingError: the hook is not there, or the key cannot be one.
    """

    def __init__(self, config: Config, state: SharedState, fd: int, prepared: Prepared) -> None:
        if lowlevel is None:
            raise BackingError(
                f"a backing needs the FUSE hook: {lowlevel_problem}",
                hint=f"{installation.found().reinstall()}; or set backing.path to nothing",
            )
        self.fd = fd
        self._lowlevel: Any = lowlevel
        page_size = config.context.page_size
        self._lifeline = Lifeline(state.fd)
        self._hook_words = state.hook_words
        self._queue = prepared.queue
        self.set_poll_us(config.fuse.poll_us)
        cipher = Cipher(find_key(state), prepared.lanes) if config.backing.encrypt else None
        self.transfers = Transfers(
            SlotStore(fd, page_size, cipher),
            self._queue.submit,
            page_size=page_size,
            buffers=prepared.buffers,
            depth=config.backing.threads,
            claims=state.area(_CLAIMS).cast("Q"),
        )
        maps: Mapping[str, memoryview] = {name: state.area(_SLOTS + name) for name in config.swap_files()}
        witnesses = {name: area for name in config.swap_files() if (area := state.areas.get(_WITNESS + name)) is not None}
        self.backing = CoreDisk(self.transfers, maps, witnesses)
        self._operations: BackedOperations | None = None
        self._release()

    def set_poll_us(self, poll_us: int) -> None:
        """Have threads look out for the next read no longer than the hook does for the next request."""
        self._queue.spin_ns = min(poll_us * 1000, SPIN_NS)

    def report(self, config: Config, core: CoreStatistics) -> BackingReport:
        """Return what `status` shows."""
        writeback = core.writeback
        return {
            "path": str(config.backing.path),
            "pages": sum(device.bd_count for device in core.backed),
            "encrypted": config.backing.encrypt,
            "trouble": self.transfers.trouble,
            "budget_left": writeback.budget_left_bytes if writeback and writeback.budget_bytes else None,
        }

    def operations(self, directory: Directory, page_size: int) -> BackedOperations:
        """Return the handlers for the files of a mount."""
        hook, words = self._lowlevel, self._hook_words

        def blame(unique: int) -> None:
            words[HookWord.ACTIVE] = unique & ~RESENT

        self._operations = BackedOperations(
            directory,
            page_size=page_size,
            transfers=self.transfers,
            unique=hook.unique,
            reply=hook.reply,
            blame=blame,
            max_io=MAX_IO,
            takes_part=hook.takes_part,
            ahead=AHEAD * page_size,
        )
        return self._operations

    async def run(self, core: Core) -> None:
        """Hear what the disk answers, and write pages back whenever there is a reason to; never returns."""
        self._lowlevel.hear(self._queue.fd, self._hear)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._answer)
            nursery.start_soon(self._write_back, core)
            nursery.start_soon(self._await_the_dead)

    async def _answer(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._queue.fd)
            self._hear()

    @trio.lowlevel.enable_ki_protection
    def _hear(self) -> None:
        """Answer whoever waits for what the disk has done."""
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
                # What it looks for may be behind many pages that are not there, after a takeover.
                is_on = writeback.in_flight or writeback.commanded or writeback.is_looking
                if not begun and not is_on and why != "incompressible":
                    break
                turns += 1
                if not turns % COMPACT_TURNS and core.wants_compaction():
                    core.compact_step()
                # Between two steps everybody else has his turn.
                await trio.sleep(0 if begun or writeback.is_looking else PAUSE_S)

    async def _await_the_dead(self) -> None:
        """Write what waits for the requests of dead processes, once these can do nothing any more."""
        pause = ALONE_LOOK_S
        while self.transfers.holds_any:
            await trio.sleep(pause)
            pause = min(2 * pause, ALONE_LOOK_MAX_S)
            self._release()

    def _release(self) -> None:
        if self.transfers.holds_any and self._lifeline.is_alone():
            self.transfers.release_held()

    def look(self) -> None:
        """See what has become of a device in trouble, and of a reader in order; to be called now and then."""
        self.transfers.probe()
        if self._operations is not None:
            self._operations.look()
