# SPDX-License-Identifier: GPL-2.0-or-later
"""The capabilities of the test machine, and skips that name the missing ones.

The reason of a skip says what to do. So each missing capability has its sentence: "/dev/fuse cannot
be opened: EACCES; run as root, or load the module fuse". Each capability is tested once, by the
harmless part of its use (opening the device node), never by a version number.

`pytest_report_header` in `tests/conftest.py` prints `report()`, so the first lines of a green run
show whether it skipped half of the tests.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.vm import payload

CAP_SYS_RESOURCE = 24
"""Bit of CAP_SYS_RESOURCE in the capability sets (linux/capability.h); PR_SET_IO_FLUSHER needs it.
"""


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability that a test may need.

    Attributes:
        name: its name in the header.
        missing: why it is missing and what to do; empty when it is available.
    """

    name: str
    missing: str = ""

    @property
    def present(self) -> bool:
        """Whether the capability is available."""
        return not self.missing


def _opens(name: str, path: str, advice: str) -> Capability:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return Capability(
            name, f"{path} cannot be opened: {errno.errorcode.get(exc.errno or 0, exc)}; {advice}"
        )
    return Capability(name)


@functools.cache
def root() -> Capability:
    """The right to mount, attach and swap."""
    if os.geteuid() != 0:
        return Capability("root", f"not root (uid {os.geteuid()}); run the tests with sudo")
    return Capability("root")


@functools.cache
def fuse() -> Capability:
    """A usable /dev/fuse."""
    return _opens("/dev/fuse", "/dev/fuse", "run as root, or load the module fuse")


@functools.cache
def loop() -> Capability:
    """Loop devices that the tests can make and attach."""
    if not shutil.which("losetup"):
        return Capability("loop", "losetup is not installed; install the package mount")
    return _opens("loop", "/dev/loop-control", "run as root, or load the module loop")


@functools.cache
def swap() -> Capability:
    """The programs and rights for mkswap and swapon."""
    absent = [program for program in ("mkswap", "swapon", "swapoff") if not shutil.which(program)]
    if absent:
        return Capability(
            "swapon", f"{', '.join(absent)} not installed; install util-linux and mount"
        )
    if not Path("/proc/swaps").exists():
        return Capability("swapon", "/proc/swaps is missing: this kernel has no swap (CONFIG_SWAP)")
    if not root().present:
        return Capability("swapon", root().missing)
    return Capability("swapon")


@functools.cache
def zram() -> Capability:
    """The kernel's own compressed swap, for comparison."""
    if Path("/sys/class/zram-control").exists():
        return Capability("zram")
    return Capability("zram", "/sys/class/zram-control is missing; load the module zram")


@functools.cache
def psi() -> Capability:
    """Pressure stall information of the memory."""
    try:
        Path("/proc/pressure/memory").read_text()
    except OSError as exc:
        return Capability(
            "PSI", f"/proc/pressure/memory cannot be read: {exc.strerror}; boot with psi=1"
        )
    return Capability("PSI")


@functools.cache
def sys_resource() -> Capability:
    """CAP_SYS_RESOURCE among the effective capabilities of the tests."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1:
            return Capability("CAP_SYS_RESOURCE")
    return Capability(
        "CAP_SYS_RESOURCE", "CAP_SYS_RESOURCE is not held; PR_SET_IO_FLUSHER cannot be had here"
    )


@functools.cache
def emulator() -> Capability:
    """Virtual machines that can run the programs built here."""
    name = "virtual machines"
    absent = [
        program
        for program in ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "setpriv")
        if not shutil.which(program)
    ]
    if absent:
        return Capability(
            name, f"{', '.join(absent)} not installed; scripts/test installs what it needs"
        )
    return Capability(name, payload.unsuitable())


def _has_programs(name: str, *programs: str) -> Capability:
    absent = [program for program in programs if not shutil.which(program)]
    return Capability(
        name,
        f"{', '.join(absent)} not installed; scripts/test installs what it needs" if absent else "",
    )


@functools.cache
def packaging() -> Capability:
    """The programs that make a Debian package."""
    return _has_programs("dpkg-deb", "dpkg-deb", "dpkg-shlibdeps", "strip")


@functools.cache
def container() -> Capability:
    """A Debian with systemd in a container that can run packages of this machine."""
    programs = _has_programs("containers", "systemd-nspawn", "mmdebstrap", "nsenter")
    return Capability("containers", programs.missing or payload.unsuitable())


@functools.cache
def cgroup_layout(mounts: str = "/proc/self/mounts") -> str:
    """Return "v1", "v2", "hybrid" (v2 mounted beside v1 memory) or "none"."""
    kinds: set[str] = set()
    for line in Path(mounts).read_text().splitlines():
        _, _, fstype, options, *_ = line.split()
        if fstype == "cgroup2":
            kinds.add("v2")
        elif fstype == "cgroup" and "memory" in options.split(","):
            kinds.add("v1")
    return "hybrid" if len(kinds) == 2 else (kinds.pop() if kinds else "none")


def report() -> list[str]:
    """Return the header lines: available and missing capabilities, and the machine."""
    all_of_them = (
        root(),
        fuse(),
        loop(),
        swap(),
        zram(),
        psi(),
        sys_resource(),
        packaging(),
        container(),
        emulator(),
    )
    there = ", ".join(capability.name for capability in all_of_them if capability.present)
    lines = [
        (
            f"zswapd: python {platform.python_version()}, kernel {platform.release()}, page"
            f" {mmap.PAGESIZE}, cpus {len(os.sched_getaffinity(0))}, cgroup {cgroup_layout()}"
        ),
        f"zswapd: has {there or 'nothing'}",
    ]
    lines += [f"zswapd: lacks {c.name}: {c.missing}" for c in all_of_them if not c.present]
    return lines


def _requires(*needed: Callable[[], Capability]) -> pytest.MarkDecorator:
    reasons = [
        capability.missing for capability in (probe() for probe in needed) if capability.missing
    ]
    return pytest.mark.skipif(bool(reasons), reason="; ".join(dict.fromkeys(reasons)))


def requires_root() -> pytest.MarkDecorator:
    """Skip the test unless it runs as root."""
    return _requires(root)


def is_in_memory(path: Path) -> bool:
    """Return whether a directory is on a tmpfs, as /tmp is since Debian 13."""
    return (
        subprocess.run(
            ["stat", "-fc", "%T", path], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "tmpfs"
    )


def requires_fuse() -> pytest.MarkDecorator:
    """Skip the test unless it can mount a FUSE file system."""
    return _requires(root, fuse)


def requires_loop() -> pytest.MarkDecorator:
    """Skip the test unless it can attach loop devices."""
    return _requires(root, loop)


def requires_swap() -> pytest.MarkDecorator:
    """Skip the test unless it can swap onto a loop device over a FUSE file."""
    return _requires(root, fuse, loop, swap)


def requires_container() -> pytest.MarkDecorator:
    """Skip the test unless a container here can install a package and swap."""
    return _requires(root, fuse, loop, swap, packaging, container)


def requires_emulator() -> pytest.MarkDecorator:
    """Skip the test unless it can boot a virtual machine with the programs built here."""
    return _requires(root, emulator)
