# SPDX-License-Identifier: GPL-2.0-or-later
"""What the daemon costs: its memory beside the pool, by part, and what the swap gains by it.

The memory of supervisor, worker and spare is read from /proc/PID/status. Another thread reads it
every SAMPLE_S, because to open a file may wait for memory. A report takes the last sample.

Limits: pages of programs and libraries count whole, although other processes may use the same
files. Memory of the kernel is not counted: page tables, stacks of threads, FUSE and the loop device
take about 2 MiB, and the tables of a swap area 3 bytes a page.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from zswapd.handover.state import Word
from zswapd.metrics.snapshot import CostStatistics
from zswapd.system.scheduling import SPARE_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from zswapd.core.core import CoreStatistics
    from zswapd.handover.state import SharedState
    from zswapd.system.offload import Offload

SAMPLE_S: Final = 5.0
"""Time between two samples, s."""
_BLOCK: Final = 512
"""Bytes of a block in st_blocks."""


class Process(NamedTuple):
    """Memory of one process in bytes."""

    private: int
    code: int


def process_memory(status: str) -> Process:
    """Return the memory of a process from the text of its /proc/PID/status."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)

    def field(name: str) -> int:
        return int(fields.get(name, "0").split()[0]) << 10

    return Process(field("RssAnon"), field("RssFile"))


NOTHING: Final = Process(0, 0)


class Cost:
    """Samples and reports the memory of the daemon.

    Args:
        state: the shared state.
        supervisor: returns the process id of the supervisor, or 0 if it is dead.
        root: directory of /proc, for tests.
    """

    def __init__(
        self, state: SharedState, supervisor: Callable[[], int], root: Path = Path("/")
    ) -> None:
        self._state = state
        self._supervisor = supervisor
        self._proc = root / "proc"
        self._samples = dict.fromkeys(("supervisor", "worker", "spare"), NOTHING)

    def _read(self, pid: int) -> Process:
        try:
            return process_memory((self._proc / str(pid) / "status").read_text())
        except OSError:  # it has ended
            return NOTHING

    def _spare(self, supervisor: int) -> int:
        """Return the process id of the spare; 0 if there is none."""
        try:
            children = self._proc / f"{supervisor}/task/{supervisor}/children"
            for child in children.read_text().split():
                if (self._proc / child / "comm").read_text().strip() == SPARE_NAME:
                    return int(child)
        except OSError:  # one has ended, or the kernel does not list children
            pass
        return 0

    def sample(self) -> None:
        """Read the memory of all processes. It may wait for memory."""
        supervisor = self._supervisor()
        spare = self._spare(supervisor) if supervisor else 0
        self._samples = {
            "supervisor": self._read(supervisor) if supervisor else NOTHING,
            "worker": self._read(os.getpid()),
            "spare": self._read(spare) if spare else NOTHING,
        }

    async def run(self, thread: Offload) -> None:
        """Sample at intervals in another thread; never return."""
        while True:
            await thread.run(self.sample, abandon=True)
            await trio.sleep(SAMPLE_S)

    def statistics(self, core: CoreStatistics) -> CostStatistics:
        """Return the cost by the last sample and a snapshot of the core."""
        samples, frames, words = self._samples, core.frames, self._state.words
        pool = frames.used_frames * frames.page_size
        parts = {
            "supervisor_bytes": samples["supervisor"].private,
            "worker_bytes": max(samples["worker"].private - core.tmem.objnode_bytes, 0),
            # What it shares is in the supervisor's figure.
            "spare_bytes": max(samples["spare"].private - words[Word.SPARE_SHARED], 0),
            "code_bytes": max(item.code for item in samples.values()),
            "index_bytes": core.tmem.objnode_bytes,
            "state_bytes": os.fstat(self._state.fd).st_blocks * _BLOCK,
            "ready_bytes": max(core.arena_backed_bytes - pool, 0),
        }
        beside = sum(parts.values())
        pages = core.zv.curr_pages + (core.cache.cleancache.pages if core.cache else 0)
        return CostStatistics(
            **parts,
            beside_pool_bytes=beside,
            effective_ratio=round(pages * frames.page_size / (beside + pool), 4),
        )
