# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume's backing file in the event loop.

It is looked at when a look is due, used in threads, and closed when no job uses it.

A look that finds another signature reports it to the volume (`when_changed`) before any waiting
request continues. A failed look is a change too, because the cached pages cannot be trusted any
more. Then every request fails with the error of the last look, until a look finds the file again.
"""

from __future__ import annotations

import errno
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import trio

from zswapd.errors import VolumeError, ZswapdError
from zswapd.volumes import file_io as files

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from zswapd.system.offload import Offload
    from zswapd.volumes.file_io import Look, Signature, SourceFile, Written

log = logging.getLogger(__name__)

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Lane:
    """The threads and buffers of one volume. No other volume uses them.

    Attributes:
        reads: runs reads, writes and syncs, as many at a time as it has threads.
        checks: runs looks at the backing file.
        notices: runs notifications of the kernel, which wait for readers.
        buffers: one for each read.
    """

    reads: Offload
    checks: Offload
    notices: Offload
    buffers: Sequence[mmap.mmap]

    @property
    def is_idle(self) -> bool:
        """Whether all threads are idle, so that another volume can have the lane."""
        return not (self.reads.unfinished or self.checks.unfinished or self.notices.unfinished)


class Source:
    """One backing file.

    Args:
        path: its name.
        writable: whether it is opened for writing as well.
        lane: the volume's threads.
        mountpoint: our mount. The file must not lie on it.
        nursery: for tasks that outlive the request that started them.
        when_changed: called when the contents have changed.
        signature: of a predecessor's last look; None if it is not known.

    Attributes:
        size: bytes at the last look; 0 before the first.
        mtime_ns: time of the last known change by another program. Our own writes do not count: the
            kernel would drop its cache.
        failure: why the file cannot be used, None if it can.
        check_s: maximum seconds between two looks while there are requests.
        is_gone: whether the volume was removed.
    """

    def __init__(
        self,
        path: str,
        *,
        writable: bool,
        lane: Lane,
        mountpoint: Path,
        nursery: trio.Nursery,
        when_changed: Callable[[], object],
        signature: Signature | None,
    ) -> None:
        self.path = path
        self.size = signature.size if signature else 0
        self.mtime_ns = signature.mtime_ns if signature else 0
        self.check_s = 1.0
        self.is_gone = False
        self.failure: VolumeError | None = VolumeError(f"{path} has not been examined yet")
        self._is_fine = False
        self._writable = writable
        self._lane = lane
        self._mountpoint = mountpoint
        self._nursery = nursery
        self._when_changed = when_changed
        self._signature = signature
        self._own: Signature | None = None
        self._is_racy = False
        self._backing: SourceFile | None = None
        self._due = 0.0
        self._check: trio.Event | None = None

    @property
    def signature(self) -> Signature | None:
        """The signature of the last look, or None if it is not reliable."""
        return None if self._is_racy else self._signature

    @property
    def remaining_s(self) -> float:
        """Seconds for which the last look is still valid."""
        return max(self._due - time.monotonic(), 0.0)

    def raise_if_gone(self) -> None:
        """Fail if the volume was removed.

        Raises:
            VolumeError: the volume was removed.
        """
        if self.is_gone:
            raise VolumeError("the volume was removed", errno_=errno.ESTALE)

    async def look_if_due(self) -> None:
        """Look at the file if the last look is too old.

        Raises:
            VolumeError: the look failed, or the volume was removed.
        """
        if time.monotonic() >= self._due:
            await self._looked()
        self._raise_failure()

    async def look(self) -> None:
        """Look at the file now.

        Raises:
            VolumeError: the look failed, or the volume was removed.
        """
        if self._check is not None:
            await self._looked()  # it began before this call, so it does not count
        await self._looked()
        self._raise_failure()

    def _raise_failure(self) -> None:
        self.raise_if_gone()
        if self.failure is not None:
            raise self.failure

    async def _looked(self) -> None:
        if self._check is None:
            self._check = trio.Event()
            self._nursery.start_soon(self._look, self._check)
        await self._check.wait()

    async def _look(self, check: trio.Event) -> None:
        started = time.monotonic()
        try:
            arguments = self.path, self._writable, self._backing, self._mountpoint
            self._take(await self._lane.checks.run(files.examine, *arguments, abandon=True))
        except (OSError, ZswapdError) as error:
            self._lose(error)
        finally:
            self._due = started + self.check_s
            if self._check is check:
                self._check = None
            check.set()

    def _take(self, look: Look) -> None:
        if look.opened is not None:
            self._retire()
            self._backing = look.opened
        if self.is_gone:
            self._retire()
            return
        if look.signature != self._signature or self._is_racy:
            self.size, self.mtime_ns = look.signature.size, look.signature.mtime_ns
            self._signature = look.signature
            self._when_changed()
        # Our own write leaves young times as well. They do not hide a change by another program.
        self._is_racy = look.is_racy and look.signature != self._own
        self.failure = None
        self._is_fine = True

    def _lose(self, error: OSError | ZswapdError) -> None:
        if isinstance(error, OSError):
            self.failure = VolumeError(f"{self.path}: {error.strerror}", errno_=error.errno)
        else:
            self.failure = VolumeError(error.message, hint=error.hint, errno_=error.errno_)
        if self._is_fine and not self.is_gone:
            log.warning("a cache volume cannot be used: %s", self.failure)
        self._is_fine = False
        if self._signature is not None and not self.is_gone:
            self._signature = None
            self._when_changed()
        self._retire()

    async def run(self, function: Callable[[SourceFile, *Ts], R], *args: *Ts) -> R:
        """Call a function with the open file, in a thread.

        Raises:
            VolumeError: the device reports an error, or the file is not open.
        """
        backing = self._backing
        if backing is None:
            raise self.failure or VolumeError(f"{self.path} is not open")
        backing.users += 1
        try:
            return await self._lane.reads.run(function, backing, *args, abandon=True)
        except OSError as error:
            raise VolumeError(f"{self.path}: {error.strerror}", errno_=error.errno) from error
        finally:
            backing.users -= 1
            self._close_if_unused(backing)

    def absorb(self, written: Written) -> None:
        """Accept the change of signature by our own write. Any other difference is a change.

        A block device has no signature. A failed write may have left any contents.
        """
        if (
            written.before is not None
            and written.before == self._signature
            and written.after is not None
        ):
            self._signature = self._own = written.after
        elif written.errno_ or written.before is not None:
            self._signature = None
            self._due = 0.0
            self._when_changed()

    def close(self) -> None:
        """Close the file, and wake all requests that wait for a look at it."""
        self.is_gone = True
        if self._check is not None:
            self._check.set()
        self._retire()

    def _retire(self) -> None:
        backing, self._backing = self._backing, None
        if backing is not None:
            backing.is_retired = True
            self._close_if_unused(backing)

    def _close_if_unused(self, backing: SourceFile) -> None:
        if backing.is_retired and not backing.users:
            self._nursery.start_soon(self._close, backing)

    async def _close(self, backing: SourceFile) -> None:
        await self._lane.checks.run(backing.close, abandon=True)
