# SPDX-License-Identifier: GPL-2.0-or-later
"""A pool that is full: the write is refused and counted, the kernel keeps the page.

Nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.swap import Stage
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.system import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(120)]

CHUNK = MIB


@contextlib.contextmanager
def loop_on(daemon: Daemon) -> Iterator[str]:
    device = system.attach_loop(daemon.file)
    try:
        yield device
    finally:
        system.detach_loop(device)


def refused(daemon: Daemon) -> int:
    return sum(daemon.ctl_json("status")["pool"]["refused"].values())


def fill_until_refused(device: str, chunks: int) -> tuple[list[bytes], int]:
    """Write random, incompressible chunks with O_DIRECT until one is refused.

    Return those that went, and the errno.
    """
    source = random.Random(3)
    written: list[bytes] = []
    with mmap.mmap(-1, CHUNK) as buffer:  # page-aligned, as O_DIRECT demands
        fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        try:
            for number in range(chunks):
                data = source.randbytes(CHUNK)
                buffer[:] = data
                try:
                    count = os.pwrite(fd, buffer, number * CHUNK)
                except OSError as exc:
                    return written, exc.errno or 0
                if count < CHUNK:
                    return written, 0
                written.append(data)
        finally:
            os.close(fd)
    return written, 0


def read_direct(device: str, offset: int, length: int) -> bytes:
    with mmap.mmap(-1, length) as buffer:
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.preadv(fd, [buffer], offset) == length
        finally:
            os.close(fd)
        return buffer[:]


def test_write_to_full_pool_is_refused_and_older_data_stays(stage: Stage) -> None:
    daemon = stage.daemon(
        size="256M", pool__limit="32M"
    )  # less than the reserve: only the limit refuses
    with loop_on(daemon) as device:
        written, error = fill_until_refused(device, 64)

        # 32 MiB take 31 chunks and their headers, or a few less
        assert 24 <= len(written) <= 32
        assert error in {errno.ENOSPC, errno.EIO}
        assert refused(daemon) > 0
        for number, data in enumerate(written):
            assert read_direct(device, number * CHUNK, CHUNK) == data

        system.run("blkdiscard", "--offset", "0", "--length", str(8 * CHUNK), device)
        again, _ = fill_until_refused(device, 4)
        assert len(again) == 4


def test_swap_onto_full_pool_keeps_pages_in_memory(stage: Stage) -> None:
    daemon = stage.daemon(size="512M", pool__limit="16M", memory__reserve="16M")
    daemon.swapon()
    cgroup = stage.cgroup(384)  # all of the data fits: what is refused has a place to stay
    phases = stage.workload(cgroup, 192, "fill", "settle", "verify", "rewrite", "verify").phases()
    next(phases)

    settled = next(phases)

    assert settled.pages_out > 0
    assert settled.more["resident"] > settled.pages // 2
    assert refused(daemon) > 0
    # The limit is looked at before a zspage (eight frames at most) is taken, and the new copy of a
    # page that is replaced is exempt: a few size classes may have begun a zspage beyond it.
    assert 15 * MIB < daemon.pool_sample().pool_bytes < 16 * MIB + 64 * mmap.PAGESIZE
    assert [phase.mismatches for phase in phases] == [0, 0, 0]
    assert cgroup.oom_kills() == 0


def test_limit_raised_at_run_time_takes_effect(stage: Stage) -> None:
    daemon = stage.daemon(size="512M", pool__limit="8M", memory__reserve="16M")
    daemon.swapon()
    cgroup = stage.cgroup(384)
    phases = stage.workload(cgroup, 96, "fill", "settle", "settle", "verify").phases()
    next(phases)
    assert next(phases).more["resident"] > 0

    daemon.ctl("set", "pool.limit=256M")

    assert next(phases).more["resident"] == 0
    assert next(phases).mismatches == 0


def test_swap_file_is_a_real_path_of_the_mount(stage: Stage) -> None:
    daemon = stage.daemon(size="64M")
    with loop_on(daemon) as device:
        backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
        assert backing.read_text().rstrip("\n") == str(daemon.file)
        assert int((Path("/sys/block") / Path(device).name / "loop/dio").read_text()) == 1
