# SPDX-License-Identifier: GPL-2.0-or-later
"""All processes of a daemon are killed at once, and no process has its files.

What waits for its device comes to an end.

The device is attached here and never swapped on. In the middle of swapoff:
tests/vm/test_death_in_swapoff.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.support.swap import Stage, wait_for
from tools.bench.harness import system
from tools.bench.harness.daemon import Daemon
from zswapd.swapdevice.kernel import Kernel

pytestmark = [pytest.mark.kernel, pytest.mark.mount, pytest.mark.timeout(120)]

BOUND_S = 5.0
READ = 'while dd if="$1" of=/dev/null bs=1M iflag=direct status=none 2>&1; do :; done'


def processes(daemon: Daemon) -> list[int]:
    """Return supervisor, worker and spare."""
    return [pid for pid in system.children(daemon.pid) if system.name(pid).startswith("zswapd")]


def test_reads_of_a_device_whose_daemon_is_killed_whole_fail_at_once(stage: Stage) -> None:
    daemon = stage.daemon("64M", memory__reserve="32M")
    device = system.attach_loop(daemon.file)
    readers = []
    try:
        system.run(
            "dd",
            "if=/dev/urandom",
            f"of={device}",
            "bs=1M",
            "count=8",
            "oflag=direct",
            "status=none",
        )
        wait_for(lambda: len(processes(daemon)) == 3, "no spare")
        readers = [
            subprocess.Popen(["sh", "-c", READ, "sh", device], stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        time.sleep(0.5)
        assert all(reader.poll() is None for reader in readers)
        assert Kernel().is_readable(device)

        began = time.monotonic()
        for pid in processes(daemon):
            os.kill(pid, signal.SIGKILL)

        for reader in readers:
            assert "Input/output error" in reader.communicate(timeout=BOUND_S)[0]
        assert time.monotonic() - began < BOUND_S
        assert daemon.wait_for_end() == -signal.SIGKILL
        assert not Kernel().is_readable(device), "by which `zswapctl swapoff` knows"
    finally:
        for reader in readers:
            reader.kill()
        system.detach_loop(device)
