# SPDX-License-Identifier: GPL-2.0-or-later
"""Which threads are real-time tasks, and when; and what a forked process still shares.

Each case runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from tests.support import capabilities
from zswapd.fuse.session import MemoryMonitor
from zswapd.system.scheduling import NICE, scarce_bytes

pytestmark = capabilities.requires_root()


def said(code: str) -> list[str]:
    """Run a program; return the words that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"if True:{code}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("kind", "policy", "nice"),
    [("nice", "SCHED_OTHER", NICE), ("rr", "SCHED_RR", 0), ("normal", "SCHED_OTHER", 0)],
)
def test_scheduling_is_as_asked_and_a_thread_can_step_back(
    kind: str, policy: str, nice: int
) -> None:
    words = said(f"""
        import os, threading
        from zswapd.system.protections import _set_scheduling
        from zswapd.system.scheduling import set_nice
        item = _set_scheduling({kind!r})
        def seen():
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            return os.sched_getscheduler(0), nice
        inside = []
        def work():
            for needed in (False, True):
                set_nice(needed=needed); inside.append(seen())
        thread = threading.Thread(target=work); thread.start(); thread.join()
        expected = [(os.SCHED_OTHER, 0), (os.SCHED_OTHER, {NICE})]
        print(item.on, seen() == (os.{policy}, {nice}), inside == expected)
    """)
    assert words == [str(kind != "normal"), "True", "True"]


def test_first_in_line_is_real_time_and_so_is_what_it_starts() -> None:
    words = said("""
        import os, threading
        from zswapd.system import set_realtime, set_normal
        set_realtime()
        seen = [os.sched_getscheduler(0)]
        thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
        thread.start(); thread.join()
        if not (child := os.fork()):
            os._exit(os.sched_getscheduler(0))
        seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        set_normal()
        print(seen == [os.SCHED_RR] * 3, os.sched_getscheduler(0) == os.SCHED_OTHER)
    """)
    assert words == ["True", "True"]


def test_child_that_nobody_waits_for_begins_as_an_ordinary_task_and_goes_last() -> None:
    words = said("""
        import os
        from zswapd.system import set_realtime, ordinary_children, set_idle_priority
        set_realtime()
        def child(work=lambda: None):
            if not (pid := os.fork()):
                work()
                os._exit(os.sched_getscheduler(0))
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with ordinary_children():
            own = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
            seen = [child(), child(set_idle_priority), own]
        print(seen == [os.SCHED_OTHER, os.SCHED_IDLE, os.SCHED_RR],
              child() == os.sched_getscheduler(0) == os.SCHED_RR)
    """)
    assert words == ["True", "True"]


def test_session_thread_is_real_time_while_memory_is_scarce() -> None:
    words = said("""
        import os
        from zswapd.fuse import lowlevel
        lowlevel.attach(len, len, len, poll_us=0, budget_us=1000, max_io=4096, max_background=1)
        def policy(free_bytes):
            lowlevel.set_scarce(free_bytes)
            return os.sched_getscheduler(0)
        everything = 1 << 50
        print(policy(everything) == os.SCHED_RR, policy(1) == os.SCHED_OTHER,
              policy(everything) == os.SCHED_RR,
              policy(0) == os.SCHED_RR, lowlevel.statistics()["scarcities"])
    """)
    assert words == ["True", "True", "True", "True", "2"]


def test_event_loop_looks_at_free_memory_each_time_before_its_tasks_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[str] = []
    monkeypatch.setattr(
        "zswapd.fuse.session.lowlevel", SimpleNamespace(check_memory=lambda: looks.append("look"))
    )

    async def main() -> None:
        for _ in range(3):
            await trio.sleep(0.001)
            looks.append("task")

    trio.run(main, instruments=[MemoryMonitor()])
    assert "".join(looks).count("looktask") == 3


def test_session_thread_that_came_as_a_real_time_one_stands_back_when_there_is_memory() -> None:
    words = said("""
        import os
        from zswapd.fuse import lowlevel
        from zswapd.system import set_realtime
        lowlevel.attach(len, len, len, poll_us=0, budget_us=1000, max_io=4096, max_background=1)
        set_realtime()
        lowlevel.set_scarce(1)
        print(os.sched_getscheduler(0) == os.SCHED_OTHER)
    """)
    assert words == ["True"]


def test_scarce_is_half_as_much_again_as_the_kernel_keeps_free(tmp_path: Path) -> None:
    assert scarce_bytes(tmp_path) == 0
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/min_free_kbytes").write_text("65536\n")
    assert scarce_bytes(tmp_path) == (96 + 16) << 20


@pytest.mark.parametrize("owned", [False, True])
def test_forked_process_copies_no_page_once_it_owns_its_memory(owned: bool) -> None:
    """Writing to what was inherited takes pages from the kernel, one fault each.

    Unless they were copied before.
    """
    words = said(f"""
        import ctypes, os, resource
        from zswapd.system.heap import own_memory
        inherited = [bytes([number & 255]) * 400 for number in range(20_000)]
        if not (child := os.fork()):
            copied = own_memory(ctypes.CDLL(None)) if {owned} else 0
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            again = list(inherited)  # a new reference to each: a write to each
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            print(copied >> 20, faults, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    """)
    copied, faults = map(int, words)
    assert (copied >= 8) is owned
    assert faults < 60 if owned else faults > 1500
