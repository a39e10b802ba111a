# SPDX-License-Identifier: GPL-2.0-or-later
"""Real swap with a disk behind the pool that cannot be read, or is gone.

The process that needs an unreadable page ends, and no other. The tests run in a virtual machine: a
kernel that pages out cold memory has pages of every process on that disk.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.vm.conftest import Boot
from tools.vm.guest import COMMAND_LIMIT_S, Box, Work

DEVICE = "/dev/loop7"
SETTINGS = {
    "swap.size": '"256M"',
    "memory.reserve": '"16M"',
    "backing.path": f'"{DEVICE}"',
    # Nothing goes to the disk that is not sent there.
    "pool.limit": '"160M"',
    "pool.incompressible": '"store"',
}
DATA_MIB, LIMIT_MIB = 64, 24

# As tests/support/baddisk.py has it. What serves the disk must not be swapped out to it.
FAR = """[Service]
MemorySwapMax=0
ExecStartPre=/bin/rm -f /run/disk/server /run/disk/there
ExecStart=/usr/bin/nbdkit --foreground --pidfile /run/disk/there --unix /run/disk/server \\
    file /srv/disk
ExecStartPost=/bin/sh -c "while ! test -e /run/disk/there; do sleep 0.1; done"
"""
NEAR = """[Service]
MemorySwapMax=0
ExecStartPre=/bin/rm -f /run/disk/ready
ExecStart=/usr/bin/nbdfuse -P /run/disk/ready /run/disk/nbd/disk \\
    --command nbdkit -s --filter=error --filter=retry \\
    nbd socket=/run/disk/server retries=1 retry-delay=1 retry-exponential=no \\
    error-pread=EIO error-pread-rate=100%% error-pread-file=/run/disk/read-errors
ExecStartPost=/bin/sh -c "while ! test -e /run/disk/ready; do sleep 0.1; done"
"""
DISK = f"""mkdir -p /run/disk/nbd /run/systemd/system && truncate --size 257M /srv/disk
cat > /run/systemd/system/far.service <<'END'
{FAR}END
cat > /run/systemd/system/near.service <<'END'
{NEAR}END
systemctl daemon-reload && systemctl start far.service && systemctl start near.service
losetup --direct-io=on --sector-size=4096 {DEVICE} /run/disk/nbd/disk
"""
VANISH = "systemctl kill --signal=KILL far.service"
COME_BACK = "systemctl start far.service"
STOP = "systemctl stop near.service far.service"
REMOVE = f"losetup --detach {DEVICE}; umount --lazy /run/disk/nbd/disk; {STOP}; rm -rf /srv/disk"


def wait_for(condition: Callable[[], object], what: str, limit: float = COMMAND_LIMIT_S) -> None:
    """Wait until a condition holds, which takes a command in the guest."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.5)


def trouble(box: Box) -> str:
    return str(box.ctl("status")["backing"]["trouble"])


def swapped(box: Box, name: str) -> Work:
    """Start a workload that does not compress and has swapped out most of its data."""
    return box.swapped(name, DATA_MIB, LIMIT_MIB, same=0)


def ends_well(box: Box, work: Work) -> None:
    box.next_phase(work)
    box.wait_for_phase(work, "verify", 300)
    box.next_phase(work)
    assert work.verified(60)[-1]["mismatches"] == 0


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["it fails", "it is gone"])
def test_reader_of_a_disk_that_cannot_be_read_dies_and_nobody_else(boot: Boot, how: str) -> None:
    box = boot(memory_mib=768)
    box.run(DISK)
    box.start(SETTINGS)
    reader, waiter = swapped(box, "reader"), swapped(box, "waiter")
    assert box.ctl("writeback")["written_back"] > 2000, "too little is on the disk"
    other = swapped(box, "other")
    box.run("touch /run/disk/read-errors" if how == "it fails" else VANISH)
    box.next_phase(reader)
    ended = reader.running.wait(300)
    assert ended.status == -signal.SIGBUS, ended
    wait_for(lambda: trouble(box), "the daemon does not say so")
    assert "DEGRADED" in box.run("zswapctl status")
    ends_well(box, other)
    box.run("rm /run/disk/read-errors" if how == "it fails" else COME_BACK)
    wait_for(lambda: not trouble(box), "it does not recover")
    ends_well(box, waiter)
    stats = box.ctl("stats")["core"]
    assert stats["transfers"]["failed_reads"] > 0
    assert stats["devices"][0]["lost_pages"] == 0
    box.stop()
    box.run(REMOVE)
