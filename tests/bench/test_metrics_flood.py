# SPDX-License-Identifier: GPL-2.0-or-later
"""How long pages wait while another user floods the metrics, against the same daemon left alone.

tests/mount/test_metrics_flood.py has what keeps it so in every run; here it is the latency itself.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.mount.test_metrics_flood import ready
from tests.support import TOP, capabilities
from tests.support.swap import Stage, stage
from tools.bench.workloads.flood import ATTACKS

__all__ = ["stage"]
pytestmark = [pytest.mark.bench, pytest.mark.mount, capabilities.requires_root()]

PAGES = 8192
WINDOW_S = 2.0
ROUNDS = 3
MOST = 1.5
"""Times the 99th percentile without a flood."""
# What an attacker does to the processors by itself: it connects to a socket of its own.
OWN = """
import socket, sys, time
listening = socket.create_server(("127.0.0.1", 0), backlog=4)
end = time.monotonic() + float(sys.argv[1])
print("begins", flush=True)
while time.monotonic() < end:
    made = socket.create_connection(listening.getsockname())
    listening.accept()[0].close()
    made.close()
"""


def page_in_p99_us(path: Path) -> float:
    """Return the 99th percentile of the time of random page-ins, in µs."""
    times, rnd = [], random.Random(1)
    descriptor, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
    end = time.monotonic() + WINDOW_S
    while time.monotonic() < end:
        offset = rnd.randrange(PAGES) * 4096
        began = time.perf_counter()
        os.preadv(descriptor, [buffer], offset)
        times.append(time.perf_counter() - began)
        time.sleep(0.0005)
    os.close(descriptor)
    times.sort()
    return times[len(times) * 99 // 100] * 1e6


def attack(kind: str, port: int) -> subprocess.Popen[str] | None:
    if kind == "none":
        return None
    command = [sys.executable, "-c", OWN, str(WINDOW_S + 2)]
    if kind != "own":
        command = [
            sys.executable,
            "-m",
            "tools.bench.workloads.flood",
            kind,
            str(port),
            str(WINDOW_S + 2),
        ]
    running = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.readline()
    time.sleep(0.5)
    return running


def test_pages_wait_no_longer_while_the_metrics_are_flooded(stage: Stage) -> None:
    daemon, port = ready(stage)
    with daemon.file.open("r+b", buffering=0) as file:
        for number in range(PAGES):
            os.pwrite(file.fileno(), os.urandom(1500) + bytes(2596), number * 4096)
    kinds = ["none", "own", *ATTACKS]
    measured: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            running = attack(kind, port)
            measured[kind].append(page_in_p99_us(daemon.file))
            if running:
                running.communicate(timeout=60)
    for kind, found in measured.items():
        print(f"{kind:8} p99 {' '.join(f'{one:.0f}' for one in found)} µs")
    usual = statistics.median(measured["none"])
    for kind in ATTACKS:
        assert statistics.median(measured[kind]) <= MOST * usual, kind
