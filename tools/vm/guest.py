# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests do in a virtual machine, in their terms.

Zswapd as a service, a workload, and "does the box answer?".

Everything is asked for over the agent, with a time limit. The limits are generous, because the
guest runs in emulation on a machine that others use as well; but they are far below what the kernel
calls a hung task (60 s here, 120 s by default) times two.
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
"""What is asked of a box again and again, and in how many seconds it has to answer.

The agent, which has all it needs in memory; a program that has to be started; systemd, by a program
that has to be started.
"""
UNIT = "zswapd.service"
CGROUP = f"/sys/fs/cgroup/{UNIT}"


@dataclass(frozen=True, slots=True)
class Work:
    """A workload that runs in the guest.

    Attributes:
        running: the command.
        fifo: what is written to lets it go on to its next phase; empty without steps.
    """

    running: Running
    fifo: str

    def phases(self) -> list[dict[str, Any]]:
        """Return what it has reported so far."""
        lines = (
            line
            for line in self.running.output.splitlines()
            if line.startswith('{"phase"') and line.endswith("}")
        )
        return [json.loads(line) for line in lines]

    def verified(self, limit: float) -> list[dict[str, Any]]:
        """Wait for its end; return its phases.

        Raises:
            Silent: it has not ended in `limit` seconds.
            HarnessError: a page differed, or it was killed.
        """
        self.running.wait(limit).check()
        return self.phases()


class Box:
    """A machine with zswapd in it.

    Args:
        machine: one that is up.

    Attributes:
        cgroup: directory of the service's cgroup.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.cgroup = CGROUP
        self._fifos = 0

    def run(self, command: str, limit: float = COMMAND_LIMIT_S) -> str:
        """Run a shell command in the guest and return what it said.

        Raises:
            Silent: it has not ended in `limit` seconds.
            HarnessError: it failed.
        """
        return self.machine.run(command, limit).check().output

    # zswapd.

    def start(self, settings: Mapping[str, str]) -> None:
        """Install zswapd as a package would, start it, do what it advises, and swap on.

        The advice matters: with the kernel's own vm.min_free_kbytes (2 MiB of 448) a box with Linux
        6.12 hangs, its loop
        driver waiting for memory in fuse_io_alloc while all else waits for the loop driver.

        Args:
            settings: section.key → value as in the config file.

        Raises:
            HarnessError: it does not start, or a protection is off.
        """
        config = "".join(f"{name} = {value}\n" for name, value in settings.items())
        self.run(
            "ln -sf /opt/zvm/bin/zswapd /opt/zvm/bin/zswapctl /usr/bin/ && cp -r /opt/zvm/units/*"
            " /etc/systemd/system/ && "
            # A journal that waits for memory itself tells nothing of the end.
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
        """Kill the workloads, swap off and stop zswapd.

        Raises:
            HarnessError: something of it fails.
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
            HarnessError: it fails.
        """
        report: dict[str, Any] = json.loads(self.run(f"zswapctl --json {command}", limit))
        return report

    def processes(self) -> list[int]:
        """Return the ids of zswapd's processes."""
        return [int(line) for line in self.run(f"cat {self.cgroup}/cgroup.procs").split()]

    def swapped_kib(self) -> int:
        """Return how much of zswapd itself is swapped out."""
        text = self.run(
            f"for pid in $(cat {self.cgroup}/cgroup.procs); do cat /proc/$pid/status 2>/dev/null || :; done"
        )
        return sum(map(int, re.findall(r"^VmSwap:\s*(\d+) kB", text, re.MULTILINE)))

    # What happens on the box.

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
            mib: of its data.
            phases: see tools/bench/harness/workload.c.
            same: percentage of same-filled pages. With 60 the data compresses to a sixth.
            step: wait for `next_phase` between two phases.
            limit: seconds after which it ends itself.
            before: shell commands to run in its process first, to enter a cgroup for example.
            service: as an ordinary service, which systemd stops at shutdown, and whose end nobody
                sees. Otherwise it is a child of the agent, which stays.
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
            # By hand, since systemd-run wants a D-Bus to pass the output on.
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
        """Let a workload go on."""
        self.run(f"echo > {work.fifo}")

    def wait_for_phase(self, work: Work, name: str, limit: float) -> None:
        """Wait until a workload has reported a phase.

        Raises:
            HarnessError: it ended before, or `limit` seconds passed.
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
    """Asks a box again and again whether it answers; a context manager.

    Args:
        box: to be asked.

    Attributes:
        slowest: seconds, by question.
        asked: how many questions were answered in time.
        swapped_kib: the most of zswapd that was swapped out at any time.
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
        """Begin to ask."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        """End it.

        Raises:
            Silent: the box did not answer in time, and nothing else went wrong.
        """
        self._end.set()
        self._thread.join(sum(limit for _, limit in QUESTIONS.values()) + COMMAND_LIMIT_S)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Do nothing if the box has answered each time.

        Raises:
            Silent: it has not.
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
