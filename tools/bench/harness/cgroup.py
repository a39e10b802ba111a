# SPDX-License-Identifier: GPL-2.0-or-later
"""A memory cgroup of its own for a workload, so that it swaps and nothing else on the machine does.

Works with both layouts: v1 (`memory` hierarchy, memory.limit_in_bytes) and v2 (memory.max, with the
controller switched on in the root's cgroup.subtree_control). The directory lies at the top of the
hierarchy, is named after this process, and is removed on exit after all that is left in it was
killed.

On v1 the limit covers memory alone; memory+swap stays unlimited. On v2 memory.swap.max is unlimited
by default.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.harness.system import HarnessError

if TYPE_CHECKING:
    from types import TracebackType

REMOVE_LIMIT_S = 10.0


def memory_hierarchy(root: Path = Path("/")) -> tuple[Path, int]:
    """Return where memory cgroups are made, and the version (1 or 2) of that hierarchy.

    Args:
        root: what to look below; tests give a made-up tree.

    Raises:
        HarnessError: this system has no memory controller that can be used.
    """
    second: Path | None = None
    for line in (root / "proc/self/mounts").read_text().splitlines():
        _, place, fstype, options, *_ = line.split()
        path = root / place.lstrip("/")
        if fstype == "cgroup" and "memory" in options.split(","):
            return path, 1
        if fstype == "cgroup2" and "memory" in (path / "cgroup.controllers").read_text().split():
            second = path
    if second is None:
        raise HarnessError(
            "no memory cgroup controller is available",
            hint="mount cgroup v2 at /sys/fs/cgroup, or boot without cgroup_disable=memory",
        )
    return second, 2


class MemoryCgroup:
    """A memory cgroup; a context manager that makes and removes it.

    Args:
        name: what it is for; the directory is `zswapd-<name>-<pid>`.
        limit: bytes its processes may have in memory.
        root: see `memory_hierarchy`.
    """

    def __init__(self, name: str, limit: int, *, root: Path = Path("/")) -> None:
        hierarchy, self._version = memory_hierarchy(root)
        self._hierarchy = hierarchy
        self.path = hierarchy / f"zswapd-{name}-{os.getpid()}"
        self._limit = limit

    def __enter__(self) -> MemoryCgroup:
        """Make it.

        Raises:
            HarnessError: not root, or the controller cannot be switched on.
        """
        try:
            if self._version == 2:
                self._enable_controller()
            self.path.mkdir()
            self.set_limit(self._limit)
        except OSError as exc:
            self.remove()
            hint = (
                "it takes root"
                if os.geteuid()
                else "in a container, it takes a writable /sys/fs/cgroup"
            )
            raise HarnessError(
                f"cannot make the memory cgroup {self.path}: {exc.strerror}", hint=hint
            ) from exc
        return self

    def _enable_controller(self) -> None:
        control = self._hierarchy / "cgroup.subtree_control"
        if "memory" not in control.read_text().split():
            control.write_text("+memory")

    def set_limit(self, limit: int) -> None:
        """Set the limit to `limit` bytes; the kernel reclaims the excess before this returns."""
        name = "memory.limit_in_bytes" if self._version == 1 else "memory.max"
        (self.path / name).write_text(str(limit))

    def usage(self) -> int:
        """Return how many bytes its processes have in memory now."""
        name = "memory.usage_in_bytes" if self._version == 1 else "memory.current"
        return int((self.path / name).read_text())

    def oom_kills(self) -> int:
        """Return how often the kernel killed a process of this cgroup for want of memory."""
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        match = re.search(r"^oom_kill (\d+)$", (self.path / name).read_text(), re.MULTILINE)
        return int(match[1]) if match else 0

    def processes(self) -> list[int]:
        """Return the ids of the processes in it."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Kill what is left in it and remove it; does nothing when it is gone.

        Raises:
            HarnessError: a process in it does not die; it waits for a device that does not answer,
                as a rule.
        """
        end = time.monotonic() + REMOVE_LIMIT_S
        while self.path.exists():
            try:
                self.path.rmdir()
            except OSError as exc:
                if time.monotonic() > end:
                    raise HarnessError(
                        f"cannot remove {self.path}: {exc.strerror}, {self.processes()} in it"
                    ) from exc
                for pid in self.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove it."""
        self.remove()
