# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test run may leave behind on the machine: mounts, loop devices, swap, cgroups.

Two uses. At session start, `sweep()` removes what an aborted run left, and nothing else: a zswapd
mount that lies in the temporary directory of a pytest run whose process is gone, and whose own
daemon is dead, with the loop devices on it; and decoys (decoy.py) of processes that are gone.
Anything less certain may be somebody's running swap. At session end, `snapshot()` of before and
after are compared.

Everything is read from files below `root`, so that the search itself can be tested on made-up
trees.
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
    """Undo the octal escapes (blank, tab, newline.

    Backslash) of the kernel's mount and swap tables.
    """
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is there now.

    Attributes:
        mounts: mountpoints of zswapd file systems.
        loops: "loopN on FILE" where FILE is in such a mount, in the directory of a pytest run, or a
            decoy.
        swaps: swap areas that are on one of those loop devices, by path.
        cgroups: directories named zswapd-* in any cgroup hierarchy.
    """

    mounts: frozenset[str] = frozenset()
    loops: frozenset[str] = frozenset()
    swaps: frozenset[str] = frozenset()
    cgroups: frozenset[str] = frozenset()

    def since(self, earlier: Leftovers) -> Leftovers:
        """Return what is here and was not in `earlier`."""
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
    for line in (root / "proc/self/mounts").read_text().splitlines():
        source, mountpoint, fstype, *_ = line.split()
        if fstype == "fuse.zswapd" or (fstype.startswith("fuse") and source == "zswapd"):
            found.append(_unescape(mountpoint))
    return found


def loops(root: Path = Path("/")) -> dict[str, str]:
    """Return loop device name → path of its backing file, for all that are attached."""
    found = {}
    for backing in (root / "sys/block").glob("loop*/loop/backing_file"):
        try:
            found[backing.parts[-3]] = backing.read_text().rstrip("\n")
        except OSError:  # detached between the glob and the read
            continue
    return found


def swaps(root: Path = Path("/")) -> list[str]:
    """Return the paths of all swap areas in use."""
    return [
        _unescape(line.split()[0]) for line in (root / "proc/swaps").read_text().splitlines()[1:]
    ]


def cgroups(root: Path = Path("/")) -> list[str]:
    """Return the cgroup directories named zswapd-* at the top of a hierarchy.

    (v1 and v2) or one below.
    """
    base = root / "sys/fs/cgroup"
    return [
        str(path)
        for depth in ("", "*/", "*/*/")
        for path in base.glob(f"{depth}zswapd-*")
        if path.is_dir()
    ]


def run_directory(path: str) -> Path | None:
    """Return the directory of the pytest run that `path` lies in, or None."""
    match = _RUN_DIRECTORY.match(path)
    return Path(match[1]) if match else None


def run_pid(directory: Path) -> int | None:
    """Return the process id of the pytest run that holds `directory`.

    None when it has ended or died.
    """
    try:
        pid = int((directory / ".lock").read_text())
    except (OSError, ValueError):
        return None
    return pid if _is_alive(pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # and somebody else's
    except OSError:
        return False
    return True


def decoy_pid(backing: str) -> int | None:
    """Return whose decoy a loop device's file is; None if it is none."""
    match = _DECOY.search(backing)
    return int(match[1]) if match else None


def snapshot(root: Path = Path("/")) -> Leftovers:
    """Return what of ours is on the machine now."""
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
    """Whether the FUSE daemon behind `mountpoint` is gone (ENOTCONN).

    Asked in a child with a time limit, because a daemon that hangs, hangs whoever asks; it counts
    as alive.
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
    """Return the zswapd mountpoints that are certainly left over from test runs that died."""
    candidates = ((mountpoint, run_directory(mountpoint)) for mountpoint in zswapd_mounts(root))
    return [
        mountpoint
        for mountpoint, directory in candidates
        if directory is not None and run_pid(directory) is None and daemon_is_dead(mountpoint)
    ]


def abandoned_decoys(root: Path = Path("/")) -> list[str]:
    """Return the names of loop devices that are decoys of processes that are gone."""
    owners = {name: decoy_pid(backing) for name, backing in loops(root).items()}
    return [name for name, pid in owners.items() if pid is not None and not _is_alive(pid)]


def sweep() -> list[str]:
    """Remove abandoned mounts, with the swap and loop devices on them, and decoys.

    Return what was done, in lines.
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
