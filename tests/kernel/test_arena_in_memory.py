# SPDX-License-Identifier: GPL-2.0-or-later
"""The arena stays in memory where the kernel has no noswap tmpfs, whatever pages memory out.

Reclaim, DAMON and memory.reclaim page out what no process has locked. Between two workers, that
would be pages of the pool, to the swap device that waits for the next worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TOP
from tests.support.swap import Stage, next_worker, wait_for

PAGE_OUT = """if True:
    import ctypes, mmap, os, re, sys
    from pathlib import Path
    from zswapd.core.allocators.arena import Arena
    from zswapd.core.allocators.segment import Segment
    def refuse(size):
        raise OSError
    if "plain" in sys.argv:
        Segment.make = refuse
    arena = Arena(2048, 4096, kind="memfd")
    assert arena.is_unevictable is ("plain" not in sys.argv)
    begin, end = arena.first_frame * 4096, arena.total_frames * 4096
    arena.view[begin:end] = os.urandom(end - begin)
    libc = ctypes.CDLL(None)
    address, size = ctypes.c_void_p(arena._address + begin), ctypes.c_size_t(end - begin)
    assert libc.madvise(address, size, 21) == 0  # MADV_PAGEOUT
    places = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ ", Path("/proc/self/smaps").read_text(), re.M)
    swapped = re.findall(r"^Swap: +([0-9]+) kB", Path("/proc/self/smaps").read_text(), re.M)
    print(dict(zip(places, map(int, swapped)))[f"{arena._address:x}"] >> 10)
"""


@pytest.mark.parametrize(("kind", "expected_mib"), [("segment", 0), ("plain", 8)])
def test_arena_that_no_process_has_locked_is_not_paged_out(
    stage: Stage, kind: str, expected_mib: int
) -> None:
    """The second case shows that the kernel pages a plain memfd out here."""
    daemon = stage.daemon(size="256M")
    daemon.swapon()
    done = subprocess.run(
        [sys.executable, "-c", PAGE_OUT, kind],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert int(done.stdout) == expected_mib
    daemon.swapoff()


def test_arena_stays_locked_whichever_worker_and_supervisor_is_the_first_to_end(
    stage: Stage,
) -> None:
    daemon = stage.daemon(size="64M", memory__arena="memfd")

    def holders() -> int:
        """Return the number of attachments of the daemon's arena."""
        files = Path(f"/proc/{daemon.pid}/fd").iterdir()
        (number,) = {file.stat().st_ino for file in files if "/SYSV" in str(file.readlink())}
        lines = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        ((mode, count),) = [(line[2], line[6]) for line in lines if int(line[1]) == number]
        assert int(mode, 8) & 0o2000, "it is not locked"
        return int(count)

    with daemon.file.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 4096, 0)
    assert holders() >= 2
    old = daemon.worker_pid()
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    assert holders() >= 2
    old = daemon.worker_pid()
    daemon.ctl("upgrade")
    wait_for(lambda: daemon.worker_pid() != old, "no upgrade")
    assert holders() >= 2
    assert daemon.file.read_bytes()[:4096] == b"x" * 4096
