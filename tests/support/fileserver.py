# SPDX-License-Identifier: GPL-2.0-or-later
"""A program for `mounting.py`: it serves a faulty `MemoryFile`, text files and volumes.

It serves through a real `Session` until SIGTERM. With --allocators, file and volumes are in a small
core instead, whose halves compete for its frames.

It writes a line of JSON when it is ready and another at the end: statistics, discarded ranges, the
contents of the core. If it cannot serve, the line has the error, and the program ends with the
error's exit code.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import mmap
import signal
import sys
from dataclasses import asdict
from pathlib import Path

if "--pyfuse3-first" in sys.argv:
    import pyfuse3  # noqa: F401 - bound to libfuse before the hook is loaded

import trio

from tests.support.blockfile import MemoryFile
from tests.support.fakes import FakePam
from tests.support.misbehaving import MisbehavingOperations
from tests.support.stack import EPHEMERAL_ALLOCATORS, Stack, build
from tests.support.textfile import SettingFile
from zswapd.core.block.device import Device
from zswapd.core.frontends.cleancache import Cleancache
from zswapd.core.tmem.objnodes import Objnodes
from zswapd.core.tmem.tmem import Tmem
from zswapd.errors import VolumeError, ZswapdError
from zswapd.fuse.inodes import Directory
from zswapd.fuse.operations import Operations
from zswapd.fuse.session import MOST_WAITING, Session, forget_inode, forget_name
from zswapd.volumes.manager import KernelCache, Volumes, make_lane
from zswapd.volumes.volume import Volume


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


class Entries:
    """The directory of volumes."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.inode = directory.add_directory("cache")

    def add_cached_file(self, name: str, inode: int, file: Volume) -> None:
        self.directory.add_cached_file(self.inode, name, inode, file)

    def remove_cached_file(self, inode: int) -> None:
        self.directory.remove(inode)


def make_stack(allocators: str, frames: int) -> Stack:
    """Return a core whose halves share all frames.

    `allocators` are swap's and the cache's, such as "zbud,zsmalloc".
    """
    persistent, ephemeral = allocators.split(",")
    stack = build(
        mmap.PAGESIZE,
        frames=frames,
        node_reserve=8192,
        allocator=EPHEMERAL_ALLOCATORS[persistent],
        ephemeral=ephemeral,
    )
    stack.frames.reserve_target = 0
    return stack


def say_core(stack: Stack) -> dict[str, object]:
    """Return the contents of a core at the end; raise if an invariant is broken."""
    stack.check()
    return {
        "allocators": [
            type(allocator).__name__ for allocator in (stack.allocator, stack.cache.allocator)
        ],
        "frontswap": asdict(stack.frontswap.statistics()),
        "zbuds": asdict(stack.cache.zbuds.statistics()),
        "cleancache": asdict(stack.cache.cleancache.statistics()),
    }


def make_volumes(directory: Directory, mountpoint: Path, stack: Stack | None) -> Volumes:
    entries = Entries(directory)
    cache = Cleancache(
        Tmem(Objnodes(100_000, reserve=20_000)), FakePam(mmap.PAGESIZE), lambda: None
    )
    if stack:
        cache = stack.cache.cleancache
    return Volumes(
        cache,
        entries,
        KernelCache(forget_inode, lambda name: forget_name(entries.inode, name)),
        mountpoint=mountpoint,
        page_size=mmap.PAGESIZE,
        lanes=[make_lane(number, 4) for number in range(3)],
        most_waiting=MOST_WAITING,
        left={},
        base={},
    )


async def obey(volumes: Volumes) -> None:
    """Run the commands of standard input, one on each line, and answer each."""
    async for line in trio.wrap_file(sys.stdin):
        word, *arguments = line.split()
        if word == "add":
            await volumes.add(*arguments)
        elif word == "try-add":
            try:
                await volumes.add(*arguments)
            except VolumeError as error:
                say(refused=f"{errno.errorcode[error.errno_]}: {error}")
                continue
        elif word == "remove":
            await volumes.remove(*arguments)
        elif word == "invalidate":
            volumes.find(*arguments).drop()
            await volumes.find(*arguments).renew()
        say(done=[asdict(item) for item in volumes.statistics()])


async def serve(
    session: Session, volumes: Volumes | None, specs: dict[str, tuple[str, str]]
) -> None:
    async def terminate_on_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                session.terminate()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(terminate_on_signal)
        async with trio.open_nursery() as serving:
            await serving.start(session.serve)
            if volumes is not None:
                volumes.apply(check_s=0.1, cutoff=None)
                await nursery.start(volumes.run, specs)
                nursery.start_soon(obey, volumes)
            say(ready=True)
        nursery.cancel_scope.cancel()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--size", type=int, default=1 << 20)
    parser.add_argument("--pyfuse3-first", action="store_true")
    parser.add_argument("--misbehave", action="store_true")
    parser.add_argument(
        "--volumes", type=json.loads, metavar="JSON", help="(path, mode) of each volume by name"
    )
    parser.add_argument("--poll-us", type=int, default=100)
    parser.add_argument(
        "--allocators",
        metavar="SWAP,CACHE",
        help="a core with these allocators, instead of plain memory",
    )
    parser.add_argument("--frames", type=int, default=2000, help="that the core has")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    memory = MemoryFile(size=arguments.size, faulty=True)
    stack = make_stack(arguments.allocators, arguments.frames) if arguments.allocators else None
    file = (
        Device("swap", arguments.size, stack.frontswap, 1, page_size=mmap.PAGESIZE)
        if stack
        else memory
    )
    directory = Directory()
    directory.add_block_file(file)
    params = directory.add_directory("params")
    directory.add_text_file(params, "knob", SettingFile())
    directory.add_text_file(params, "fixed", SettingFile(writable=False))
    operations = (MisbehavingOperations if arguments.misbehave else Operations)(directory)
    session = Session(operations, arguments.mountpoint, poll_us=arguments.poll_us)
    volumes = (
        make_volumes(directory, arguments.mountpoint, stack)
        if arguments.volumes is not None
        else None
    )
    try:
        with session:
            trio.run(serve, session, volumes, arguments.volumes or {})
            statistics = asdict(session.statistics())
        if isinstance(operations, MisbehavingOperations):
            operations.check_kept()
    except ZswapdError as error:
        say(error=type(error).__name__, message=error.message, hint=error.hint)
        return error.exit_code
    say(statistics=statistics, discards=memory.discards, core=say_core(stack) if stack else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
