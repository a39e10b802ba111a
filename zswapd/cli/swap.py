# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl swapon` and `swapoff`.

What the daemon knows and what the kernel does, brought together.

The loop device and the swap belong to the kernel, so this process handles them, not the daemon: it
asks the daemon for its files, settings and protections, and then acts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zswapd import swapdevice
from zswapd.errors import ProtectionError, SwapDeviceError, ZswapdError
from zswapd.host import installation
from zswapd.host.hints import no_swap_file
from zswapd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zswapd.control.client import Client
    from zswapd.control.protocol import StatusReport

_PLAIN_INTERVAL_S = 2.0  # between lines of progress that do not go to a terminal
_BAR = 24


def swapon(
    client: Client, names: Sequence[str] | None, *, priority: int | None, discard: bool, force: bool
) -> dict[str, Any]:
    """Swap on to files of the daemon.

    Args:
        client: the daemon.
        names: of its files; None for all that are not on yet, be there any or none.
        priority: in place of `swap.priority`.
        discard: False to do without, whatever `swap.discard` says.
        force: also with a daemon that lacks one of CONDITIONS.

    Returns:
        A report: `swapped_on` with a row for each file, `warnings`.

    Raises:
        ProtectionError: the daemon lacks one of CONDITIONS.
        SwapDeviceError: the daemon is on its way out, a file is unknown or on already, or a step
            failed. What this call had swapped on before is off again.
    """
    status = cast("StatusReport", client.call("status"))
    if status["state"] == "stopping":
        raise SwapDeviceError(
            "the daemon is stopping: what is swapped on now would lose its data",
            hint=(
                f"{installation.found().start()} when it has ended; if it cannot end, see `zswapctl"
                " status`"
            ),
        )
    settings = cast("dict[str, Any]", client.call("get", keys=["swap.priority", "swap.discard"]))
    files = _known(status, _names_that_are_off(status) if names is None else names)
    warnings = _check_protections(status, force=force)
    discard = discard and settings["swap.discard"]["value"]
    if discard and not status["discard"]:
        discard = False
        warnings.append(
            "the daemon hears no discards: the memory of freed swap slots is kept until they are"
            " written again"
        )
    chosen = settings["swap.priority"]["value"] if priority is None else priority
    done: list[dict[str, Any]] = []
    for file in files:
        try:
            attached = swapdevice.attach(
                file, priority=chosen, discard=discard, page_size=status["page_size"]
            )
        except BaseException as error:
            _take_back([Path(row["file"]) for row in done], error)
            raise
        warnings += attached.warnings
        done.append(
            {
                "file": str(file),
                "device": attached.device,
                "size": attached.size,
                "priority": chosen,
                "discard": attached.discard,
            }
        )
    return {"swapped_on": done, "warnings": warnings}


def _take_back(files: Sequence[Path], cause: BaseException) -> None:
    """Swap off again from what was swapped on before something failed.

    Raises:
        SwapDeviceError: some of it stays on.
    """
    try:
        swapdevice.detach(*files)
    except ZswapdError as error:
        names = ", ".join(file.name for file in files)
        why = cause.message if isinstance(cause, ZswapdError) else type(cause).__name__
        raise SwapDeviceError(
            f"{why}; and {names}, swapped on before that, cannot be swapped off again:"
            f" {error.message}",
            hint="`zswapctl swapoff`, or go on with what is on",
        ) from cause


def swapoff(
    client: Client, names: Sequence[str] | None, *, force: bool, show: SwapoffProgress
) -> dict[str, Any]:
    """Swap off from files of the daemon.

    Args:
        client: the daemon.
        names: of its files; an empty list for all that are on, None for the same where it is right
            that none are.
        force: do not look at head-room.
        show: where progress goes.

    Returns:
        A report: `swapped_off` with the devices.

    Raises:
        HeadroomError: what is swapped out does not fit into memory.
        SwapDeviceError: a file is unknown or not on, or swapoff failed.
    """
    status = cast("StatusReport", client.call("status"))
    files = _files_that_are_on(status, names)
    try:
        devices = swapdevice.detach(
            *files, force=force, pool_bytes=_pool_bytes(status, files), progress=show.update
        )
    finally:
        show.close()
    return {"swapped_off": devices}


def attachments(status: StatusReport) -> dict[str, swapdevice.Attachment | None]:
    """Return the loop device of each of the daemon's files, by the file's name."""
    mountpoint = Path(status["mountpoint"])
    return {
        file["name"]: swapdevice.find_attached(mountpoint / file["name"])
        for file in status["files"]
    }


def _known(status: StatusReport, names: Sequence[str]) -> list[Path]:
    """Return the paths of files by their names, if the daemon has them all."""
    known = [file["name"] for file in status["files"]]
    for name in names:
        if name not in known:
            raise no_swap_file(name, known)
    return [Path(status["mountpoint"]) / name for name in names]


def _names_that_are_off(status: StatusReport) -> list[str]:
    return [name for name, loop in attachments(status).items() if not (loop and loop.swap)]


def _files_that_are_on(status: StatusReport, names: Sequence[str] | None) -> list[Path]:
    """Return the paths of the named files, or of all that are swapped on."""
    found = attachments(status)
    files = _known(status, names or [name for name, loop in found.items() if loop and loop.swap])
    if names is None:
        return files
    off = [file.name for file in files if found[file.name] is None]
    if not found:
        raise SwapDeviceError(
            "there is nothing to swap off", hint="the daemon has no swap file: swap.size is empty"
        )
    if off or not files:
        raise SwapDeviceError(
            f"not swapped on: {', '.join(off or found)}", hint="`zswapctl status` shows what is"
        )
    return files


CONDITIONS = {
    "lock_memory": "the daemon's memory is not locked",
    # Tried with 2 MiB on a box of 384: the loop driver's thread waited for memory that only a swap
    # write could have freed. Seen with Linux 6.18: supervisor and successor waited for ever in
    # do_wp_page, try_to_free_mem_cgroup_pages, rq_qos_wait.
    "memory_limit": "a memory limit lets the daemon wait for its own swap device",
    "vm.min_free_kbytes": "the kernel keeps too little memory free for its own part of swapping",
}
"""Protections and settings without which a box has been seen to hang.

And what it means that one is off.
"""


_TUNES = {"vm.min_free_kbytes": "; or let `zswapctl swapon --tune` raise it"}


def _check_protections(status: StatusReport, *, force: bool) -> list[str]:
    """Refuse what has hung boxes; return the rest of what is off as warnings."""
    missing = [item for item in [*status["protections"], *status["advice"]] if not item["on"]]
    for item in missing:
        if item["name"] in CONDITIONS and not force:
            raise ProtectionError(
                f"{CONDITIONS[item['name']]} ({item['detail']}): swapping on to it could hang this"
                " machine",
                hint=f"{item['hint']}; --force swaps on all the same{_TUNES.get(item['name'], '')}",
            )
    return [
        f"{item['name']}: {item['detail']}" + (f" ({item['hint']})" if item["hint"] else "")
        for item in missing
    ]


def _pool_bytes(status: StatusReport, files: Sequence[Path]) -> int:
    """Return the pool's memory that belongs to some files, if it comes back as they empty."""
    pages = {file["name"]: file["stored_pages"] for file in status["files"]}
    everything = sum(pages.values())
    if not status["discard"] or not everything:
        return 0
    share = sum(pages[file.name] for file in files)
    return status["pool"]["frames"] * status["page_size"] * share // everything


class SwapoffProgress:
    """Shows how swapoff comes along.

    One line that moves on a terminal, a line every few seconds elsewhere.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._shown = self._start
        self._open = False

    def update(self, device: str, left: int, total: int) -> None:
        """Show how many bytes are left of those at the start."""
        if self._quiet or not total:
            return
        now = time.monotonic()
        done = total - left
        rate = format_size(int(done / max(now - self._start, 0.001)))
        text = f"{device}  {format_size(left)} of {format_size(total)} left, {rate}/s"
        if self._terminal:
            bar = ("#" * (_BAR * done // total)).ljust(_BAR, ".")
            print(f"\r\x1b[K[{bar}] {text}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif now - self._shown >= _PLAIN_INTERVAL_S:
            print(text, file=sys.stderr, flush=True)
            self._shown = now

    def close(self) -> None:
        """End the line."""
        if self._open:
            print(file=sys.stderr)
            self._open = False
