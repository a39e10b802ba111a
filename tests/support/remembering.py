# SPDX-License-Identifier: GPL-2.0-or-later
"""A FUSE file system of one file whose attributes the kernel may cache for 30 s, as with NFS.

The program is this file. SIGUSR1 writes another letter into the file, as another client would on
the server.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import trio

from tests.support import TOP
from tests.support.mounting import TIMEOUT, is_mounted

SIZE = 40960
REMEMBERED_S = 30
FILE_INODE = 2
_processes: dict[Path, subprocess.Popen[str]] = {}


class Server(pyfuse3.Operations):
    """The file system."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = bytearray(b"A" * SIZE)
        self.changes = 1

    def change(self) -> None:
        """Give the file another letter and another mtime."""
        self.contents[:] = bytes([ord("A") + self.changes]) * SIZE
        self.changes += 1

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_nlink = inode, 1
        entry.st_mode = stat.S_IFREG | 0o644 if inode == FILE_INODE else stat.S_IFDIR | 0o755
        entry.st_size = SIZE if inode == FILE_INODE else 0
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = self.changes * 10**9 + 1
        entry.attr_timeout = entry.entry_timeout = REMEMBERED_S
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes."""
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the file."""
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open the file, for any process."""
        return pyfuse3.FileInfo(fh=inode, direct_io=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return the current contents."""
        return bytes(self.contents[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Change a part of the file."""
        self.contents[off : off + len(buf)] = buf
        return len(buf)


async def _serve(server: Server) -> None:
    async def obey() -> None:
        with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGTERM) as signals:
            print("ready", flush=True)
            async for number in signals:
                if number == signal.SIGTERM:
                    pyfuse3.terminate()
                    return
                server.change()
                print("changed", flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


def main(mountpoint: str) -> None:
    """Serve until SIGTERM."""
    server = Server()
    pyfuse3.init(server, mountpoint, {*pyfuse3.default_options, "fsname=remembering"})
    try:
        trio.run(_serve, server)
    finally:
        pyfuse3.close()


@contextlib.contextmanager
def served(mountpoint: Path) -> Iterator[Path]:
    """Run the program while the body runs; remove its process and its mount."""
    mountpoint.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.support.remembering", str(mountpoint)]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            _processes[mountpoint] = process
            yield mountpoint
            process.terminate()
            process.wait(TIMEOUT)
        finally:
            process.kill()
            if is_mounted(mountpoint):
                subprocess.run(["umount", "--lazy", str(mountpoint)], check=False, timeout=TIMEOUT)


def change(mountpoint: Path) -> None:
    """Make the server write the next letter after "A"."""
    process = _processes[mountpoint]
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    assert process.stdout.readline() == "changed\n"


if __name__ == "__main__":
    main(sys.argv[1])
