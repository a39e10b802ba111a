# SPDX-License-Identifier: GPL-2.0-or-later
"""The hook's buffers have to be in memory before the first request.

Also when the process locks its memory on fault.

With mlockall(MCL_FUTURE | MCL_ONFAULT), as the daemon has it, the kernel ignores MAP_POPULATE. A
buffer that is not there yet is then faulted in by the kernel itself, inside the read from
/dev/fuse: a box without free memory waits there for ever, since the request that was to be read is
the one that would have freed some.
"""

from __future__ import annotations

import subprocess
import sys

from tests.support import capabilities

MAX_IO = 1 << 20

PROGRAM = f"""
import ctypes, pathlib, resource
from zswapd.fuse import lowlevel

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

assert ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0
before = resident()
lowlevel.attach(len, len, len, poll_us=0, budget_us=1000, max_io={MAX_IO}, max_background=1)
print(resident() - before)
"""


@capabilities.requires_root()
def test_buffers_are_in_memory_although_memory_is_locked_on_fault() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    # One for requests, one for replies; the rest of the process grows by some hundred KiB.
    assert int(done.stdout) >= 2 * MAX_IO
