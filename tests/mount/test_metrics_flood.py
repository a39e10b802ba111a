# SPDX-License-Identifier: GPL-2.0-or-later
"""Another user asks for the metrics all the time: pages and an allowed scraper are served.

How long pages wait meanwhile is measured in tests/bench/test_metrics_flood.py. Here it is what
causes it: the processor time of the thread, its place among the tasks, and what it takes from the
kernel.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import TOP, capabilities
from tests.support.swap import Stage, stage, wait_for
from tools.bench.harness.daemon import Daemon
from tools.bench.workloads.flood import ATTACKS
from zswapd.metrics.exporter import CLIENTS, SAVED_S, SHARE

__all__ = ["stage"]
pytestmark = capabilities.requires_root()

ATTACK_S = 1.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def scrape(port: int, timeout: float = 10) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout) as response:
        return bytes(response.read())


class Thread:
    """The thread of a worker that serves metrics."""

    def __init__(self, daemon: Daemon) -> None:
        tasks = Path(f"/proc/{daemon.worker_pid()}/task")
        (self._task,) = [
            task for task in tasks.iterdir() if (task / "comm").read_text() == "metrics\n"
        ]

    def processor_s(self) -> float:
        """Return the processor time that it has used, in seconds."""
        return int((self._task / "schedstat").read_text().split()[0]) / 1e9

    def stat(self, field: int) -> int:
        """Return a field of its `stat`, as proc(5) numbers them."""
        return int((self._task / "stat").read_text().rpartition(") ")[2].split()[field - 3])


def ready(stage: Stage, **settings: str) -> tuple[Daemon, int]:
    port = free_port()
    daemon = stage.daemon(
        "64M", memory__reserve="8M", metrics__listen=f"127.0.0.1:{port}", **settings
    )

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(scrape(port))
        return False

    wait_for(answers, "the metrics are not served")
    return daemon, port


@contextlib.contextmanager
def attacked(kind: str, port: int, seconds: float, processes: int = 1) -> Iterator[list[int]]:
    """Have processes of the user nobody attack a port; count the attacks of each."""
    command = [sys.executable, "-m", "tools.bench.workloads.flood", kind, str(port), str(seconds)]
    running = [
        subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    counts: list[int] = []
    try:
        for one in running:
            assert one.stdout is not None
            assert one.stdout.readline() == "begins\n"
        yield counts
        counts += [int(one.communicate(timeout=seconds + 30)[0]) for one in running]
    finally:
        for one in running:
            one.kill()
            one.communicate()


def test_a_flood_gets_no_more_than_a_share_of_a_processor_and_a_scraper_its_answers(
    stage: Stage,
) -> None:
    daemon, port = ready(stage)
    thread = Thread(daemon)
    descriptors = Path(f"/proc/{daemon.worker_pid()}/fd")
    for kind in ATTACKS:
        before = len(list(descriptors.iterdir()))
        with attacked(kind, port, ATTACK_S, processes=2) as counts:
            began, used = time.monotonic(), thread.processor_s()
            text = scrape(port)
            assert len(list(descriptors.iterdir())) <= before + CLIENTS + 1, kind
            time.sleep(ATTACK_S)
        used, passed = thread.processor_s() - used, time.monotonic() - began
        assert b"zswapd_stored_pages" in text
        assert any(counts), kind
        # One piece of work may exceed what is left of the allowance: making a text.
        assert used < SHARE * passed + SAVED_S + 0.04, f"{kind}: {used:.3f} s of {passed:.1f} s"
    assert (thread.stat(19), thread.stat(41)) == (0, os.SCHED_OTHER)  # nice value, policy
    assert b"zswapd_stored_pages" in scrape(port)


@pytest.mark.parametrize("kind", ["get", "unread"])
def test_a_user_who_may_read_gets_no_more_either(stage: Stage, kind: str) -> None:
    daemon, port = ready(stage, metrics__users="*")
    thread = Thread(daemon)
    with attacked(kind, port, ATTACK_S, processes=2) as counts:
        began, used = time.monotonic(), thread.processor_s()
        assert b"zswapd_stored_pages" in scrape(port)
        time.sleep(ATTACK_S)
    used, passed = thread.processor_s() - used, time.monotonic() - began
    assert any(counts)
    assert used < SHARE * passed + SAVED_S + 0.04, f"{used:.3f} s of processor in {passed:.1f} s"


def test_the_thread_takes_no_memory_while_it_is_asked(stage: Stage) -> None:
    """It is an ordinary task that may wait for memory,
    and it holds the GIL when it touches its own.
    """
    daemon, port = ready(stage)
    thread = Thread(daemon)

    def faults() -> int:
        before = thread.stat(10) + thread.stat(12)
        with attacked("get", port, 0.3):
            scrape(port)
        return thread.stat(10) + thread.stat(12) - before

    wait_for(lambda: faults() == 0, "the thread of the metrics takes page faults")
