# SPDX-License-Identifier: GPL-2.0-or-later
"""The supervisor's hold on an arena of a kernel without noswap tmpfs.

A segment stays locked; of another memfd, this process locks what a worker has populated.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NoReturn

import pytest

from tests.support import TOP, capabilities
from zswapd.core.allocators.arena import Arena
from zswapd.core.allocators.segment import Segment
from zswapd.supervisor.arena_lock import ArenaLock

MIB = 1 << 20


def refuse(_size: int) -> NoReturn:
    raise OSError


IN_A_PROCESS_OF_ITS_OWN = """if True:
    import ctypes, mmap, os, sys
    from zswapd.core.allocators.arena import Arena
    from zswapd.core.allocators.segment import Segment
    from zswapd.supervisor.arena_lock import ArenaLock
    def refuse(size):
        raise OSError
    if "plain" in sys.argv:
        Segment.make = refuse
    ctypes.CDLL(None).mlockall(7)
    arena = Arena(8192, 4096, kind=sys.argv[1])
    keeper = ArenaLock(arena.fd)
    before = keeper.lock()
    if not os.fork():  # the worker: what it maps and locks goes with it
        arena.populate(4 << 20, 2 << 20)
        os._exit(0)
    os.wait()
    def locked():
        found = []
        for block in open("/proc/self/smaps").read().split("VmFlags")[:-1]:
            if "rw-s" in block:
                found.append(int(block.split("Locked:")[1].split()[0]))
        return sum(found)
    not_yet = locked()
    held = keeper.lock()
    print(held - before, locked() - not_yet)
"""


@capabilities.requires_root()
@pytest.mark.parametrize(
    ("kinds", "words"), [("memfd plain", "2097152 2048"), ("memfd", "0 0"), ("tmpfs", "0 0")]
)
def test_hold_locks_what_another_process_has_populated(kinds: str, words: str) -> None:

    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, *kinds.split()],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert re.sub(r"\s+", " ", done.stdout.strip()) == words


def test_closed_keeper_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segment, "make", refuse)
    arena = Arena(64, 4096, kind="memfd")
    keeper = ArenaLock(arena.fd)
    assert keeper.lock() > 0
    keeper.close()
    assert keeper.lock() == 0
    arena.close()
