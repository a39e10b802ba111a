# SPDX-License-Identifier: GPL-2.0-or-later
"""Stored pages that change in memory.

The reader of that page gets EIO. The daemon counts and logs the page, and serves all other pages.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.swap import Stage, next_worker
from tools.bench.harness.daemon import Daemon, program

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(60)]

PAGE = 4096


def text_page(number: int) -> bytes:
    return b"".join(b"%d-%d " % (number, index * 7919) for index in range(PAGE))[:PAGE]


@contextlib.contextmanager
def arena_of(daemon: Daemon) -> Iterator[mmap.mmap]:
    """The largest of the files without a name that the worker has open."""
    links = [
        Path(f"/proc/{daemon.worker_pid()}/fd/{name}")
        for name in os.listdir(f"/proc/{daemon.worker_pid()}/fd")
    ]
    files = [link for link in links if "(deleted)" in os.readlink(link)]
    largest = max(files, key=lambda link: os.stat(link).st_size)
    with largest.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        yield mapping


def damage(daemon: Daemon, stored: bytes) -> None:
    """Flip one bit in the middle of what is stored."""
    with arena_of(daemon) as arena:
        place = arena.find(stored)
        assert place > 0, "not in the arena"
        arena[place + len(stored) // 2] ^= 4


# A process with pages of digits, most of which its memory cgroup swaps out.
HOLDER = """
import mmap, os, sys, time
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
memory = mmap.mmap(-1, int(sys.argv[2]) * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for number in range(int(sys.argv[2])):
    digits = b"%d:" % number + b"".join(b"%d " % (index * 7919) for index in range(600))
    memory[number * 4096 : number * 4096 + 4096] = digits[:4096].ljust(4096)
print("filled", flush=True)
time.sleep(1000)
"""
HELD = 8192


@pytest.fixture
def holder(stage: Stage) -> Iterator[subprocess.Popen[str]]:
    """A process whose pages are swapped out; it uses none of them again."""
    cgroup = stage.cgroup(12)
    command = [sys.executable, "-c", HOLDER, str(cgroup.path), str(HELD)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filled\n"
        cgroup.set_limit(256 << 20)  # swapoff brings all of it back
        yield process
        process.kill()


@pytest.mark.parametrize("how", ["command", "stop"])
def test_swapoff_that_meets_a_damaged_page_says_so(
    stage: Stage, how: str, request: pytest.FixtureRequest
) -> None:
    daemon = stage.daemon(size="128M")
    daemon.swapon()
    request.getfixturevalue("holder")  # after swapon
    damage(daemon, b"4000:0 7919 15838 23757")  # lz4 keeps the first bytes of a page as they are
    if how == "stop":
        daemon.terminate()
        assert "swapped off, but" in daemon.log_text()
        return
    command = [*program("zswapctl"), "--socket", str(daemon.socket), "swapoff", "--force"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert "is swapped off" in done.stdout
    assert "warning: swap: pages could not be read" in done.stderr


@pytest.mark.parametrize("kind", ["compressed", "raw"])
def test_damaged_page_is_an_error_for_its_reader_only(stage: Stage, kind: str) -> None:
    daemon = stage.daemon(size="64M")
    pages = {
        number: text_page(number) if kind == "compressed" else os.urandom(PAGE)
        for number in range(1, 20)
    }
    fd = os.open(daemon.file, os.O_RDWR)
    try:
        for number, page in pages.items():
            os.pwrite(fd, page, number * PAGE)
        # Decimal digits of page 7 only: no other page has them; lz4 keeps the first ones as they
        # are.
        damage(daemon, pages[7] if kind == "raw" else pages[7][:24])
        before = daemon.ask("stats")["core"]["zv"]["corrupted"]
        with pytest.raises(OSError, match="Input/output error") as caught:
            os.pread(fd, PAGE, 7 * PAGE)
        assert caught.value.errno == errno.EIO
        assert {number: os.pread(fd, PAGE, number * PAGE) for number in pages if number != 7} == {
            number: page for number, page in pages.items() if number != 7
        }
        stats = daemon.ask("stats")
        assert (
            stats["core"]["zv"]["corrupted"] > before
        )  # a sequential reader may have been read ahead for as well
        assert stats["fuse"]["failed_requests"] >= 1
        assert "is damaged" in daemon.log_text()

        # Neither a takeover nor a rewrite minds.
        old = daemon.worker_pid()
        os.kill(old, signal.SIGKILL)
        next_worker(daemon, old)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, PAGE, 7 * PAGE)
        os.pwrite(fd, pages[8], 7 * PAGE)
        assert os.pread(fd, PAGE, 7 * PAGE) == pages[8]
    finally:
        os.close(fd)
