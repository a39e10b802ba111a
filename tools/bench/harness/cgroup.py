# SPDX-License-Identifier: GPL-2.0-or-later
"""A memory cgroup for a workload, so that only the workload swaps.

It works with both versions: v1 (`memory` hierarchy, memory.limit_in_bytes) and v2 (memory.max, with
the controller enabled in the root's cgroup.subtree_control). The directory is at the top of the
hierarchy and has this process's id in its name. The exit kills all processes in it and removes it.

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

from tools.bench.harness.system import HarnessError

REMOVE_LIMIT_S = 10.0


def memory_hierarchy(root: Path = Path("/")) -> tuple[Path, int]:
    """Return the directory of the memory hierarchy, and its version (1 or 2).

    Args:
        root: the root directory; tests give a made-up tree.

    Raises:
        HarnessError: this system has no usable memory controller.
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
    """A context manager that makes and removes a memory cgroup.

    Args:
        name: its purpose; the directory is `zswapd-<name>-<pid>`.
        limit: the memory limit in bytes.
        root: see `memory_hierarchy`.
    """

    def __init__(self, name: str, limit: int, *, root: Path = Path("/")) -> None:
        hierarchy, self._version = memory_hierarchy(root)
        self._hierarchy = hierarchy
        self.path = hierarchy / f"zswapd-{name}-{os.getpid()}"
        self._limit = limit

    def __enter__(self) -> MemoryCgroup:
        """Make the cgroup.

        Raises:
            HarnessError: not root, or the controller cannot be enabled.
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
        """Return the memory of its processes in bytes."""
        name = "memory.usage_in_bytes" if self._version == 1 else "memory.current"
        return int((self.path / name).read_text())

    def oom_kills(self) -> int:
        """Return the number of the cgroup's processes that the OOM killer killed."""
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        match = re.search(r"^oom_kill (\d+)$", (self.path / name).read_text(), re.MULTILINE)
        return int(match[1]) if match else 0

    def processes(self) -> list[int]:
        """Return the ids of the processes in it."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Kill its processes and remove it; do nothing if it is removed already.

        Raises:
            HarnessError: a process in it does not die, usually because its device does not answer.
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

    def __exit__(self, *_: object) -> None:
        """Remove the cgroup."""
        self.remove()
