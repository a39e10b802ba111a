# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface of an application.

An application names its levels of memory pressure. It is prepared once, and then runs at one level
in a given cgroup.
"""

from __future__ import annotations

import abc
import contextlib
import os
import resource
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BUILD = Path(__file__).resolve().parents[3] / "build" / "zbench"
"""The directory for the sources and results of applications."""

END_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Level:
    """One level of memory pressure.

    Attributes:
        name: the name in the table.
        amount: the number of jobs, MiB or tabs; the unit depends on the application.
        memory_mib: the limit of the memory cgroup in MiB; None for no cgroup and no pressure.
    """

    name: str
    amount: int
    memory_mib: int | None


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of an application: its heading in the table, and whether more is better."""

    heading: str
    more_is_better: bool = False


class TooSlowError(HarnessError):
    """A run did not end within its time limit.

    Args:
        limit: the time limit in seconds.
        figures: the known bounds: lower bounds of times, upper bounds of speeds.
    """

    def __init__(self, limit: float, figures: Mapping[str, float]) -> None:
        super().__init__(f"not done after {limit:.0f} s")
        self.figures = dict(figures)


class Application(abc.ABC):
    """One workload, which is prepared once and then runs many times.

    Attributes:
        name: the name on the command line and in the documents.
        contenders: the contenders to compare by default.
        levels, short: the levels of a measurement, and of a trial that takes seconds.
        columns: the column of each figure; the plot shows the first two.
        rounds: the number of runs of each contender by default.
    """

    name: ClassVar[str]
    contenders: ClassVar[Sequence[str]] = (
        "none",
        "file-slow",
        "file",
        "zram-lz4",
        "nbdkit-zstd",
        "zswapd",
    )
    levels: ClassVar[Sequence[Level]]
    short: ClassVar[Sequence[Level]]
    columns: ClassVar[Mapping[str, Column]]
    rounds: ClassVar[int] = 3

    @abc.abstractmethod
    def missing(self) -> str:
        """Return why the application cannot run here, or an empty string."""

    @abc.abstractmethod
    def prepare(self, *, quick: bool) -> None:
        """Fetch and build what all runs need, before the first run and in no cgroup.

        Args:
            quick: prepare only for the levels in `short`.

        Raises:
            HarnessError: a source or a program is not available.
        """

    @abc.abstractmethod
    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Run once and verify the result.

        Args:
            level: the level of pressure.
            cgroup: the directory of the memory cgroup for the processes; None for none.
            limit: the time limit in seconds.

        Returns:
            The figures by name.

        Raises:
            TooSlowError: the run took longer than `limit`.
            HarnessError: the run failed, or its result is wrong.
        """


def in_cgroup(cgroup: Path | None, command: Sequence[str | Path]) -> list[str]:
    """Return a command that joins `cgroup` and then runs `command`."""
    words = [str(word) for word in command]
    if cgroup is None:
        return words
    return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(cgroup / "cgroup.procs"), *words]


def children_cpu() -> float:
    """Return the processor seconds of all waited-for descendants of this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def running(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own while the body runs; then kill the session."""
    with subprocess.Popen(command, start_new_session=True, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(END_LIMIT_S)
