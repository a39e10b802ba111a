# SPDX-License-Identifier: GPL-2.0-or-later
"""A file becomes a swap device: loop device, mkswap, swapon. Either all of it, or nothing is left.

Why a loop device: the kernel swaps to block devices, or to files of file systems that give it their
block map; FUSE gives none. What the loop device has to be, or swap on it is slow or dangerous:

- direct I/O, or each page is kept a second time in the page cache, and swapping out would need
  memory for that copy;
- blocks of 4096 bytes, or the kernel may send parts of pages, each a read-modify-write;
- not rotational, or the kernel spreads swap over the whole device;
- completing requests where they were submitted, or each of them waits for one more context switch;
- cutting discards into steps, or one of 4 GiB, as at the swapon of a file that is not empty, is a
  second in which the daemon serves nobody.

Of two processes that do this at once, one is refused: the file is locked with flock meanwhile, from
before the look at what is attached. Two areas over one file would be each other's end.

Undoing is the kernel's: the loop device detaches itself (see `kernel`) as soon as nobody has it
open, and until swapon succeeds that is this process alone. Swapon is the last step. So an error,
Ctrl-C or SIGKILL in the middle leaves nothing behind.
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

_RACES = 8  # times that another process may take the free loop device before us
LABEL = "zswapd"
"""Label of the swap areas, as blkid shows it."""
_TUNED = {"rq_affinity": "2", "discard_max_bytes": str(DISCARD_STEP), "nomerges": "0"}
"""Files of queue/. The first: a finished request interrupts the processor that waits for it. By
default the loop driver hands it to a softirq thread on the daemon's processor, one more context
switch between the daemon's answer and the end of the fault: a random fault then takes a third
longer (measured, two processors). The last: an earlier user, this daemon included, may have had
reason not to have requests merged (worker/merging.py)."""
_DEFAULTS = {"rq_affinity": "1", "discard_max_bytes": str((1 << 32) - (1 << 16)), "nomerges": "0"}
"""The kernel's own, nearly: it takes 32 bits and whole pages.

The others would be kept for the loop device's next user.
"""
RELEASE_S = 5.0
"""How long a loop device may stay attached after its last user has gone; udev may look at it."""


CLOSING_S = 2.0
"""How long a swapon waits for another open file over the same file to be closed."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A file that is swapped on."""

    device: str
    size: int
    """In bytes."""
    discard: bool
    """Whether freed slots are discarded."""
    warnings: tuple[str, ...]
    """What works, but not as it should."""


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
        file: an existing file, served by another process than this one.
        priority: swap priority, 0 to 32767.
        discard: have freed slots discarded.
        page_size: bytes in a page.
        kernel: system calls, for tests.
        root: where /proc and /sys are, for tests.

    Raises:
        PermissionsError: not root, or no loop devices.
        SwapDeviceError: the file is in use, or a step failed; nothing is left behind.
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
                f"{device} takes no discards: the memory of freed swap slots is kept until they are"
                " written again"
            )
        set_queue(device, tuned=True, root=root)
        _swap_on(kernel, device, priority, discard=discard)
        return Attached(device, os.fstat(backing).st_size, discard, tuple(warnings))


def wait_for_release(device: str, backing: Path, root: Path = Path("/")) -> bool:
    """Wait until a loop device has let go of its file.

    Return False if that takes longer than RELEASE_S.
    """
    deadline = time.monotonic() + RELEASE_S
    while read_sysfs(_name(device), "loop/backing_file", root).startswith(str(backing)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _name(device: str) -> str:
    return device.removeprefix("/dev/")


def _open_backing(file: Path, root: Path) -> int:
    """Open a file; wait a moment where another open file may change it.

    The daemon may yet have to hear of that file's end.
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
                f"{file} is open for writing: what that program writes and what is swapped out"
                " would overwrite each other",
                hint=f"end what `fuser --verbose {file}` shows, then try again",
            ) from error
        if error.errno == errno.ENOTCONN:
            hint = (
                "the daemon that served it has died: start it again,"
                f" {installation.found().start()}"
            )
        elif error.errno == errno.EBUSY:
            hint = "the daemon is stopping: nobody can swap on to its files any more"
        elif error.errno != errno.ENOENT:
            hint = for_failure(error, file, hint)
        cls = PermissionsError if error.errno in (errno.EACCES, errno.EPERM) else SwapDeviceError
        raise cls(f"cannot open {file}: {error.strerror}", hint=hint) from error
    try:
        if not stat.S_ISREG(os.fstat(backing).st_mode):
            raise SwapDeviceError(
                f"{file} is no regular file",
                hint="swap on one of the files that `zswapctl status` lists",
            )
        yield backing
    finally:
        os.close(backing)


@contextlib.contextmanager
def _locked(backing: int, file: Path, root: Path) -> Iterator[None]:
    """Keep others like us from a file, which nobody has attached, for as long as the context lasts."""
    # First without the lock, since a loop device holds that of a process that was killed after its
    # swapon: it has the same open file.
    _refuse_if_attached(file, root)
    try:
        fcntl.flock(backing, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SwapDeviceError(
            f"another process is swapping on {file}", hint="see what `zswapctl status` says then"
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
            hint="`zswapctl swapoff` switches it off",
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
    """Attach the file to a loop device for as long as the context lasts.

    Or somebody else has it open.
    """
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
                "it takes Linux 5.8 or later"
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
        "all free loop devices were taken by others before us",
        hint="try again; look at losetup --list",
    )


def _check_direct_io(device: str, file: Path, root: Path) -> None:
    if read_sysfs(_name(device), "loop/dio", root) != "1":
        raise SwapDeviceError(
            f"{device} got no direct I/O to {file}",
            hint="the file system has to support O_DIRECT, as zswapd's does",
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
    """Tell the kernel that seeks cost nothing; yield a warning if it does not listen."""
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
    """Set where requests to a loop device end and how long discards are.

    A kernel that does not let us is only slower.
    """
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
