# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machine says about swap, loop devices and memory, and the few programs that change it.

Everything that can block on a swap device (swapoff, losetup, umount) runs as a child with a time
limit: a swapoff that hangs must end as an error message and not as a hung harness. Nothing here
calls stat(2) below a FUSE mountpoint, because a daemon that hangs would hang the caller.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIB = 1 << 20
HIGHEST_PRIORITY = 32767
"""Swap priority that puts a measured device before any the machine already has."""

COMMAND_LIMIT_S = 60.0


class HarnessError(Exception):
    """The harness cannot do what was asked.

    Args:
        message: what went wrong.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n  {hint}" if hint else message)


def run(*command: str | Path, limit: float = COMMAND_LIMIT_S) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        HarnessError: it is missing, failed, or took longer than `limit` seconds.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=limit)
    except FileNotFoundError as exc:
        raise HarnessError(
            f"{words[0]} is not installed", hint="scripts/test installs all that is needed"
        ) from exc
    except subprocess.TimeoutExpired as exc:
        raise HarnessError(f"{' '.join(words)}: not done after {limit:.0f} s") from exc
    except subprocess.CalledProcessError as exc:
        raise HarnessError(f"{' '.join(words)}: {exc.stderr.strip() or exc.returncode}") from exc
    return done.stdout


@dataclass(frozen=True, slots=True)
class SwapArea:
    """One line of /proc/swaps.

    Attributes:
        path: of the device or file.
        size: bytes.
        used: bytes, slots of pages that are back in memory included.
        priority: the higher one is filled first, equal ones in turn.
    """

    path: str
    size: int
    used: int
    priority: int


def swaps() -> list[SwapArea]:
    """Return all swap areas in use."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    words = [line.split() for line in lines]
    return [SwapArea(w[0], int(w[2]) * 1024, int(w[3]) * 1024, int(w[4])) for w in words]


def is_swap(device: str | Path) -> bool:
    """Whether `device` is swapped on."""
    return any(area.path == str(device) for area in swaps())


def swap_on(device: str | Path, *, discard: bool = True) -> None:
    """Make swap on `device` and switch it on before all others."""
    run("mkswap", device)
    run("swapon", *(["--discard"] if discard else []), "--priority", str(HIGHEST_PRIORITY), device)


def swap_off(device: str | Path, *, limit: float = 120.0) -> None:
    """Switch `device` off if it is on.

    Raises:
        HarnessError: what it holds does not fit into memory, or `limit` seconds were not enough.
    """
    if is_swap(device):
        run("swapoff", device, limit=limit)


def set_not_rotational(device: str | Path) -> None:
    """Tell the kernel that `device` has no seeks; it spreads swap badly over devices that have."""
    rotational = Path("/sys/block") / Path(device).name / "queue/rotational"
    rotational.write_text("0")


def attach_loop(backing: Path) -> str:
    """Attach a loop device to `backing`, direct I/O, 4096-byte blocks, not rotational.

    Return its path.

    All else is as the kernel has it by default: a loop device keeps what its last user has set in
    queue/.
    """
    device = run(
        "losetup", "--find", "--show", "--direct-io=on", "--sector-size", "4096", backing
    ).strip()
    set_not_rotational(device)
    for setting, value in (("rq_affinity", "1"), ("nomerges", "0")):
        (Path("/sys/block") / Path(device).name / "queue" / setting).write_text(value)
    return device


def loops_below(directory: Path) -> list[str]:
    """Return the loop devices whose backing file lies below `directory`."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached since the glob
            if backing.read_text(errors="surrogateescape").startswith(
                f"{directory}/"
            ):  # somebody's need not be UTF-8
                found.append(f"/dev/{backing.parts[-3]}")
    return sorted(found)


def detach_loop(device: str, *, limit: float = 10.0) -> None:
    """Detach `device` and wait until the kernel has let go of it.

    Raises:
        HarnessError: it is still there after `limit` seconds.
    """
    backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
    if backing.exists():
        run("losetup", "--detach", device)
    end = time.monotonic() + limit
    while backing.exists():
        if time.monotonic() > end:
            raise HarnessError(f"{device} does not detach: somebody still has it open")
        time.sleep(0.02)


def mounts_below(directory: Path) -> list[tuple[str, str]]:
    """Return (mountpoint, device number "major:minor") of all mounts at or below `directory`."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] == str(directory) or words[4].startswith(f"{directory}/"):
            found.append((words[4], words[2]))
    return found


def abort_fuse(device_number: str) -> None:
    """Abort a FUSE connection: all its requests fail from now on, nobody hangs on it any more."""
    connection = Path("/sys/fs/fuse/connections") / device_number.partition(":")[2]
    with contextlib.suppress(OSError):  # already gone, or fusectl is not mounted
        (connection / "abort").write_text("1")


def unmount(mountpoint: str) -> None:
    """Take `mountpoint` out of the tree, even while it is in use or its daemon dead."""
    run("umount", "--lazy", mountpoint)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of one process.

    Attributes:
        pss: proportional set size now, bytes; shared pages count by their share, swapped ones not.
        peak_rss: largest resident set ever, bytes.
        swapped: bytes of it that are on swap.
    """

    pss: int
    peak_rss: int
    swapped: int


def process_memory(pid: int) -> ProcessMemory:
    """Read the memory of process `pid`; a process that has just ended counts as none."""
    try:
        rollup = _kib_fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
        status = _kib_fields(Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return ProcessMemory(0, 0, 0)
    return ProcessMemory(rollup.get("Pss", 0), status.get("VmHWM", 0), rollup.get("SwapPss", 0))


def _kib_fields(text: str) -> dict[str, int]:
    return {
        name: int(value) * 1024
        for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    }


def children(pid: int) -> list[int]:
    """Return `pid` and all its descendants that live."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            fields = text[text.rindex(")") + 2 :].split()  # the name in front may contain blanks
            parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:  # grows while it is walked: breadth first
        found += parents.get(parent, [])
    return found


def parent(pid: int) -> int:
    """Return the parent of a process, 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text[text.rindex(")") + 2 :].split()[1])


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process and its threads have taken, 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, kernel = text[text.rindex(")") + 2 :].split()[11:13]
    return (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")


def name(pid: int) -> str:
    """Return a process' name as the kernel has it, "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def memory_available() -> int:
    """Return MemAvailable in bytes."""
    return _kib_fields(Path("/proc/meminfo").read_text())["MemAvailable"]


def page_cluster() -> int:
    """Return vm.page-cluster: one swap-in reads 2^this pages."""
    return int(Path("/proc/sys/vm/page-cluster").read_text())


@contextlib.contextmanager
def page_cluster_set(value: int | None) -> Iterator[int]:
    """Run the body with vm.page-cluster at `value`, put the old value back after it.

    Args:
        value: None leaves it as it is.

    Yields:
        The value that is in force.
    """
    setting = Path("/proc/sys/vm/page-cluster")
    old = setting.read_text()
    if value is not None:
        setting.write_text(f"{value}\n")
    try:
        yield page_cluster()
    finally:
        if value is not None:
            setting.write_text(old)


def missing_programs(programs: Sequence[str]) -> list[str]:
    """Return those of `programs` that are not to be found, /sbin included."""
    places = [
        Path(place)
        for place in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
    ]
    return [
        program for program in programs if not any((place / program).exists() for place in places)
    ]
