# SPDX-License-Identifier: GPL-2.0-or-later
"""`zswapctl swapon` and `zswapctl swapoff`.

The loop device and the swap area belong to the kernel, so this process sets them up, not the
daemon. It asks the daemon for its files, settings and protections, and then acts.
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
    from collections.abc import Mapping, Sequence

    from zswapd.control.client import Client
    from zswapd.control.protocol import StatusReport

_PLAIN_INTERVAL_S = 2.0  # between lines of progress if standard error is not a terminal
_BAR = 24


def swapon(
    client: Client, names: Sequence[str] | None, *, priority: int | None, discard: bool, force: bool
) -> dict[str, Any]:
    """Swap on to files of the daemon.

    Args:
        client: a connection to the daemon.
        names: names of the files; None for all files that are off, which may be none.
        priority: swap priority in place of `swap.priority`, or None.
        discard: False for no discard, independent of `swap.discard`.
        force: True to swap on although the daemon lacks one of CONDITIONS.

    Returns:
        A report: `swapped_on` with a row for each file, and `warnings`.

    Raises:
        ProtectionError: the daemon lacks one of CONDITIONS.
        SwapDeviceError: the daemon is stopping, a file is unknown or on already, or a step failed.
            The files that this call has swapped on are off again.
    """
    status = cast("StatusReport", client.call("status"))
    if status["state"] == "stopping":
        raise SwapDeviceError(
            "the daemon is stopping: a file that is swapped on now would lose its data",
            hint=(
                f"{installation.found().start()} after it has ended; if it cannot end, see"
                " `zswapctl status`"
            ),
        )
    settings = cast("dict[str, Any]", client.call("get"))
    files = _known(status, _names_that_are_off(status) if names is None else names)
    warnings = _check_protections(status, force=force)
    discard = discard and settings["swap.discard"]["value"]
    done: list[dict[str, Any]] = []
    for file in files:
        chosen = _priority(file.name, settings) if priority is None else priority
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


def _priority(name: str, settings: Mapping[str, Any]) -> int:
    """Return the swap priority of a file: its own if it has one, otherwise swap.priority."""
    own = settings.get(f"swap.files.{name}.priority", {}).get("value")
    return int(settings["swap.priority"]["value"] if own is None else own)


def _take_back(files: Sequence[Path], cause: BaseException) -> None:
    """Swap off from files after a later file has failed.

    Args:
        files: the files that are on.
        cause: the failure of the later file.

    Raises:
        SwapDeviceError: at least one file stays on.
    """
    try:
        swapdevice.detach(*files)
    except ZswapdError as error:
        names = ", ".join(file.name for file in files)
        why = cause.message if isinstance(cause, ZswapdError) else type(cause).__name__
        raise SwapDeviceError(
            f"{why}; {names} was swapped on before and cannot be swapped off: {error.message}",
            hint="try `zswapctl swapoff`, or leave it on",
        ) from cause


def swapoff(
    client: Client, names: Sequence[str] | None, *, force: bool, show: SwapoffProgress
) -> dict[str, Any]:
    """Swap off from files of the daemon.

    Args:
        client: a connection to the daemon.
        names: names of the files. An empty list means all files that are on, one at least. None
            means all files that are on, which may be none.
        force: True to skip the check of the head-room.
        show: shows the progress.

    Returns:
        A report: `swapped_off` with the devices, and `warnings`.

    Raises:
        HeadroomError: the swapped-out pages do not fit into memory.
        SwapDeviceError: a file is unknown or not on, or swapoff failed.
    """
    status = cast("StatusReport", client.call("status"))
    files = _files_that_are_on(status, names)
    before = _failed_reads(client)
    try:
        devices = swapdevice.detach(
            *files, force=force, pool_bytes=_pool_bytes(status, files), progress=show.update
        )
    finally:
        show.close()
    after = _failed_reads(client)
    warnings = [
        f"{name}: pages could not be read ({after[name] - count} failed reads), because they were"
        " damaged or lost. A program with one of these pages is killed when it uses the page; the"
        " kernel's log and the daemon's log have details"
        for name, count in before.items()
        if after.get(name, 0) > count
    ]
    return {"swapped_off": devices, "warnings": warnings}


def _failed_reads(client: Client) -> dict[str, int]:
    """Return the number of failed reads of each swap file."""
    core = cast("dict[str, Any]", client.call("stats"))["core"]
    return {device["name"]: device["failed_reads"] for device in core.get("devices", ())}


def attachments(status: StatusReport) -> dict[str, swapdevice.Attachment | None]:
    """Return the loop device of each of the daemon's files, by the file's name."""
    mountpoint = Path(status["mountpoint"])
    return {
        file["name"]: swapdevice.find_attached(mountpoint / file["name"])
        for file in status["files"]
    }


def _known(status: StatusReport, names: Sequence[str]) -> list[Path]:
    """Return the paths of files by their names.

    Raises:
        SwapDeviceError: the daemon does not have a file.
    """
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
            "there is no swap file to swap off", hint="the daemon has none: swap.size is empty"
        )
    if off or not files:
        raise SwapDeviceError(
            f"not swapped on: {', '.join(off or found)}",
            hint="`zswapctl status` shows the files that are on",
        )
    return files


CONDITIONS = {
    "lock_memory": "the daemon's memory is not locked",
    # Seen with Linux 6.18: supervisor and successor waited for ever in do_wp_page,
    # try_to_free_mem_cgroup_pages, rq_qos_wait.
    "memory_limit": "a memory limit lets the daemon wait for its own swap device",
    # Seen with 2 MiB on a machine of 384 MiB: the loop driver's thread waited for memory that only
    # a swap write could free.
    "vm.min_free_kbytes": "the kernel keeps too little memory free for its own part of swapping",
}
"""Protections and settings without which a machine has hung, with the meaning of their absence."""


_TUNES = {"vm.min_free_kbytes": "; or let `zswapctl swapon --tune` raise it"}


def _check_protections(status: StatusReport, *, force: bool) -> list[str]:
    """Return a warning for each missing protection.

    Raises:
        ProtectionError: one of CONDITIONS is missing, and `force` is False.
    """
    missing = [item for item in [*status["protections"], *status["advice"]] if not item["on"]]
    for item in missing:
        if item["name"] in CONDITIONS and not force:
            raise ProtectionError(
                f"{CONDITIONS[item['name']]} ({item['detail']}): swapping could hang this machine",
                hint=f"{item['hint']}; --force swaps on anyway{_TUNES.get(item['name'], '')}",
            )
    return [
        f"{item['name']}: {item['detail']}" + (f" ({item['hint']})" if item["hint"] else "")
        for item in missing
    ]


def _pool_bytes(status: StatusReport, files: Sequence[Path]) -> int:
    """Return the pool's memory for some files in bytes; 0 if swapoff does not free it."""
    pages = {file["name"]: file["stored_pages"] for file in status["files"]}
    everything = sum(pages.values())
    if not everything:
        return 0
    share = sum(pages[file.name] for file in files)
    return status["pool"]["frames"] * status["page_size"] * share // everything


class SwapoffProgress:
    """The progress of swapoff: one moving line on a terminal, otherwise a line every 2 s.

    Args:
        quiet: True to show nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._shown = self._start
        self._open = False

    def update(self, device: str, left: int, total: int) -> None:
        """Show the progress of one device.

        Args:
            device: path of the device.
            left: bytes that are still swapped out.
            total: bytes that were swapped out at the start.
        """
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
