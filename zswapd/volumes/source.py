# SPDX-License-Identifier: GPL-2.0-or-later
"""A volume's backing file as the event loop sees it.

Looked at when that is due, used in threads, closed when nobody uses it.

A look that finds another signature says so to the volume (`when_changed`) before anybody who waited
for it goes on. A backing file that cannot be looked at is a change, too: what was cached cannot be
vouched for any more, and every request fails with what the last look said, until one finds the file
again.
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
    """The threads and buffers of one volume; nobody else's requests wait in them.

    Attributes:
        reads: reads, writes and syncs, as many at a time as it has threads.
        checks: looks at the backing file.
        notices: notifications of the kernel, which wait for readers.
        buffers: one for each read.
    """

    reads: Offload
    checks: Offload
    notices: Offload
    buffers: Sequence[mmap.mmap]

    @property
    def is_idle(self) -> bool:
        """Whether no thread is in use, so that another volume can have them."""
        return not (self.reads.unfinished or self.checks.unfinished or self.notices.unfinished)


class Source:
    """One backing file.

    Args:
        path: its name.
        writable: whether it is opened for writing as well.
        lane: the volume's threads.
        mountpoint: of our mount, on which it must not lie.
        nursery: for what goes on when whoever asked for it has left.
        when_changed: called when its contents are others than before.
        signature: as it was when a predecessor last looked; None if nobody can say.

    Attributes:
        size: bytes at the last look; 0 before the first.
        mtime_ns: when the contents changed underneath, as far as we know; our own writes do not
            count, the kernel would forget what it has.
        failure: why it cannot be used, None if it can.
        check_s: longest time between two looks while there are requests.
        is_gone: the volume was removed.
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
        self.failure: VolumeError | None = VolumeError(f"{path} was not looked at yet")
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
        """What the file looked like last, None if that cannot be relied on."""
        return None if self._is_racy else self._signature

    @property
    def remaining_s(self) -> float:
        """How long the last look is good for, seconds."""
        return max(self._due - time.monotonic(), 0.0)

    def raise_if_gone(self) -> None:
        """Fail if the volume was removed.

        Raises:
            VolumeError: it was.
        """
        if self.is_gone:
            raise VolumeError("the volume was removed", errno_=errno.ESTALE)

    async def look_if_due(self) -> None:
        """Look at the file if the last look is too old.

        Raises:
            VolumeError: it cannot be looked at, or the volume was removed.
        """
        if time.monotonic() >= self._due:
            await self._looked()
        self._raise_failure()

    async def look(self) -> None:
        """Look at the file, beginning now.

        Raises:
            VolumeError: it cannot be looked at, or the volume was removed.
        """
        if self._check is not None:
            await self._looked()  # began before us: does not count
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
        # Times that our own write has left are young as well, but say nothing of anybody else.
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
        """Call a function with the open file in a thread.

        Raises:
            VolumeError: what the device says; the file is not open.
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
        """Take what our own write did to the signature for known.

        Anything else is a change underneath.

        (Of a block device nothing is known before or after; a failed write leaves anything
        possible.)
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
        """Let go of the file, and of whoever waits for a look at it."""
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
