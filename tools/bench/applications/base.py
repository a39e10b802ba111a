# SPDX-License-Identifier: GPL-2.0-or-later
"""What an application is: it names its levels of pressure, is made ready once.

And runs at one of them in a given cgroup.
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
"""Where sources and results of applications lie."""

END_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Level:
    """One level of pressure.

    Attributes:
        name: for the table.
        amount: how much of it: jobs, MiB, tabs; what it means is the application's.
        memory_mib: limit of the memory cgroup; None for no cgroup at all, hence no pressure.
    """

    name: str
    amount: int
    memory_mib: int | None


@dataclass(frozen=True, slots=True)
class Column:
    """A figure that an application yields.

    How the table names it, and whether more of it is better.
    """

    heading: str
    more_is_better: bool = False


class TooSlowError(HarnessError):
    """A run was not done within its time.

    Args:
        figures: what is known: lower bounds of times, upper ones of speeds.
    """

    def __init__(self, limit: float, figures: Mapping[str, float]) -> None:
        super().__init__(f"not done after {limit:.0f} s")
        self.figures = dict(figures)


class Application(abc.ABC):
    """One workload. Made ready once, then run many times.

    Attributes:
        contenders: who is compared if the user names nobody.
        levels, short: the levels of a measurement, and of a trial that takes seconds.
        columns: figure → its column; the first one is drawn.
        rounds: how often each contender runs, if the user does not say.
    """

    name: ClassVar[str]
    contenders: ClassVar[Sequence[str]]
    levels: ClassVar[Sequence[Level]]
    short: ClassVar[Sequence[Level]]
    columns: ClassVar[Mapping[str, Column]]
    rounds: ClassVar[int] = 3

    @abc.abstractmethod
    def missing(self) -> str:
        """Return why it cannot run here, or an empty string."""

    @abc.abstractmethod
    def prepare(self, *, quick: bool) -> None:
        """Fetch and make what all runs need; before the first run, in no cgroup.

        Args:
            quick: for the levels in `short`.

        Raises:
            HarnessError: it cannot be had.
        """

    @abc.abstractmethod
    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Run once and verify the result.

        Args:
            level: how much.
            cgroup: directory of the memory cgroup for its processes; None for none.
            limit: seconds it may take.

        Raises:
            TooSlowError: it took longer.
            HarnessError: it failed, or its result is wrong.
        """


def in_cgroup(cgroup: Path | None, command: Sequence[str | Path]) -> list[str]:
    """Return a command that joins `cgroup` before it becomes `command`."""
    words = [str(word) for word in command]
    if cgroup is None:
        return words
    return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(cgroup / "cgroup.procs"), *words]


def children_cpu() -> float:
    """Return the processor time, seconds, of all processes that this one has waited for.

    And that those have waited for.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def running(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a session of its own while the body runs.

    All of that session is killed at its end.
    """
    with subprocess.Popen(command, start_new_session=True, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(END_LIMIT_S)
