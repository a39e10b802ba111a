# SPDX-License-Identifier: GPL-2.0-or-later
"""No write is refused while the box has memory, however fast pages come.

The kernel's log has a line for each refused page (Write-error on swap-device), and the daemon
counts it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.swap import Stage, wait_for
from tools.bench.harness.daemon import Daemon

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(180)]

PAGE = 4096


def refused(daemon: Daemon) -> int:
    return int(daemon.ask("stats")["core"]["frontswap"]["failed_stores"])


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """Keep processors busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("busy", [0, 2])
def test_fill_at_full_speed_has_no_refusal(stage: Stage, busy: int) -> None:
    """768 MiB through 128 MiB of memory, with a small reserve: it is empty again and again."""
    daemon = stage.daemon(size="1G", memory__reserve="8M")
    daemon.swapon()
    with hogs(busy):
        workload = stage.workload(stage.cgroup(128), 768, "fill", "verify")
        phases = workload.phases()
        assert next(phases).mismatches == 0
        filled = daemon.ask("stats")
        assert next(phases).mismatches == 0
        workload.kill()
    print(filled["fuse"]["held"])
    assert filled["core"]["frontswap"]["failed_stores"] == 0
    assert filled["fuse"]["request_errors"] == 0
    daemon.swapoff()


def test_reads_go_on_while_a_write_waits_for_a_refill_that_never_comes(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The thread of the refill hangs in its first job after the start.
    monkeypatch.setenv("ZSWAPD_CRASH", "refill_table:1:sleep:1")
    daemon = stage.daemon(
        size="256M", memory__reserve="8M", memory__refill_wait_ms="2000", service__hang_timeout="0"
    )
    with daemon.file.open("r+b", buffering=0) as file:
        descriptor = file.fileno()
        os.pwrite(descriptor, b"r" * PAGE, 0)
        errors: list[OSError] = []

        def fill() -> None:
            try:
                for number in range(1, 8192):
                    os.pwrite(descriptor, os.urandom(PAGE), number * PAGE)
            except OSError as error:
                errors.append(error)

        writer = threading.Thread(target=fill)
        writer.start()
        wait_for(lambda: daemon.ask("stats")["fuse"]["held"]["waiting"], "no write waits")
        try:
            longest, end = 0.0, time.monotonic() + 1
            while time.monotonic() < end:
                begin = time.monotonic()
                assert os.pread(descriptor, PAGE, 0) == b"r" * PAGE
                longest = max(longest, time.monotonic() - begin)
            assert daemon.ask("stats")["fuse"]["held"]["waiting"] == 1
            writer.join()
            assert daemon.ask("stats")["fuse"]["held"]["expired"] == 1
        finally:
            os.kill(daemon.worker_pid(), signal.SIGKILL)  # its thread sleeps for ever
            writer.join()
    assert longest < 0.5, "a reader waited for the writer"
    assert errors, "the write is refused in the end"


def test_held_writes_survive_their_worker(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSWAPD_CRASH", "refill_table:1:sleep:1")
    daemon = stage.daemon(
        size="256M", memory__reserve="8M", memory__refill_wait_ms="10000", service__hang_timeout="0"
    )
    data = [os.urandom(PAGE) for _ in range(6000)]
    with daemon.file.open("r+b", buffering=0) as file:
        descriptor = file.fileno()

        def fill() -> None:
            for number, page in enumerate(data):
                assert os.pwrite(descriptor, page, number * PAGE) == PAGE

        writer = threading.Thread(target=fill)
        writer.start()
        wait_for(lambda: daemon.ask("stats")["fuse"]["held"]["waiting"], "no write waits")
        os.kill(daemon.worker_pid(), signal.SIGKILL)
        writer.join()
        for number, page in enumerate(data):
            assert os.pread(descriptor, PAGE, number * PAGE) == page
    assert refused(daemon) == 0


def test_nothing_is_read_ahead_while_a_write_waits(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write is stored long after it came: pages read ahead before that would be stale."""
    monkeypatch.setenv("ZSWAPD_CRASH", "refill_table:1:sleep:1")
    daemon = stage.daemon(
        size="256M", memory__reserve="8M", memory__refill_wait_ms="1500", service__hang_timeout="0"
    )
    last, is_held = (0, b""), threading.Event()
    with daemon.file.open("r+b", buffering=0) as file:
        descriptor = file.fileno()

        def fill() -> None:
            nonlocal last
            for number in range(4096):
                last = (number, os.urandom(PAGE))
                os.pwrite(descriptor, last[1], number * PAGE)
                if is_held.is_set():
                    return

        writer = threading.Thread(target=fill)
        writer.start()
        try:
            wait_for(lambda: daemon.ask("stats")["fuse"]["held"]["waiting"], "no write waits")
            is_held.set()
            number, page = last
            before = daemon.ask("stats")["fuse"]["reads_ahead"]
            for place in range(number - 8, number):
                os.pread(descriptor, PAGE, place * PAGE)
                time.sleep(0.01)
            seen = daemon.ask("stats")["fuse"]
            assert seen["held"]["waiting"] == 1, "it did not wait for long"
            assert seen["reads_ahead"] == before
            writer.join()
            assert os.pread(descriptor, PAGE, number * PAGE) == page
        finally:
            os.kill(daemon.worker_pid(), signal.SIGKILL)  # its thread sleeps for ever
            writer.join()


def test_write_that_waits_in_the_buffer_survives_its_worker_without_a_resend(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSWAPD_NO_RESEND", "1")
    monkeypatch.setenv("ZSWAPD_CRASH", "refill_table:1:sleep:1")
    daemon = stage.daemon(
        size="256M",
        memory__reserve="8M",
        memory__arena="memfd",
        memory__refill_wait_ms="10000",
        service__hang_timeout="0",
    )
    data = [os.urandom(64 * PAGE) for _ in range(128)]
    with daemon.file.open("r+b", buffering=0) as file:
        descriptor = file.fileno()

        def fill() -> None:
            for place, piece in enumerate(data):
                assert os.pwrite(descriptor, piece, place * len(piece)) == len(piece)

        writer = threading.Thread(target=fill)
        writer.start()
        wait_for(lambda: daemon.ask("stats")["fuse"]["held"]["waiting"], "no write waits")
        assert daemon.ask("stats")["fuse"]["held"]["held"] == 0, "only the buffer outlives it"
        os.kill(daemon.worker_pid(), signal.SIGKILL)
        writer.join()
        for place, piece in enumerate(data):
            assert os.pread(descriptor, len(piece), place * len(piece)) == piece
    seen = daemon.ask("stats")["fuse"]
    assert (seen["resent"], seen["request_errors"]) == (1, 0)
    assert refused(daemon) == 0
