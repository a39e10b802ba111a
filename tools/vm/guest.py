# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests' operations in a virtual machine: zswapd as a service, workloads, questions.

Each operation goes over the agent, with a time limit. The limits are long, because the guest runs
in emulation on a shared machine. They are far below twice the kernel's limit for a hung task (60 s
here, 120 s by default).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from tools.bench.harness.system import HarnessError
from tools.vm.channel import Silent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tools.vm.channel import Running
    from tools.vm.machine import Machine

COMMAND_LIMIT_S = 90.0
START_LIMIT_S = 120.0
QUESTION_S = 2.0
QUESTIONS = {
    "agent": ("", 30.0),
    "echo": ("/bin/echo yes", 60.0),
    "pid 1": ("systemctl show --property=NRestarts zswapd.service", 90.0),
}
"""The repeated questions to a machine, and the seconds in which it has to answer.

The agent has all its memory locked. The second question starts a program. The third one starts a
program that asks systemd.
"""
UNIT = "zswapd.service"
CGROUP = f"/sys/fs/cgroup/{UNIT}"


@dataclass(frozen=True, slots=True)
class Work:
    """A workload that runs in the guest.

    Attributes:
        running: the command that runs it.
        fifo: the FIFO that starts its next phase; empty without steps.
    """

    running: Running
    fifo: str

    def phases(self) -> list[dict[str, Any]]:
        """Return the phases that the workload has reported so far."""
        lines = (
            line
            for line in self.running.output.splitlines()
            if line.startswith('{"phase"') and line.endswith("}")
        )
        return [json.loads(line) for line in lines]

    def verified(self, limit: float) -> list[dict[str, Any]]:
        """Wait for the end of the workload; return its phases.

        Raises:
            Silent: it has not ended in `limit` seconds.
            HarnessError: a page differed, or the workload was killed.
        """
        self.running.wait(limit).check()
        return self.phases()


class Box:
    """A machine with zswapd in it.

    Args:
        machine: a booted machine.

    Attributes:
        cgroup: directory of the service's cgroup.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.cgroup = CGROUP
        self._fifos = 0

    def run(self, command: str, limit: float = COMMAND_LIMIT_S) -> str:
        """Run a shell command in the guest and return its output.

        Raises:
            Silent: the command has not ended in `limit` seconds.
            HarnessError: the command failed.
        """
        return self.machine.run(command, limit).check().output

    # zswapd.

    def start(self, settings: Mapping[str, str]) -> None:
        """Install zswapd as a package would, start it, follow its advice, and run swapon.

        The advice matters. With the kernel's default for vm.min_free_kbytes (2 MiB of 448), a
        machine with Linux 6.12 hangs. Its loop driver waits for memory in fuse_io_alloc, and all
        other processes wait for the loop driver.

        Args:
            settings: values by section.key, as in the config file.

        Raises:
            HarnessError: zswapd does not start, or a protection is off.
        """
        config = "".join(f"{name} = {value}\n" for name, value in settings.items())
        self.run(
            "ln -sf /opt/zvm/bin/zswapd /opt/zvm/bin/zswapctl /usr/bin/ && cp -r /opt/zvm/units/*"
            " /etc/systemd/system/ && "
            # A journal that waits for memory would lose the last lines.
            f"mkdir -p /etc/systemd/system/{UNIT}.d && printf"
            " '[Service]\\nStandardError=file:/dev/console\\nDeviceAllow=/dev/console rw\\n' >"
            f" /etc/systemd/system/{UNIT}.d/console.conf && mkdir -p /etc/zswapd && printf %s"
            f" {shlex.quote(config)} > /etc/zswapd/zswapd.toml && systemctl daemon-reload &&"
            f" systemctl start {UNIT}",
            START_LIMIT_S,
        )
        for item in self.ctl("status")["advice"]:
            if not item["on"]:
                self.run(item["hint"])
        self.run("zswapctl swapon")

    def stop(self) -> None:
        """Kill the workloads, run swapoff, and stop zswapd.

        Raises:
            HarnessError: one of these fails.
        """
        self.run(
            "pkill -KILL -x workload; while pgrep -x workload >/dev/null; do sleep 0.2; done",
            COMMAND_LIMIT_S,
        )
        self.run(f"! systemctl is-active --quiet {UNIT} || systemctl stop {UNIT}", START_LIMIT_S)
        self.run(
            f"! systemctl is-failed --quiet {UNIT} && ! grep -q loop /proc/swaps && ! grep -q"
            " zswapd /proc/mounts"
        )

    def ctl(self, command: str, limit: float = COMMAND_LIMIT_S) -> dict[str, Any]:
        """Run `zswapctl --json` and return its report.

        Raises:
            HarnessError: the command fails.
        """
        report: dict[str, Any] = json.loads(self.run(f"zswapctl --json {command}", limit))
        return report

    def processes(self) -> list[int]:
        """Return the ids of zswapd's processes."""
        return [int(line) for line in self.run(f"cat {self.cgroup}/cgroup.procs").split()]

    def swapped_kib(self) -> int:
        """Return the KiB of zswapd's own memory that are swapped out."""
        text = self.run(
            f"for pid in $(cat {self.cgroup}/cgroup.procs);"
            " do cat /proc/$pid/status 2>/dev/null || :; done"
        )
        return sum(map(int, re.findall(r"^VmSwap:\s*(\d+) kB", text, re.MULTILINE)))

    # What happens on the box.

    def confined(
        self, name: str, mib: int, limit_mib: int, *phases: str, same: int, step: bool
    ) -> Work:
        """Start a workload in a memory cgroup of its own.

        Args:
            name: the name of the cgroup below the root.
            mib: see `workload`.
            limit_mib: the limit of the cgroup in MiB.
            phases: see `workload`.
            same: see `workload`.
            step: see `workload`.
        """
        cgroup = f"/sys/fs/cgroup/{name}"
        before = (
            f"mkdir -p {cgroup} && echo {limit_mib}M > {cgroup}/memory.max"
            f" && echo $$ > {cgroup}/cgroup.procs"
        )
        return self.workload(mib, *phases, same=same, step=step, before=before)

    def swapped(self, name: str, mib: int, limit_mib: int, *, same: int) -> Work:
        """Start a confined workload that has swapped out most of its data; `verify` comes next."""
        work = self.confined(name, mib, limit_mib, "fill", "settle", "verify", same=same, step=True)
        for phase in ("fill", "settle"):
            self.wait_for_phase(work, phase, 300)
            if phase == "fill":
                self.next_phase(work)
        return work

    def workload(
        self,
        mib: int,
        *phases: str,
        same: int = 60,
        step: bool = False,
        limit: int = 900,
        before: str = "",
        service: bool = False,
    ) -> Work:
        """Start a workload.

        Args:
            mib: the size of its data in MiB.
            phases: the phases; see tools/bench/harness/workload.c.
            same: the percentage of same-filled pages. With 60 the data compresses to a sixth.
            step: wait for `next_phase` between two phases.
            limit: the seconds after which it ends itself.
            before: shell commands to run in its process first, for example to enter a cgroup.
            service: run it as an ordinary service, which systemd stops at shutdown; its end is not
                reported. Otherwise it is a child of the agent, which stays.
        """
        self._fifos += 1
        fifo = f"/run/workload-{self._fifos}" if step else ""
        command = (
            f"/opt/zvm/bin/workload --mib {mib} --same {same} --phases {','.join(phases)}"
            f" --time-limit {limit}"
        )
        if step:
            command = (
                f"mkfifo {fifo} && exec 3<>{fifo} && {before or ':'} && exec {command} --step <&3"
            )
        elif before:
            command = f"{before} && exec {command}"
        if service:
            # A unit file, because systemd-run needs D-Bus to pass the output on.
            name = f"workload-{self._fifos}"
            unit = (
                "[Service]\nExecStart=/bin/sh"
                f" /run/{name}.sh\nStandardOutput=file:/run/{name}.out\n"
            )
            command = (
                f"printf %s {shlex.quote(command)} > /run/{name}.sh && printf %s"
                f" {shlex.quote(unit)} > /run/systemd/system/{name}.service && systemctl"
                f" daemon-reload && systemctl start {name}.service && exec tail -n +1 -F"
                f" /run/{name}.out"
            )
        return Work(self.machine.start(command), fifo)

    def next_phase(self, work: Work) -> None:
        """Start the next phase of a workload."""
        self.run(f"echo > {work.fifo}")

    def wait_for_phase(self, work: Work, name: str, limit: float) -> None:
        """Wait until a workload has reported a phase.

        Raises:
            HarnessError: the workload ended before, or `limit` seconds passed.
        """
        for _ in range(int(limit * 5)):
            if any(phase["phase"] == name for phase in work.phases()):
                return
            with contextlib.suppress(Silent):
                done = work.running.wait(0.2)
                raise HarnessError(
                    f"the workload ended with {done.status} before it reported {name!r}:"
                    f" {done.output}"
                )
        raise Silent(
            f"the workload has not reported {name!r} after {limit:.0f} s: {work.running.output}"
        )

    def vmstat(self, name: str) -> int:
        """Return a counter of the guest's kernel."""
        found = re.search(rf"^{name} (\d+)$", self.run("cat /proc/vmstat"), re.MULTILINE)
        return int(found[1]) if found else 0


class Answers:
    """A context manager whose thread asks a machine repeatedly whether it answers.

    Args:
        box: the machine.

    Attributes:
        slowest: the seconds of the slowest answer, by question.
        asked: the number of questions that were answered in time.
        swapped_kib: the largest part of zswapd that was swapped out, in KiB.
    """

    def __init__(self, box: Box) -> None:
        self.slowest = dict.fromkeys(QUESTIONS, 0.0)
        self.asked = 0
        self.swapped_kib = 0
        self._box = box
        self._error: HarnessError | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="answers", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """End the thread.

        Raises:
            Silent: the machine did not answer in time, and the body raised no exception.
        """
        self._end.set()
        self._thread.join(sum(limit for _, limit in QUESTIONS.values()) + COMMAND_LIMIT_S)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise an exception if the machine failed to answer.

        Raises:
            Silent: the machine did not answer in time.
        """
        if self._error is not None:
            raise self._error

    def _ask(self) -> None:
        try:
            while not self._end.wait(QUESTION_S):
                for name, (command, limit) in QUESTIONS.items():
                    seconds = (
                        self._box.machine.run(command, limit).seconds
                        if command
                        else self._box.machine.channel.ping(limit)
                    )
                    self.slowest[name] = max(self.slowest[name], seconds)
                    self.asked += 1
                self.swapped_kib = max(self.swapped_kib, self._box.swapped_kib())
        except HarnessError as error:
            self._error = error
