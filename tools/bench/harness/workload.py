# SPDX-License-Identifier: GPL-2.0-or-later
"""The workload: it builds and runs workload.c, the process that is swapped.

The process checks every byte that comes back from swap. It waits after each phase until the harness
has read its counters, so no reading falls into a timed phase. The process joins its cgroup before
it allocates, and ends itself after the time limit. The harness kills it when the harness ends
first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tools.bench.harness import system
from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SOURCE = Path(__file__).with_name("workload.c")
BUILD = Path(__file__).resolve().parents[3] / "build" / "zbench"
PHASES = ("fill", "settle", "seq", "random", "rewrite", "verify")
STEP_GRACE_S = 10.0
KILLED = "the workload was killed"
"""The begin of the error when the kernel killed the workload."""


def build() -> Path:
    """Compile workload.c unless this version is compiled already; return the program's path.

    Raises:
        HarnessError: there is no C compiler, or workload.c does not compile.
    """
    program = BUILD / f"workload-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise HarnessError("no C compiler", hint="apt-get install gcc libc6-dev")
    BUILD.mkdir(parents=True, exist_ok=True)
    # Two runs may build at once; the rename is atomic.
    fresh = program.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(SOURCE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise HarnessError(f"workload.c does not compile:\n{done.stderr}")
    fresh.rename(program)
    return program


@dataclass(frozen=True, slots=True)
class Phase:
    """The workload's report at the end of one phase.

    Attributes:
        name: the name of the phase.
        pages: the pages that the phase worked on.
        seconds: its time by the clock.
        pages_in: the pages that the whole machine swapped in meanwhile.
        pages_out: the pages that the whole machine swapped out meanwhile.
        major_faults: the faults of the process that waited for a page.
        mismatches: the pages that differed so far, in all phases.
        more: the values of single phases: us_mean, us_p50, us_p99, us_p999 of `random` and
            `mixed`; resident of `settle`.
    """

    name: str
    pages: int
    seconds: float
    pages_in: int
    pages_out: int
    major_faults: int
    mismatches: int
    more: Mapping[str, float]

    @classmethod
    def parse(cls, line: Mapping[str, Any]) -> Self:
        """Return a phase from the workload's JSON object."""
        known = {
            "phase",
            "pages",
            "seconds",
            "pswpin",
            "pswpout",
            "major_faults",
            "minor_faults",
            "mismatches",
        }
        more = {name: float(value) for name, value in line.items() if name not in known}
        return cls(
            line["phase"],
            line["pages"],
            line["seconds"],
            line["pswpin"],
            line["pswpout"],
            line["major_faults"],
            line["mismatches"],
            more,
        )


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """The options of a workload.

    Attributes:
        mib: the size of its data in MiB.
        phases: the phases in their order, out of `PHASES`, "mixed" and "generate".
        seed: the seed of the data.
        faults: the number of random pages to touch; 0 means a quarter of all.
        rewrites: the number of pages to change; 0 means an eighth of all.
        warm_mib: MiB that the fill writes before its clock starts, which fit into the cgroup
            without swap.
        time_limit: the seconds after which it ends itself.
        cpu: the processor to stay on; None for any.
        poor: whether its data does not compress.
    """

    mib: int
    phases: tuple[str, ...] = PHASES
    seed: int = 1
    faults: int = 0
    rewrites: int = 0
    warm_mib: int = 0
    time_limit: int = 600
    cpu: int | None = None
    poor: bool = False


def _nothing(phase: str, done: int, total: int) -> None:
    """Drop a report of progress."""


class Workload:
    """A context manager that starts a workload and kills it at the end.

    Args:
        options: the options of the workload.
        cgroup: the directory of the memory cgroup to join; None for none.
        on_progress: called with (phase, pages done, all pages) several times a second.
    """

    def __init__(
        self,
        options: WorkloadOptions,
        cgroup: Path | None,
        *,
        on_progress: Callable[[str, int, int], None] = _nothing,
    ) -> None:
        self._options = options
        self._cgroup = cgroup
        self._on_progress = on_progress
        self._process: subprocess.Popen[str] | None = None
        self.mismatches = 0

    def __enter__(self) -> Self:
        """Start the workload; its first phase begins at once."""
        options = self._options
        command = [
            str(build()),
            "--step",
            "--mib",
            str(options.mib),
            "--phases",
            ",".join(options.phases),
        ]
        command += ["--seed", str(options.seed), "--time-limit", str(options.time_limit)]
        command += ["--faults", str(options.faults), "--rewrites", str(options.rewrites)]
        command += ["--warm-mib", str(options.warm_mib)]
        if options.cpu is not None:
            command += ["--cpu", str(options.cpu)]
        if options.poor:
            command.append("--poor")
        if self._cgroup is not None:
            command += ["--cgroup", str(self._cgroup)]
        if self._on_progress is not _nothing:
            command.append("--progress")
        # With a session of its own, Ctrl-C reaches the harness only, which ends all processes in
        # the right order.
        try:
            with system.signals_delayed() as in_child:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                    preexec_fn=in_child,  # noqa: PLW1509 - one system call
                )
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Kill the workload if it still runs, and wait for its end."""
        self.kill()

    @property
    def pid(self) -> int:
        """The process id of the workload."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the workload and wait for its end, which frees its swap slots."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STEP_GRACE_S)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def phases(self) -> Iterator[Phase]:
        """Yield each phase at its end; the next one starts when the caller asks for it.

        Raises:
            HarnessError: the workload died, the OOM killer killed it, or its time limit passed.
        """
        process = self._process
        assert process is not None
        assert process.stdout is not None
        assert process.stdin is not None
        for text in process.stdout:
            line = json.loads(text)
            if "progress" in line:
                self._on_progress(line["progress"], line["done"], line["total"])
                continue
            phase = Phase.parse(line)
            self.mismatches = phase.mismatches
            yield phase
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
        self._check_end(process)

    def _check_end(self, process: subprocess.Popen[str]) -> None:
        end = process.wait(timeout=STEP_GRACE_S)
        assert process.stderr is not None
        words = process.stderr.read().strip()
        if end == 1:
            raise HarnessError(f"DATA WAS LOST: {self.mismatches} pages differ\n{words}")
        if end == -signal.SIGALRM:
            raise HarnessError(f"the workload was not done after its {self._options.time_limit} s")
        if end == -signal.SIGKILL:
            raise HarnessError(KILLED, hint="most often by the OOM killer: see dmesg")
        if end == -signal.SIGBUS:
            raise HarnessError("the workload got SIGBUS: a page could not be read back from swap")
        if end != 0:
            raise HarnessError(f"the workload ended with {end}: {words}")

    def finish(self) -> list[Phase]:
        """Run the remaining phases and return them."""
        return list(self.phases())

    def hold(self, seconds: float) -> None:
        """Wait between two phases for `seconds`, in which the data stays where it is.

        Raises:
            HarnessError: the workload died meanwhile.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process is not None and self._process.poll() is not None:
                self._check_end(self._process)
            time.sleep(0.05)
