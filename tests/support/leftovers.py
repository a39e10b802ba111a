# SPDX-License-Identifier: GPL-2.0-or-later
"""The leftovers of a test run on the machine: mounts, loop devices, swap, cgroups.

At session start, `sweep()` removes the leftovers of an aborted run, and only these. They are a
zswapd mount in the temporary directory of a dead pytest run, if its daemon is dead too, with the
loop devices on it; and the decoys (decoy.py) of dead processes. In any less certain case the swap
may be in use. At session end, `conftest.py` compares the `snapshot()` of before and after.

All functions read files below `root`, so tests can run them on made-up trees.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

_OCTAL = re.compile(r"\\([0-7]{3})")
_RUN_DIRECTORY = re.compile(r"^(.*/pytest-of-[^/]+/pytest-\d+)(?:/|$)")
_DECOY = re.compile(r"/zswapd-decoy-(\d+)(?: \(deleted\))?$")


def _unescape(field: str) -> str:
    """Undo the octal escapes of the kernel's tables (blank, tab, newline, backslash)."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """The things of zswapd on the machine at one moment.

    Attributes:
        mounts: the mountpoints of zswapd file systems.
        loops: "loopN on FILE", where FILE is in one of the mounts, in the directory of a pytest
            run, or a decoy.
        swaps: the paths of the swap areas on one of these loop devices.
        cgroups: the directories named zswapd-* in any cgroup hierarchy.
    """

    mounts: frozenset[str] = frozenset()
    loops: frozenset[str] = frozenset()
    swaps: frozenset[str] = frozenset()
    cgroups: frozenset[str] = frozenset()

    def since(self, earlier: Leftovers) -> Leftovers:
        """Return the things that `earlier` does not have."""
        return Leftovers(
            **{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        )

    def lines(self) -> list[str]:
        """Return one line for each thing, sorted."""
        return [
            f"{f.name[:-1]} {thing}"
            for f in fields(self)
            for thing in sorted(getattr(self, f.name))
        ]


def zswapd_mounts(root: Path = Path("/")) -> list[str]:
    """Return the mountpoints of all zswapd file systems."""
    found = []
    for line in (root / "proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        source, mountpoint, fstype, *_ = line.split()
        if fstype == "fuse.zswapd" or (fstype.startswith("fuse") and source == "zswapd"):
            found.append(_unescape(mountpoint))
    return found


def loops(root: Path = Path("/")) -> dict[str, str]:
    """Return the path of the backing file of each attached loop device, by device name."""
    found = {}
    for backing in (root / "sys/block").glob("loop*/loop/backing_file"):
        try:
            found[backing.parts[-3]] = backing.read_text(errors="surrogateescape").rstrip("\n")
        except OSError:  # detached between the glob and the read
            continue
    return found


def swaps(root: Path = Path("/")) -> list[str]:
    """Return the paths of all active swap areas."""
    return [
        _unescape(line.split()[0])
        for line in (root / "proc/swaps").read_text(errors="surrogateescape").splitlines()[1:]
    ]


def cgroups(root: Path = Path("/")) -> list[str]:
    """Return the cgroup directories named zswapd-* at the top of a hierarchy or one below it."""
    base = root / "sys/fs/cgroup"
    return [
        str(path)
        for depth in ("", "*/", "*/*/")
        for path in base.glob(f"{depth}zswapd-*")
        if path.is_dir()
    ]


def run_directory(path: str) -> Path | None:
    """Return the directory of the pytest run that contains `path`, or None."""
    match = _RUN_DIRECTORY.match(path)
    return Path(match[1]) if match else None


def run_pid(directory: Path) -> int | None:
    """Return the process id of the pytest run that owns `directory`; None if it has ended."""
    try:
        pid = int((directory / ".lock").read_text())
    except (OSError, ValueError):
        return None
    return pid if _is_alive(pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # the process belongs to another user
    except OSError:
        return False
    return True


def decoy_pid(backing: str) -> int | None:
    """Return the process id of a decoy's owner; None if the file is not a decoy."""
    match = _DECOY.search(backing)
    return int(match[1]) if match else None


def snapshot(root: Path = Path("/")) -> Leftovers:
    """Return the things of zswapd that are on the machine now."""
    mounts = zswapd_mounts(root)
    ours = {
        name: backing
        for name, backing in loops(root).items()
        if run_directory(backing)
        or decoy_pid(backing)
        or any(backing.startswith(f"{mountpoint}/") for mountpoint in mounts)
    }
    return Leftovers(
        mounts=frozenset(mounts),
        loops=frozenset(f"{name} on {backing}" for name, backing in ours.items()),
        swaps=frozenset(path for path in swaps(root) if Path(path).name in ours),
        cgroups=frozenset(cgroups(root)),
    )


def daemon_is_dead(mountpoint: str) -> bool:
    """Return whether the FUSE daemon behind `mountpoint` is dead (ENOTCONN).

    A child with a time limit asks, because a daemon that hangs also hangs the asking process. A
    daemon that hangs counts as alive.
    """
    try:
        answer = subprocess.run(
            ["stat", "--file-system", "--", mountpoint],
            check=False,
            capture_output=True,
            text=True,
            timeout=5,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return False
    return "Transport endpoint is not connected" in answer.stderr


def abandoned(root: Path = Path("/")) -> list[str]:
    """Return the zswapd mountpoints that certainly are leftovers of dead test runs."""
    candidates = ((mountpoint, run_directory(mountpoint)) for mountpoint in zswapd_mounts(root))
    return [
        mountpoint
        for mountpoint, directory in candidates
        if directory is not None and run_pid(directory) is None and daemon_is_dead(mountpoint)
    ]


def abandoned_decoys(root: Path = Path("/")) -> list[str]:
    """Return the names of loop devices that are decoys of dead processes."""
    owners = {name: decoy_pid(backing) for name, backing in loops(root).items()}
    return [name for name, pid in owners.items() if pid is not None and not _is_alive(pid)]


def sweep() -> list[str]:
    """Remove abandoned mounts, with their swap and loop devices, and decoys.

    Returns:
        A line for each thing removed.
    """
    done = []
    for mountpoint in abandoned():
        for name, backing in loops().items():
            if backing.startswith(f"{mountpoint}/"):
                done += _remove_loop(f"/dev/{name}")
        done.append(_run("umount", "--lazy", mountpoint))
    for name in abandoned_decoys():
        done += _remove_loop(f"/dev/{name}")
    return done


def _remove_loop(device: str) -> list[str]:
    off = [_run("swapoff", device)] if device in swaps() else []
    return [*off, _run("losetup", "--detach", device)]


def _run(*command: str) -> str:
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"{' '.join(command)}: {exc}"
    return f"{' '.join(command)}: {'done' if result.returncode == 0 else result.stderr.strip()}"
