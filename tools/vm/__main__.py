# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/vm`: it builds the image, or runs a command in a machine."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.harness.system import HarnessError
from tools.vm import image, payload
from tools.vm.machine import Machine


def main() -> int:
    """Build the image or run a command in a machine; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/vm", description="A Debian in a virtual machine, with this checkout's zswapd."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="make the image, unless there is one")
    run = commands.add_parser("run", help="boot, run a shell command as root, and end")
    run.add_argument("shell", metavar="COMMAND")
    run.add_argument("--kernel", choices=image.KERNELS, default="new")
    run.add_argument("--memory", type=int, default=768, metavar="MIB")
    run.add_argument("--limit", type=float, default=240, metavar="SECONDS")
    run.add_argument("--console", action="store_true", help="show the console's log at the end")
    options = parser.parse_args()
    try:
        return _build() if options.command == "build" else _run(options)
    except HarnessError as error:
        print(f"scripts/vm: {error}", file=sys.stderr)
        return 1


def _build() -> int:
    print(image.build().directory)
    return 0


def _run(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="zvm-") as name:
        directory = Path(name)
        start = time.monotonic()
        machine = Machine(
            image.build(),
            payload.pack(directory),
            directory / "vm",
            kernel=options.kernel,
            memory_mib=options.memory,
        )
        with machine:
            print(f"scripts/vm: up after {time.monotonic() - start:.1f} s", file=sys.stderr)
            try:
                done = machine.run(options.shell, options.limit)
            except HarnessError:
                print(machine.autopsy(), file=sys.stderr)
                raise
            print(done.output, end="")
            if options.console:
                print(machine.console_tail(), file=sys.stderr)
            return done.status if done.status >= 0 else 128 - done.status


if __name__ == "__main__":
    sys.exit(main())
