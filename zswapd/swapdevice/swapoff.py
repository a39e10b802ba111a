# SPDX-License-Identifier: GPL-2.0-or-later
"""The way from a swap device back to a file.

The steps are: check the head-room, swap off, empty the file, detach the loop device.

swapoff(2) reads all swapped-out pages. It runs in a child process (see `kernel`), while this
process watches /proc/swaps. If swapoff fails or is killed, the kernel leaves the area on with its
remaining pages. No page is lost, and swapoff can be repeated.

The file is emptied because the kernel does not do it. At swapoff it discards nothing. Before, it
discards only clusters of slots (2 MiB) that are completely free. The rest has no use and would keep
memory of the pool. It is discarded through the loop device, which stays attached until then. No
other program can therefore swap on to the file meanwhile and lose pages.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from zswapd.errors import HeadroomError, SwapDeviceError
from zswapd.swapdevice.headroom import measure
from zswapd.swapdevice.kernel import SWAPOFF_NO_MEMORY, Kernel
from zswapd.swapdevice.state import (
    Attachment,
    Identity,
    find_attached,
    mountpoint_of,
    read_sysfs,
    swap_areas,
)
from zswapd.swapdevice.swapon import set_queue, wait_for_release
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    ReportProgress = Callable[[str, int, int], None]
    """Called with a device, the bytes that are swapped out now, and those at the start."""

INTERVAL_S = 0.2
"""Time between two reports of progress in seconds."""


def detach(
    *files: Path,
    force: bool = False,
    pool_bytes: int = 0,
    progress: ReportProgress | None = None,
    identities: Mapping[Path, Identity] | None = None,
    kernel: Kernel | None = None,
    root: Path = Path("/"),
) -> list[str]:
    """Swap off from files and detach their loop devices, if the pages fit into memory.

    After an error, the areas that are not swapped off stay on.

    Args:
        files: backing files; a file without a loop device is skipped.
        force: True to skip the check of the head-room.
        pool_bytes: memory of the daemon's pool for these files in bytes; 0 without discard.
        progress: called every INTERVAL_S.
        identities: the identities of the files, to find them after their mount was detached.
        kernel: system calls, for tests.
        root: directory that holds /proc and /sys, for tests.

    Returns:
        The devices that were swapped off.

    Raises:
        HeadroomError: the pages do not fit, or the kernel ran out of memory during swapoff.
        SwapDeviceError: a file has another use than swap, or swapoff failed. In either case the
            other files are swapped on as before. Or all are swapped off, and pages are lost, since
            their daemon ended meanwhile.
    """
    kernel = kernel or Kernel()
    found = _found(files, identities or {}, kernel, root)
    if not force:
        measure(
            [item.swap for item in found if item.swap], pool_bytes=pool_bytes, root=root
        ).check()
    dead: list[str] = []
    for item in found:
        with _held(kernel, item.device) as loop:
            had_pages = _swap_off(kernel, item, progress, root) > 0
            if had_pages and _has_died(kernel, item.device):
                dead.append(item.device)
            elif loop is not None:
                _empty(kernel, item.device)
            _let_go(kernel, item, loop, root)
        if not wait_for_release(item.device, item.backing, root):
            raise SwapDeviceError(
                f"{item.device} is swapped off, but something still has it open",
                hint=f"fuser --verbose {item.device}",
            )
    if dead:
        raise _lost(dead)
    return [item.device for item in found]


def _found(
    files: Sequence[Path], what: Mapping[Path, Identity], kernel: Kernel, root: Path
) -> list[Attachment]:
    """Return the swap devices over files, without the files that have none.

    Raises:
        SwapDeviceError: a file has another use than swap.
    """
    found = [find_attached(file, root, identity=what.get(file), kernel=kernel) for file in files]
    attached = [item for item in found if item]
    for item in attached:
        _refuse_if_not_swap(item, root)
    return attached


def _lost(devices: Sequence[str]) -> SwapDeviceError:
    return SwapDeviceError(
        f"swapped off: {', '.join(devices)}; but the daemon ended meanwhile, and the pages that it"
        " still had are lost",
        hint="programs that need one of them end with SIGBUS; `dmesg` shows the failed reads",
    )


def _refuse_if_not_swap(item: Attachment, root: Path) -> None:
    if item.swap:
        return
    mountpoint = mountpoint_of(item.device, root)
    if mountpoint:
        raise SwapDeviceError(
            f"{item.backing} is mounted at {mountpoint}, by {item.device}",
            hint=f"umount {shlex.quote(mountpoint)}",
        )
    raise SwapDeviceError(
        f"{item.backing} is attached to {item.device}, but not swapped on",
        hint=f"losetup --detach {item.device}",
    )


def _swap_off(kernel: Kernel, item: Attachment, progress: ReportProgress | None, root: Path) -> int:
    """Swap off; return the bytes that were swapped out at the start."""
    total = _used(item.device, root)
    report = progress or (lambda *_: None)
    report(item.device, total, total)
    try:
        child = kernel.start_swapoff(item.device)
    except FileNotFoundError as error:
        raise SwapDeviceError(
            "swapoff is not installed", hint="install the package mount (util-linux)"
        ) from error
    try:
        while (code := child.wait(INTERVAL_S)) is None:
            report(item.device, min(_used(item.device, root), total), total)
    except BaseException as error:
        child.interrupt()
        while child.wait(1) is None:
            pass
        if isinstance(error, KeyboardInterrupt):
            still = _still_on(item.device, _used(item.device, root))
            raise SwapDeviceError(
                f"interrupted: {still}", hint="try again; the rest will be quicker"
            ) from error
        raise
    if code != 0:
        raise _failure(item.device, code, _used(item.device, root))
    report(item.device, 0, total)
    return total


def _failure(device: str, code: int, left: int) -> SwapDeviceError:
    still = _still_on(device, left)
    if code == SWAPOFF_NO_MEMORY or code < 0:  # the OOM killer kills a process in swapoff first
        why = (
            "the kernel had no memory"
            if code > 0
            else f"swapoff was ended by signal {-code}, perhaps for lack of memory"
        )
        return HeadroomError(
            f"swapoff {device}: {why}; {still}", hint="end what uses much memory and try again"
        )
    return SwapDeviceError(
        f"swapoff {device} failed with exit code {code}; {still}",
        hint="the kernel's log may say why: dmesg",
    )


def _still_on(device: str, left: int) -> str:
    return f"{device} is still on, with {format_size(left)} swapped out"


@contextlib.contextmanager
def _held(kernel: Kernel, device: str) -> Iterator[int | None]:
    """Keep a loop device open, so that the kernel does not detach it.

    Yield its descriptor, or None if it cannot be opened.
    """
    try:
        loop = kernel.open_loop(device)
    except OSError:
        yield None
        return
    try:
        yield loop
    finally:
        kernel.close(loop)


def _has_died(kernel: Kernel, device: str) -> bool:
    """Return whether the daemon behind a loop device has ended.

    swapoff(2) does not say so. It succeeds, and puts an error in the place of each page that it
    could not read.
    """
    try:
        return not kernel.is_readable(device)
    except OSError:  # the device is not there any more
        return False


def _empty(kernel: Kernel, device: str) -> None:
    """Discard a loop device, unless another program uses it again."""
    # It fails without the daemon's hook, which is harmless: the next swapon overwrites the file.
    with contextlib.suppress(OSError):
        loop = kernel.open_loop(device, exclusive=True)
        try:
            kernel.discard(loop)
        finally:
            kernel.close(loop)


def _let_go(kernel: Kernel, item: Attachment, loop: int | None, root: Path) -> None:
    """Make the kernel detach a loop device at its last close, as those of `attach`."""
    set_queue(item.device, tuned=False, root=root)
    if loop is not None and read_sysfs(item.name, "loop/autoclear", root) == "0":
        kernel.clear_loop(loop)


def _used(device: str, root: Path) -> int:
    return next((area.used for area in swap_areas(root) if area.path == device), 0)
