# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds and runs workload.c.

The process that is swapped out and checks every byte of what comes back.

The harness and the process go in step: after each phase it waits until the harness has read the
counters it wants, so no reading falls into a timed phase. The process joins its cgroup by itself
before it allocates, and ends by itself after the time limit; the harness kills it when it ends
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

from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SOURCE = Path(__file__).with_name("workload.c")
BUILD = Path(__file__).resolve().parents[3] / "build" / "zbench"
PHASES = ("fill", "settle", "seq", "random", "rewrite", "verify")
STEP_GRACE_S = 10.0
KILLED = "the workload was killed"
"""How the error begins when the kernel has ended it."""


def build() -> Path:
    """Compile workload.c unless this very source has been compiled; return the program.

    Raises:
        HarnessError: no C compiler, or it does not compile.
    """
    program = BUILD / f"workload-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if program.exists():
        return program
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise HarnessError("no C compiler", hint="apt-get install gcc libc6-dev")
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(
        f".{os.getpid()}"
    )  # two runs may build at once; the rename is atomic
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(SOURCE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise HarnessError(f"workload.c does not compile:\n{done.stderr}")
    fresh.rename(program)
    return program


@dataclass(frozen=True, slots=True)
class Phase:
    """What the workload reported at the end of one phase.

    Attributes:
        name: of the phase.
        pages: pages it worked on.
        seconds: it took, by the clock.
        pages_in: pages the whole machine swapped in meanwhile.
        pages_out: pages it swapped out.
        major_faults: faults of the process that waited for a page.
        mismatches: pages that differed so far, in all phases.
        more: what only this phase reports: us_mean, us_p50, us_p99, us_p999 of `random` and
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
        """Build it from the JSON object that the workload printed."""
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
    """What the workload shall do.

    Attributes:
        mib: size of its data, MiB.
        phases: in this order, out of `PHASES` (and "mixed", "generate").
        seed: of the data.
        faults: how many random pages to touch; 0 = a quarter of all.
        rewrites: how many pages to change; 0 = an eighth of all.
        warm_mib: how much the fill may write before its clock starts; what fits into the cgroup
            without swap.
        time_limit: seconds after which it ends itself.
        cpu: processor to stay on; None for any.
        poor: no page of its data compresses.
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
    """Ignore progress."""


class Workload:
    """One running workload; a context manager that starts it and makes sure it is gone.

    Args:
        options: what to do.
        cgroup: directory of the memory cgroup to join; None for none.
        on_progress: called with (phase, pages done, pages in all) some times a second.
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
        """Start it; the first phase begins at once."""
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
        # A session of its own: Ctrl-C goes to the harness, which then ends things in the right
        # order.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_exc_info: object) -> None:
        """Kill it if it still runs, and wait for it."""
        self.kill()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill it and wait until it is gone; what it had on swap is free then."""
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
        """Yield each phase as it ends; the next one starts when the caller comes back for it.

        Raises:
            HarnessError: the workload died, was killed for want of memory, or ran out of its time.
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
            raise HarnessError(KILLED, hint="for want of memory, as a rule: see dmesg")
        if end == -signal.SIGBUS:
            raise HarnessError("the workload got SIGBUS: a page could not be read back from swap")
        if end != 0:
            raise HarnessError(f"the workload ended with {end}: {words}")

    def finish(self) -> list[Phase]:
        """Run all phases that are left and return them."""
        return list(self.phases())

    def hold(self, seconds: float) -> None:
        """Keep its data where it is for `seconds`; for use between two phases.

        Raises:
            HarnessError: it died meanwhile.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process is not None and self._process.poll() is not None:
                self._check_end(self._process)
            time.sleep(0.05)
