# SPDX-License-Identifier: GPL-2.0-or-later
"""Hints of errors: the remedy for a failure, by its errno and by the names that exist.

EACCES, EPERM, EROFS and ENOSPC all refuse a file, and the remedy for each is another command.
"""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.errors import SwapDeviceError
from zswapd.host import installation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def for_failure(error: OSError, path: Path | str, otherwise: str) -> str:
    """Return the remedy for a file that cannot be used.

    Args:
        error: the system's refusal.
        path: the file; it need not exist.
        otherwise: a remedy that helps for any reason, as a clause: "choose another --mountpoint".
    """
    number = error.errno or 0
    if number in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return f"run it as root: {installation.called_again()}"
    place = _nearest_existing(Path(path))
    name = shlex.quote(str(place))
    texts = {
        errno.EACCES: (
            f"it is refused as root, too: `ls -ld {name}`; `dmesg` tells whether a security module"
            " (AppArmor, SELinux) did it"
        ),
        errno.EPERM: (
            f"`lsattr -d {name}` shows an `i` if it is immutable: `chattr -i {name}` ends that; if"
            " not, a security module refuses it, and `dmesg` may say which"
        ),
        errno.EROFS: (
            "its file system is read-only: `mount -o remount,rw"
            f" {shlex.quote(str(_mountpoint_above(place)))}`"
        ),
        errno.ENOSPC: (
            f"its file system is full: `df -h {name}` and `df -i {name}` show it; make room there"
        ),
        errno.EDQUOT: f"a quota is used up: `quota` shows it; make room in {name}",
        errno.ENOENT: f"make its directory: `mkdir -p {shlex.quote(str(Path(path).parent))}`",
        errno.ENOTDIR: f"{name} is a file, and no directory",
        errno.EBUSY: f"it is in use: `fuser -v {name}` shows by which process",
        errno.ETXTBSY: "it is swapped on or being run: `swapon --show` lists swap",
        errno.ENODEV: f"no driver is there for it: `ls -l {name}`, `dmesg`",
        errno.ENXIO: f"no device is behind it: `ls -l {name}`, `dmesg`",
        errno.ENOMEM: (
            "free some memory: `free -m` shows it; look at the memory limit of its cgroup, too"
        ),
        errno.EMFILE: (
            "this process has too many files open: raise LimitNOFILE= of the unit, or `ulimit -n`"
        ),
        errno.ENFILE: "the system has too many files open: raise it with `sysctl fs.file-max`",
        errno.EIO: "the device fails: `dmesg` has the kernel's reason",
        errno.ENAMETOOLONG: "the name is too long",
        errno.ELOOP: f"symbolic links go in a circle: `namei -l {shlex.quote(str(path))}`",
    }
    if number == errno.EROFS and installation.found().is_in_container():
        texts[number] += (
            ", or outside of the container `docker run --tmpfs"
            f" {shlex.quote(str(_mountpoint_above(place)))}`"
        )
    return f"{texts[number]}; or {otherwise}" if number in texts else otherwise


def for_device(error: OSError, device: Path | str, module: str) -> str:
    """Return the remedy for a device node that cannot be used.

    Args:
        error: the system's refusal.
        device: the node.
        module: the kernel module of the device.
    """
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return f"run it as root: {installation.called_again()}"
    here = installation.found()
    if here.is_in_container():
        pass_on = f"`docker run --device {device}`, or as its runtime has it"
        also = "it is refused as root, too: " if error.errno in (errno.EACCES, errno.EPERM) else ""
        return f"{also}give the container {device}: {pass_on}; outside of it, `modprobe {module}`"
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return f"{here.as_root(f'modprobe {module}')} makes it, if this kernel has that module"
    return for_failure(error, device, "look at DeviceAllow= of the unit")


def for_capability(name: str) -> str:
    """Return the remedy for a missing capability, such as "CAP_SYS_RESOURCE"."""
    if os.geteuid() != 0:
        return f"run it as root, with the capability {name}: {installation.called_again()}"
    here = installation.found()
    if here.is_of_unit(os.getpid()):
        return f"add {name} to CapabilityBoundingSet=: `systemctl edit {installation.UNIT}`"
    if here.is_in_container():
        option = f"--cap-add {name.removeprefix('CAP_')}"
        return (
            f"give the container the capability {name}, even as root: `docker run {option}`, or as"
            " its runtime has it"
        )
    return f"root lacks the capability {name}: start it as root where `capsh --print` lists that"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is most like `name`; None if none is near."""
    return next(iter(near(name, names)), None)


def near(name: str, names: Iterable[str], most: int = 1) -> list[str]:
    """Return those of `names` that are like `name`, the nearest first."""
    import difflib

    known = {other.lower(): other for other in sorted(names)}
    return [known[match] for match in difflib.get_close_matches(name.lower(), known, n=most)]


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """Return the hint for an unknown name.

    Args:
        name: the unknown name.
        names: the names that exist.
        otherwise: the hint if none of them is near.
    """
    meant = nearest(name, names)
    return f"did you mean {meant}?" if meant else otherwise


def no_swap_file(name: str, names: Sequence[str]) -> SwapDeviceError:
    """Return the error for a swap file that is not among the daemon's."""
    there_are = f"there are: {', '.join(names)}"
    hint = f"did you mean {meant}? {there_are}" if (meant := nearest(name, names)) else there_are
    return SwapDeviceError(
        f"there is no swap file {name!r}",
        hint=hint if names else "the daemon has none: swap.size is empty",
    )


def _nearest_existing(path: Path) -> Path:
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("/"))


def _mountpoint_above(path: Path) -> Path:
    return next((place for place in (path, *path.parents) if os.path.ismount(place)), Path("/"))
