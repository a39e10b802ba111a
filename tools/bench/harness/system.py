# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's swap areas, loop devices, mounts and memory: functions that read and change them.

Every program that can block on a swap device (swapoff, losetup, umount) runs as a child with a time
limit. So a swapoff that hangs ends as an error message, not as a hung harness. No function calls
stat(2) below a FUSE mountpoint, because a daemon that hangs would hang the caller.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

MIB = 1 << 20
HIGHEST_PRIORITY = 32767
"""The swap priority that puts a measured device before all others of the machine."""

COMMAND_LIMIT_S = 60.0

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program of the harness, by an exception in its main thread."""


@contextlib.contextmanager
def signals_delayed() -> Iterator[Callable[[], None]]:
    """Delay signals until the end of the context, in which a process is started.

    An exception between fork(2) and the assignment of the result would lose the process.

    Yields:
        What the child has to call before it executes its program (`preexec_fn`): a program inherits
        the blocked signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield lambda: _set_mask(before)
    finally:
        _set_mask(before)


def _set_mask(mask: Iterable[int]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def interruptible(said: str = "") -> Iterator[None]:
    """Raise KeyboardInterrupt at the first SIGINT, SIGTERM or SIGHUP; ignore these signals then.

    The exception removes what the program has started: a daemon with swap on must not outlive it.

    Args:
        said: printed before the exception.
    """
    is_interrupted = False

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
        if said:
            print(said, flush=True)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _ENDING}
    try:
        yield
    finally:
        # After an interrupt they stay ignored: the program says how it ended, and exits.
        for number, handler in () if is_interrupted else before.items():
            # None: the handler was not set by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class HarnessError(Exception):
    """A failure of the harness.

    Args:
        message: the failure.
        hint: the remedy.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n  {hint}" if hint else message)


def run(*command: str | Path, limit: float = COMMAND_LIMIT_S) -> str:
    """Run a program to its end and return its standard output.

    Raises:
        HarnessError: the program is missing, failed, or took longer than `limit` seconds.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=limit)
    except FileNotFoundError as exc:
        raise HarnessError(
            f"{words[0]} is not installed", hint="scripts/test installs all programs"
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
        path: the path of the device or file.
        size: its size in bytes.
        used: the bytes in use, with slots whose pages are back in memory.
        priority: the kernel fills the highest first, and equal ones in turn.
    """

    path: str
    size: int
    used: int
    priority: int


def swaps() -> list[SwapArea]:
    """Return all active swap areas."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    words = [line.split() for line in lines]
    return [SwapArea(w[0], int(w[2]) * 1024, int(w[3]) * 1024, int(w[4])) for w in words]


def is_swap(device: str | Path) -> bool:
    """Return whether `device` is an active swap area."""
    return any(area.path == str(device) for area in swaps())


def swap_on(device: str | Path, *, discard: bool = True) -> None:
    """Run mkswap and swapon for `device`, with the highest priority."""
    run("mkswap", device)
    run("swapon", *(["--discard"] if discard else []), "--priority", str(HIGHEST_PRIORITY), device)


def swap_off(device: str | Path, *, limit: float = 120.0) -> None:
    """Run swapoff for `device` if it is active.

    Raises:
        HarnessError: its pages do not fit into memory, or swapoff took longer than `limit` seconds.
    """
    if is_swap(device):
        run("swapoff", device, limit=limit)


def set_not_rotational(device: str | Path) -> None:
    """Mark `device` as not rotational; the kernel spreads swap badly over rotational devices."""
    rotational = Path("/sys/block") / Path(device).name / "queue/rotational"
    rotational.write_text("0")


def attach_loop(backing: Path) -> str:
    """Attach a loop device to `backing`; return its path.

    The device has direct I/O and blocks of 4096 bytes, and is not rotational. The function also
    restores defaults in queue/, because a loop device keeps its last user's settings.
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
            path = backing.read_text(errors="surrogateescape")  # a path need not be UTF-8
            if path.startswith(f"{directory}/"):
                found.append(f"/dev/{backing.parts[-3]}")
    return sorted(found)


def detach_loop(device: str, *, limit: float = 10.0) -> None:
    """Detach `device` and wait until the kernel has released it.

    Raises:
        HarnessError: the device is still attached after `limit` seconds.
    """
    backing = Path("/sys/block") / Path(device).name / "loop/backing_file"
    if backing.exists():
        run("losetup", "--detach", device)
    end = time.monotonic() + limit
    while backing.exists():
        if time.monotonic() > end:
            raise HarnessError(f"{device} does not detach: a process still has it open")
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
    """Abort a FUSE connection: all its requests fail, so no process waits for it."""
    connection = Path("/sys/fs/fuse/connections") / device_number.partition(":")[2]
    with contextlib.suppress(OSError):  # already gone, or fusectl is not mounted
        (connection / "abort").write_text("1")


def unmount(mountpoint: str) -> None:
    """Unmount `mountpoint` lazily, so even while it is in use or its daemon is dead."""
    run("umount", "--lazy", mountpoint)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The memory of one process.

    Attributes:
        pss: the proportional set size in bytes: shared pages count by their share, swapped pages
            do not count.
        peak_rss: the largest resident set so far, in bytes.
        swapped: the bytes on swap.
    """

    pss: int
    peak_rss: int
    swapped: int


def process_memory(pid: int) -> ProcessMemory:
    """Return the memory of process `pid`; zeros if it has ended."""
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
    """Return `pid` and its living descendants."""
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
    """Return the parent's id of a process; 0 if the process has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text[text.rindex(")") + 2 :].split()[1])


def processor_seconds(pid: int) -> float:
    """Return the processor seconds of a process and its threads; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, kernel = text[text.rindex(")") + 2 :].split()[11:13]
    return (int(user) + int(kernel)) / os.sysconf("SC_CLK_TCK")


def name(pid: int) -> str:
    """Return the kernel's name of a process; "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def memory_available() -> int:
    """Return MemAvailable in bytes."""
    return _kib_fields(Path("/proc/meminfo").read_text())["MemAvailable"]


def page_cluster() -> int:
    """Return vm.page-cluster; one swap-in reads 2^N pages."""
    return int(Path("/proc/sys/vm/page-cluster").read_text())


@contextlib.contextmanager
def page_cluster_set(value: int | None) -> Iterator[int]:
    """Set vm.page-cluster to `value` while the body runs, then restore it.

    Args:
        value: the new value; None leaves it unchanged.

    Yields:
        The value in force.
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
    """Return those of `programs` that are not installed; /sbin is searched too."""
    places = [
        Path(place)
        for place in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
    ]
    return [
        program for program in programs if not any((place / program).exists() for place in places)
    ]
