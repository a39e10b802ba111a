# SPDX-License-Identifier: GPL-2.0-or-later
"""The way from a file to a swap device: loop device, mkswap, swapon. A failed step undoes all.

Why a loop device: the kernel swaps to block devices, or to files of file systems that give it their
block map. FUSE gives none. The loop device needs these properties:

- direct I/O: otherwise the page cache keeps a second copy of each page, and swap-out needs memory
  for it;
- blocks of 4096 bytes: otherwise the kernel may send parts of pages, each a read-modify-write;
- not rotational: otherwise the kernel spreads swap over the whole device;
- completion on the processor of the submitter: otherwise each request waits for one more context
  switch;
- short discards: otherwise swapon of a file that is not empty discards 4 GiB in one request, and
  the daemon serves no other request for a second.

Of two processes that swap on to one file at the same time, one is refused. The file is locked with
flock, from before the check for loop devices. Two swap areas over one file would overwrite each
other.

The kernel does the undo: it detaches the loop device (see `kernel`) at its last close. Until swapon
succeeds, only this process has it open. swapon is the last step, so an error, Ctrl-C or SIGKILL
leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.errors import PermissionsError, SwapDeviceError
from zswapd.host import installation
from zswapd.host.hints import for_capability, for_device, for_failure
from zswapd.host.installation import look_into_log
from zswapd.pages import PAGE_SIZE
from zswapd.paths import without_links
from zswapd.swapdevice.kernel import DISCARD_STEP, SWAP_FLAG_DISCARD, SWAP_FLAG_PREFER, Kernel
from zswapd.swapdevice.state import find_attached, mountpoint_of, read_sysfs

if TYPE_CHECKING:
    from collections.abc import Iterator

_RACES = 8  # attempts, because another process may take the free loop device first
LABEL = "zswapd"
"""Label of the swap areas, as blkid shows it."""
_TUNED = {"rq_affinity": "2", "discard_max_bytes": str(DISCARD_STEP), "nomerges": "0"}
"""Values of files below queue/.

- rq_affinity: a finished request interrupts the processor that waits for it. By default the loop
  driver passes it to a softirq thread on the daemon's processor. That is one more context switch
  between the daemon's answer and the end of the fault. A random fault then takes a third longer
  (measured, two processors).
- nomerges: an earlier user of the device may have turned merging off (worker/merging.py).
"""
_DEFAULTS = {"rq_affinity": "1", "discard_max_bytes": str((1 << 32) - (1 << 16)), "nomerges": "0"}
"""The kernel's defaults, for the next user of the loop device, which keeps all values.

discard_max_bytes is slightly less than the default: the file takes 32 bits and whole pages.
"""
RELEASE_S = 5.0
"""Longest time in seconds until a loop device is detached after its last use; udev may open it."""


CLOSING_S = 2.0
"""Longest wait in seconds of a swapon for the close of another open file."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A file that is swapped on."""

    device: str
    size: int
    """Size in bytes."""
    discard: bool
    """True if the kernel discards freed slots."""
    warnings: tuple[str, ...]
    """Problems that did not prevent the swapon."""


def attach(
    file: Path,
    *,
    priority: int,
    discard: bool,
    page_size: int = PAGE_SIZE,
    kernel: Kernel | None = None,
    root: Path = Path("/"),
) -> Attached:
    """Swap on to a file.

    Args:
        file: an existing file, served by another process.
        priority: swap priority, 0 to 32767.
        discard: True to let the kernel discard freed slots.
        page_size: bytes in a page.
        kernel: system calls, for tests.
        root: directory that holds /proc and /sys, for tests.

    Raises:
        PermissionsError: this process is not root, or there are no loop devices.
        SwapDeviceError: the file is in use, or a step failed. All steps are undone.
    """
    kernel = kernel or Kernel()
    file = without_links(file.parent) / file.name
    with (
        _backing_file(file, root) as backing,
        _locked(backing, file, root),
        _loop_device(kernel, backing, file, min(page_size, 4096), root) as device,
    ):
        warnings = [*_make_non_rotational(device, root)]
        _make_swap(kernel, device)
        if discard and read_sysfs(_name(device), "queue/discard_max_bytes", root) in ("", "0"):
            discard = False
            warnings.append(
                f"{device} takes no discards: a freed swap slot keeps its memory until it is"
                " written again"
            )
        set_queue(device, tuned=True, root=root)
        _swap_on(kernel, device, priority, discard=discard)
        return Attached(device, os.fstat(backing).st_size, discard, tuple(warnings))


def wait_for_release(device: str, backing: Path, root: Path = Path("/")) -> bool:
    """Wait until a loop device is detached; return False if that takes longer than RELEASE_S."""
    deadline = time.monotonic() + RELEASE_S
    while read_sysfs(_name(device), "loop/backing_file", root).startswith(str(backing)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _name(device: str) -> str:
    return device.removeprefix("/dev/")


def _open_backing(file: Path, root: Path) -> int:
    """Open a file; wait CLOSING_S at most if another open file may change it.

    That file may be closed already, and the daemon may not know it yet.
    """
    deadline = time.monotonic() + CLOSING_S
    while True:
        _refuse_if_attached(file, root)
        try:
            return os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ETXTBSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@contextlib.contextmanager
def _backing_file(file: Path, root: Path) -> Iterator[int]:
    try:
        backing = _open_backing(file, root)
    except OSError as error:
        hint = "is it one of the files that `zswapctl status` lists?"
        if error.errno == errno.ETXTBSY:
            raise SwapDeviceError(
                f"{file} is open for writing: that program and the kernel would overwrite each"
                " other's data",
                hint=f"end the program that `fuser --verbose {file}` shows, then try again",
            ) from error
        if error.errno == errno.ENOTCONN:
            hint = (
                "the daemon that served it has died: start it again,"
                f" {installation.found().start()}"
            )
        elif error.errno == errno.EBUSY:
            hint = "the daemon is stopping: its files cannot be swapped on any more"
        elif error.errno != errno.ENOENT:
            hint = for_failure(error, file, hint)
        cls = PermissionsError if error.errno in (errno.EACCES, errno.EPERM) else SwapDeviceError
        raise cls(f"cannot open {file}: {error.strerror}", hint=hint) from error
    try:
        if not stat.S_ISREG(os.fstat(backing).st_mode):
            raise SwapDeviceError(
                f"{file} is not a regular file",
                hint="swap on one of the files that `zswapctl status` lists",
            )
        yield backing
    finally:
        os.close(backing)


@contextlib.contextmanager
def _locked(backing: int, file: Path, root: Path) -> Iterator[None]:
    """Hold the lock of a file that is not attached during the context."""
    # The first check comes before the lock. After a swapon whose process was killed, the loop
    # device holds the lock, because it has the same open file.
    _refuse_if_attached(file, root)
    try:
        fcntl.flock(backing, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SwapDeviceError(
            f"another process is swapping on {file}", hint="see `zswapctl status` after that"
        ) from None
    try:
        _refuse_if_attached(file, root)
        yield
    finally:
        fcntl.flock(backing, fcntl.LOCK_UN)


def _refuse_if_attached(file: Path, root: Path) -> None:
    found = find_attached(file, root)
    if found is None:
        return
    if found.swap:
        raise SwapDeviceError(
            f"{file} is swapped on already, as {found.device}",
            hint="`zswapctl swapoff` swaps it off",
        )
    mountpoint = mountpoint_of(found.device, root)
    if mountpoint:
        raise SwapDeviceError(
            f"{file} is mounted at {mountpoint}, by {found.device}",
            hint=f"umount {shlex.quote(mountpoint)}",
        )
    raise SwapDeviceError(
        f"{file} is attached to {found.device} already, for something else",
        hint=f"losetup --detach {found.device}",
    )


@contextlib.contextmanager
def _loop_device(
    kernel: Kernel, backing: int, file: Path, block_size: int, root: Path
) -> Iterator[str]:
    """Attach a file to a loop device during the context; a later user keeps it attached."""
    device, loop = _configure_free_loop(kernel, backing, file, block_size)
    try:
        _check_direct_io(device, file, root)
        yield device
    except BaseException:
        set_queue(device, tuned=False, root=root)
        kernel.close(loop)
        wait_for_release(device, file, root)
        raise
    kernel.close(loop)


def _configure_free_loop(
    kernel: Kernel, backing: int, file: Path, block_size: int
) -> tuple[str, int]:
    for _ in range(_RACES):
        try:
            device = f"/dev/loop{kernel.free_loop()}"
            loop = kernel.open_loop(device)
        except OSError as error:
            raise _no_loop_device(error) from error
        try:
            kernel.configure_loop(loop, backing, str(file), block_size)
        except OSError as error:
            kernel.close(loop)
            if error.errno == errno.EBUSY:
                continue
            is_old = error.errno in (errno.EINVAL, errno.ENOTTY)  # LOOP_CONFIGURE is of Linux 5.8
            hint = (
                "Linux 5.8 or later is needed"
                if is_old
                else for_failure(error, device, "see `dmesg`")
            )
            raise SwapDeviceError(
                f"{device} cannot be attached to {file}: {error.strerror}", hint=hint
            ) from error
        except BaseException:
            kernel.close(loop)
            raise
        return device, loop
    raise SwapDeviceError(
        "other processes took all free loop devices first", hint="try again; see losetup --list"
    )


def _check_direct_io(device: str, file: Path, root: Path) -> None:
    if read_sysfs(_name(device), "loop/dio", root) != "1":
        raise SwapDeviceError(
            f"{device} got no direct I/O to {file}",
            hint="the file system must support O_DIRECT, as zswapd's does",
        )


def _no_loop_device(error: OSError) -> PermissionsError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionsError(
            f"no permission for {error.filename}", hint=for_device(error, error.filename, "loop")
        )
    return PermissionsError(
        f"no loop device: {error.filename}: {error.strerror}",
        hint=for_device(error, error.filename, "loop"),
    )


def _make_non_rotational(device: str, root: Path) -> Iterator[str]:
    """Mark a loop device as not rotational; yield a warning if that fails."""
    path = root / "sys/block" / _name(device) / "queue/rotational"
    if read_sysfs(_name(device), "queue/rotational", root) != "0":
        try:
            path.write_text("0")
        except OSError as error:
            yield (
                f"{device} stays rotational, which spreads swap out and slows it: {path}:"
                f" {error.strerror}"
            )


def set_queue(device: str, *, tuned: bool, root: Path = Path("/")) -> None:
    """Set the queue attributes of a loop device. A failure only makes swap slower."""
    for setting, value in (_TUNED if tuned else _DEFAULTS).items():
        with contextlib.suppress(OSError):
            (root / "sys/block" / _name(device) / "queue" / setting).write_text(value)


def _make_swap(kernel: Kernel, device: str) -> None:
    try:
        code, said = kernel.run(("mkswap", "--label", LABEL, device))
    except FileNotFoundError as error:
        raise SwapDeviceError(
            "mkswap is not installed", hint="install the package util-linux"
        ) from error
    if code != 0:
        raise SwapDeviceError(
            f"mkswap {device} failed: {said or f'exit code {code}'}", hint=look_into_log()
        )


def _swap_on(kernel: Kernel, device: str, priority: int, *, discard: bool) -> None:
    flags = SWAP_FLAG_PREFER | priority | (SWAP_FLAG_DISCARD if discard else 0)
    try:
        kernel.swapon(device, flags)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise PermissionsError(
                f"swapon {device}: {error.strerror}", hint=for_capability("CAP_SYS_ADMIN")
            ) from error
        raise SwapDeviceError(
            f"swapon {device} failed: {error.strerror}", hint="the kernel's log says why: dmesg"
        ) from error
