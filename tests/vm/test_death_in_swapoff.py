# SPDX-License-Identifier: GPL-2.0-or-later
"""All processes of zswapd are killed at once in the middle of swapoff.

While a program reads its pages.

In a virtual machine: until a daemon serves again, every process that needs a page waits, and a page
that is lost may be a page of any process.
"""

from __future__ import annotations

import re
import signal
import time
from typing import NamedTuple

import pytest

from tests.vm.conftest import Boot
from tools.vm.channel import Running
from tools.vm.guest import Box, Work
from zswapd.errors import SwapDeviceError

SETTINGS = {"swap.size": '"512M"', "memory.reserve": '"48M"'}
PROGRAM = "/usr/bin/zswapd"
DATA_MIB, LIMIT_MIB = 48, 24
LIMIT_S = 240.0
BOUND_S = 120.0
"""Time in which swapoff, and every thread that waits for the device, has to come to an end.

Emulated.
"""
CONNECTIONS = "/sys/fs/fuse/connections"
OUTAGE_S = 8.0
"""Time without a program that could serve."""


class Swapoff(NamedTuple):
    """A swapoff that is under way.

    Attributes:
        running: `zswapctl swapoff`.
        reader: a workload that reads its pages meanwhile.
        idle: one that does nothing.
    """

    running: Running
    reader: Work
    idle: Work


def swapped(box: Box, name: str) -> Work:
    """Start a workload that has swapped out most of its data, and then lift its limit."""
    work = box.swapped(name, DATA_MIB, LIMIT_MIB, same=20)
    box.run(f"echo max > /sys/fs/cgroup/{name}/memory.max")
    return work


def used_kib(box: Box) -> int:
    """Return how much is swapped out to a loop device, 0 without one."""
    found = re.search(
        r"^/dev/loop\S+\s+\S+\s+\d+\s+(\d+)", box.run("cat /proc/swaps"), re.MULTILINE
    )
    return int(found[1]) if found else 0


def half_done(box: Box) -> Swapoff:
    """Begin to swap off and to read, and wait until a part is done."""
    reader, idle = swapped(box, "reader"), swapped(box, "idle")
    before = used_kib(box)
    assert before > DATA_MIB << 9
    off = box.machine.start("zswapctl swapoff --force")
    box.next_phase(reader)
    end = time.monotonic() + LIMIT_S
    while used_kib(box) > before * 0.9:
        assert not off.ended, off.output
        assert time.monotonic() < end, f"{used_kib(box)} of {before} KiB are left"
    assert not off.ended, off.output
    return Swapoff(off, reader, idle)


def waiting(box: Box) -> str:
    """Return the threads that wait and cannot be interrupted, one a line."""
    return box.run("ps -eLo state,lwp,comm,wchan:32 --no-headers | grep '^D' || :")


def kill_all(box: Box) -> None:
    """Kill supervisor, worker and spare at once, where no program can be started in their place."""
    box.run(f"ln -sf /bin/false {PROGRAM}")
    assert len(box.processes()) == 3
    box.run(f"kill -KILL $(cat {box.cgroup}/cgroup.procs)")


def repair(box: Box) -> None:
    """Have the program there again, which systemd tries to start all the time."""
    box.run(f"ln -sf /opt/zvm/bin/zswapd {PROGRAM}")


def check_that_no_thread_waits(box: Box) -> None:
    """Look for threads that wait for a device, twice: one may do so for a moment."""
    first = set(waiting(box).splitlines())
    still = first and first & set(waiting(box).splitlines())
    assert not still, still
    assert "blocked for more than" not in box.run("dmesg")


def goes_on_when_the_next_daemon_serves(box: Box) -> None:
    off = half_done(box)

    kill_all(box)
    end = time.monotonic() + OUTAGE_S
    while time.monotonic() < end:
        box.machine.channel.ping(30)
    print(waiting(box))  # swapoff and the reader, in folio_wait_bit_common
    assert not off.running.ended
    assert used_kib(box) > 0
    repair(box)

    off.running.wait(BOUND_S).check()
    assert used_kib(box) == 0
    box.next_phase(off.idle)
    for work in (off.reader, off.idle):
        box.next_phase(work)  # it may end
        assert work.verified(BOUND_S)[-1]["mismatches"] == 0
    assert box.ctl("status")["worker"]["supervised"]
    assert "I/O error" not in box.run("dmesg")
    check_that_no_thread_waits(box)


def ends_when_the_connection_is_aborted(box: Box) -> None:
    off = half_done(box)
    mount = box.run("grep ' fuse.zswapd ' /proc/self/mountinfo")
    connection = f"{CONNECTIONS}/{mount.split()[2].partition(':')[2]}"

    kill_all(box)
    box.run(
        f"test -e {connection} || mount -t fusectl none {CONNECTIONS}; echo 1 > {connection}/abort"
    )

    done = off.running.wait(BOUND_S)
    assert done.status == SwapDeviceError.exit_code
    assert "are lost" in done.output
    assert used_kib(box) == 0
    if not off.idle.running.ended:
        box.machine.run(
            f"timeout 10 sh -c 'echo > {off.idle.fifo}'", BOUND_S
        )  # if it has ended, no process reads that
    assert [work.running.wait(BOUND_S).status for work in (off.reader, off.idle)] == [
        -signal.SIGBUS,
        -signal.SIGBUS,
    ]
    check_that_no_thread_waits(box)
    # What is started next finds a dead connection in systemd's store, and ends; the one after it
    # makes another one.
    repair(box)
    end = time.monotonic() + LIMIT_S
    while box.machine.run("zswapctl swapon", LIMIT_S).status != 0:
        assert time.monotonic() < end, box.machine.console_tail()
        time.sleep(1)


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(1800)
def test_swapoff_whose_daemon_is_killed_goes_on_with_the_next_one_or_says_that_pages_are_lost(
    boot: Boot,
) -> None:
    box = boot(memory_mib=768)
    box.start(SETTINGS)
    goes_on_when_the_next_daemon_serves(box)
    box.run("zswapctl swapon")
    ends_when_the_connection_is_aborted(box)
