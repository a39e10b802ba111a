# SPDX-License-Identifier: GPL-2.0-or-later
"""Workers, supervisors and programs are replaced under load.

On a box whose service manager is systemd.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.vm.conftest import Boot
from tools.vm.channel import Silent
from tools.vm.guest import UNIT, Answers, Box, Work

SETTINGS = {"swap.size": '"1G"', "memory.reserve": '"16M"', "service.hang_timeout": "5"}
CGROUP = "/sys/fs/cgroup/load"
LIMIT_S = 120.0


def worker(box: Box) -> dict[str, Any]:
    report: dict[str, Any] = box.ctl("status")["worker"]
    return report


def main_pid(box: Box) -> int:
    return int(box.run(f"systemctl show --property=MainPID --value {UNIT}"))


def wait_for(box: Box, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
    """Wait until the daemon answers and its worker is as wished for."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done = box.machine.run("zswapctl --json status", LIMIT_S)
        if done.status == 0:
            report: dict[str, Any] = json.loads(done.output)["worker"]
            if condition(report):
                return report
        time.sleep(0.5)
    raise AssertionError(f"{what}\n{box.machine.console_tail()}")


def kill(box: Box, signal: str, *pids: int) -> None:
    box.run(f"kill -{signal} {' '.join(map(str, pids))}")


def die_in_every_way(box: Box) -> None:
    """Kill the worker, hang it, upgrade it, kill the supervisor: the next worker serves."""
    old = worker(box)
    kill(box, "KILL", old["pid"])
    old = wait_for(box, lambda now: now["pid"] != old["pid"], "no worker after SIGKILL")
    kill(box, "STOP", old["pid"])
    old = wait_for(box, lambda now: now["pid"] != old["pid"], "no worker after SIGSTOP")

    supervisor = main_pid(box)
    box.run(f"systemctl reload {UNIT}", LIMIT_S)
    old = wait_for(box, lambda now: now["pid"] != old["pid"], "no worker after an upgrade")
    assert main_pid(box) == supervisor

    kill(box, "KILL", supervisor)
    wait_for(
        box,
        lambda now: now["supervised"] and now["pid"] != old["pid"],
        "no supervisor after SIGKILL",
    )
    assert main_pid(box) not in (0, supervisor)


def die_together(box: Box) -> None:
    """Both are dead at once: what the service manager keeps is all there is."""
    old = worker(box)
    kill(box, "KILL", main_pid(box), old["pid"])
    wait_for(
        box,
        lambda now: now["supervised"] and now["pid"] != old["pid"],
        "nothing came out of the descriptor store",
    )


def is_running(work: Work) -> bool:
    try:
        work.running.wait(0.2)
    except Silent:
        return True
    return False


def check_end(box: Box, work: Work, limit: float) -> None:
    assert work.verified(limit)[-1]["mismatches"] == 0
    console = box.run("dmesg")
    assert "I/O error" not in console
    assert "blocked for more than" not in console
    requests = box.ctl("stats")["fuse"]
    # A store that finds the reserve empty is refused, and the kernel keeps the page:
    # docs/survival.md.
    assert requests["request_errors"] == requests["refused_writes"]
    assert "loop" in box.run("cat /proc/swaps")


def hang_without_a_supervisor(box: Box) -> None:
    """Kill the supervisor and stop its worker.

    The daemon that systemd starts ends the worker, and adopts the stored pages.
    """
    old = worker(box)
    box.run(f"kill -KILL {main_pid(box)}; kill -STOP {old['pid']}")
    wait_for(
        box,
        lambda now: now["supervised"] and now["pid"] != old["pid"],
        "a worker that hangs was left alone",
    )


# Linux 6.1 can neither send requests again nor keep the arena out of swap.
@pytest.mark.box
@pytest.mark.parametrize("kernel", ["new", pytest.param("old", marks=pytest.mark.vm)])
@pytest.mark.timeout(900)
def test_everything_is_replaced_under_load_and_no_byte_is_wrong(boot: Boot, kernel: str) -> None:
    box = boot(kernel=kernel, memory_mib=448)
    box.start(SETTINGS)
    box.run(f"mkdir {CGROUP} && echo 32M > {CGROUP}/memory.max")
    phases = ("fill", "verify", *("rewrite", "verify") * 2)  # a little longer than the deaths
    work = box.workload(64, *phases, same=20, before=f"echo $$ > {CGROUP}/cgroup.procs")
    box.wait_for_phase(work, "fill", LIMIT_S)

    die_in_every_way(box)
    die_together(box)
    hang_without_a_supervisor(box)

    check_end(box, work, 400)
    assert box.run(f"systemctl show --property=NRestarts --value {UNIT}").strip() == "3"
    box.run(f"rmdir {CGROUP}")


@pytest.mark.box
@pytest.mark.vm
@pytest.mark.timeout(2400)
def test_box_touched_at_twice_its_memory_survives_every_death(boot: Boot) -> None:
    box = boot(memory_mib=768)
    box.start({**SETTINGS, "swap.size": '"2G"'})
    # The first two of its phases take as long as all the deaths, or a little less.
    work = box.workload(1536, "fill", "verify", *("rewrite", "verify") * 2, limit=1800)
    pauses = random.Random(1)
    with Answers(box) as answers:
        for _ in range(4):
            for _ in range(5):
                time.sleep(pauses.uniform(2, 5))
                old = worker(box)
                kill(box, "KILL", old["pid"])
                wait_for(
                    box, lambda now, pid=old["pid"]: now["pid"] != pid, "no worker after SIGKILL"
                )  # type: ignore[misc]
            die_in_every_way(box)
        assert is_running(work), "the last of them died for nothing"
        check_end(box, work, 1800)
    print(f"slowest answers: {answers.slowest}")
    assert answers.swapped_kib == 0
    assert box.vmstat("oom_kill") == 0
