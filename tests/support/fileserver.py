# SPDX-License-Identifier: GPL-2.0-or-later
"""A program: serve a faulty `MemoryFile` and text files through a real `Session` until SIGTERM; for `mounting.py`.

Writes a line of JSON when ready and one at the end (statistics, discarded ranges), or one that says which error
kept it from serving, whose exit code it then ends with.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path

if "--pyfuse3-first" in sys.argv:
    import pyfuse3  # noqa: F401 - bound to libfuse before the hook can come between

import trio

from tests.support.blockfile import MemoryFile
from tests.support.misbehaving import MisbehavingOperations
from tests.support.textfile import Knob
from zswapd.errors import ZswapdError
from zswapd.fuse.inodes import Directory
from zswapd.fuse.operations import Operations
from zswapd.fuse.session import Session


def say(**message: object) -> None:
    print(json.dumps(message), flush=True)


async def serve(session: Session) -> None:
    async def terminate_on_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                session.terminate()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(terminate_on_signal)
        async with trio.open_nursery() as serving:
            await serving.start(session.serve)
            say(ready=True, hook_active=session.hook_active, hook_problem=session.hook_problem)
        nursery.cancel_scope.cancel()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--size", type=int, default=1 << 20)
    parser.add_argument("--no-hook", action="store_true")
    parser.add_argument("--pyfuse3-first", action="store_true")
    parser.add_argument("--misbehave", action="store_true")
    parser.add_argument("--poll-us", type=int, default=100)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    file = MemoryFile(size=arguments.size, faulty=True)
    directory = Directory()
    directory.add_block_file(file)
    params = directory.add_directory("params")
    directory.add_text_file(params, "knob", Knob())
    directory.add_text_file(params, "fixed", Knob(writable=False))
    operations = (MisbehavingOperations if arguments.misbehave else Operations)(directory)
    session = Session(operations, arguments.mountpoint, hook=not arguments.no_hook, poll_us=arguments.poll_us)
    try:
        with session:
            trio.run(serve, session)
            statistics = asdict(session.statistics())
        if isinstance(operations, MisbehavingOperations):
            operations.check_kept()
    except ZswapdError as error:
        say(error=type(error).__name__, message=error.message, hint=error.hint)
        return error.exit_code
    say(statistics=statistics, discards=file.discards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
