# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own PSI trigger, under a stall that is real but bounded.

A program reads more than its memory cgroup holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.support.descriptors import is_readable
from tools.bench.harness.cgroup import MemoryCgroup
from tools.bench.harness.system import MIB
from zswapd.core.reclaim.pressure import Pressure

_READER = """
import os, sys, time
end = time.monotonic() + 20
while time.monotonic() < end:
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read(1 << 16):
            pass
"""


pytestmark = pytest.mark.kernel


async def test_a_stall_fires_the_trigger(tmp_path: Path) -> None:
    pressure = Pressure()
    pressure.arm()
    if pressure.psi != "trigger":
        pytest.skip(f"this kernel has no PSI triggers (psi: {pressure.psi})")
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.write(bytes(96 * MIB))
        os.fsync(file.fileno())
        os.posix_fadvise(
            file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # its pages are to be the reader's
    with MemoryCgroup("pressure", 24 * MIB) as cgroup:
        reader = subprocess.Popen([sys.executable, "-c", _READER, str(big)], start_new_session=True)  # noqa: ASYNC220
        try:
            (cgroup.path / "cgroup.procs").write_text(str(reader.pid))
            with trio.fail_after(15):
                await trio.lowlevel.wait_readable(pressure.descriptor)
            pressure.take_trigger()
            assert pressure.statistics().triggers == 1
            assert not is_readable(pressure.descriptor, 0), "the trigger was not taken"
        finally:
            reader.kill()
            reader.wait(10)
    pressure.close()
