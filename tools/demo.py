# SPDX-License-Identifier: GPL-2.0-or-later
"""The program behind `scripts/demo`.

It runs one daemon and one workload larger than its memory, and checks every byte.

The program undoes everything on every way out: end, error, Ctrl-C, SIGTERM, SIGHUP. It ignores a
second Ctrl-C during the clean-up, because a half-done clean-up would leave swap behind.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tools.bench.harness import system
from tools.bench.harness.cgroup import MemoryCgroup, memory_hierarchy
from tools.bench.harness.daemon import Daemon
from tools.bench.harness.display import Display
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import Phase, Workload, WorkloadOptions
from zswapd.errors import PermissionsError
from zswapd.system.advice import raise_min_free_kbytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PHASES = ("fill", "seq", "random", "rewrite", "verify")
TITLES = {
    "fill": "writing the data; most of it goes out to swap",
    "seq": "reading it from end to end, every byte compared",
    "random": "touching pages in random order",
    "rewrite": "changing pages in random order",
    "verify": "comparing every byte once more",
}
SPARE_MIB = 512
"""Available memory in MiB that the machine needs beside all the data: swapoff reads it all back."""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Shows zswapd carry a workload larger than its memory."
    )
    parser.add_argument(
        "--data-mib", type=int, default=512, help="data of the workload (default 512)"
    )
    parser.add_argument(
        "--memory-mib", type=int, default=128, help="its memory cgroup (default 128)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of zswapd, e.g. pool.compressor=lzo; may be repeated",
    )
    args = parser.parse_args(argv)
    if args.memory_mib < 16 or args.data_mib <= args.memory_mib:
        parser.error(
            "--memory-mib is at least 16, and --data-mib is larger than that: otherwise nothing is"
            " swapped"
        )
    if bad := [word for word in args.set if "=" not in word]:
        parser.error(f"--set {bad[0]}: write NAME=VALUE")
    return args


def _check_machine(data_mib: int) -> None:
    """Check that the machine has what the demo needs.

    Raises:
        HarnessError: the machine lacks root, a device or memory; the hint says what to do.
    """
    if os.geteuid() != 0:
        raise HarnessError("needs root", hint="sudo scripts/demo")
    for node, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not Path(node).exists():
            with contextlib.suppress(HarnessError):
                system.run("modprobe", module)
        try:
            Path(node).open("rb").close()
        except OSError as exc:
            raise HarnessError(
                f"{node} cannot be opened: {exc.strerror}",
                hint=(
                    f"load the module {module}; in a container, pass the device in (--device"
                    f" {node}, --privileged)"
                ),
            ) from exc
    memory_hierarchy()
    if system.memory_available() < (data_mib + SPARE_MIB) * MIB:
        raise HarnessError(
            f"{data_mib + SPARE_MIB} MiB of memory have to be available,"
            f" {system.memory_available() // MIB} are",
            hint="a smaller --data-mib",
        )


@contextlib.contextmanager
def kernel_reserve(root: Path = Path("/")) -> Iterator[None]:
    """Raise vm.min_free_kbytes to what `zswapctl swapon` insists on, while the context lasts.

    Args:
        root: the directory that has /proc, for tests.

    Raises:
        HarnessError: the value is too low, and this process cannot change it.
    """
    setting = root / "proc/sys/vm/min_free_kbytes"
    before = setting.read_text()
    try:
        is_raised = raise_min_free_kbytes(root)
    except PermissionsError as exc:
        raise HarnessError(
            f"vm.min_free_kbytes is {before.strip()}, too little to swap through a program:"
            f" {exc.message}",
            hint="raise it where this machine is run from: sysctl vm.min_free_kbytes=65536",
        ) from exc
    ours = setting.read_text()
    if is_raised:
        print(
            f"vm.min_free_kbytes: {ours.strip()} while this runs, in place of {before.strip()}",
            flush=True,
        )
    try:
        yield
    finally:
        if is_raised and setting.read_text() == ours:  # otherwise another program has set it
            setting.write_text(before)


def _phase_line(phase: Phase) -> str:
    page_mib = mmap.PAGESIZE / MIB
    line = (
        f"{TITLES[phase.name]}: {phase.seconds:.1f} s, "
        f"{phase.pages_out * page_mib:.0f} MiB out, {phase.pages_in * page_mib:.0f} MiB in"
    )
    if "us_p50" in phase.more:
        line += (
            f", a fault takes {phase.more['us_p50']:.0f} µs (p50), {phase.more['us_p99']:.0f} µs"
            " (p99)"
        )
    return line


def _run(args: argparse.Namespace) -> None:
    start = time.monotonic()
    settings = {"swap.priority": str(system.HIGHEST_PRIORITY)}
    settings |= dict(word.split("=", 1) for word in args.set)
    options = WorkloadOptions(args.data_mib, phases=PHASES)
    with contextlib.ExitStack() as undo:
        undo.enter_context(kernel_reserve())
        print("starting zswapd", flush=True)
        daemon = undo.enter_context(Daemon(size=f"{2 * args.data_mib}M", settings=settings))
        device = daemon.swapon()
        print(f"swapped on: {device} over {daemon.file}", flush=True)
        display = Display(daemon.pool_sample, mmap.PAGESIZE, TITLES)
        cgroup = undo.enter_context(MemoryCgroup("demo", args.memory_mib * MIB))
        print(f"{args.data_mib} MiB of data in {args.memory_mib} MiB of memory", flush=True)
        workload = undo.enter_context(Workload(options, cgroup.path, on_progress=display.update))
        fullest = daemon.pool_sample()
        for phase in workload.phases():
            display.finished(_phase_line(phase))
            fullest = max(fullest, daemon.pool_sample(), key=lambda sample: sample.pages)
        print(
            f"all {args.data_mib} MiB verified. At the fullest: {fullest.pages:,} pages"
            f" ({fullest.page_bytes / MIB:.0f} MiB) in {fullest.pool_bytes / MIB:.0f} MiB of"
            f" memory, ratio {fullest.ratio:.2f}",
            flush=True,
        )
        beside = daemon.ask("stats")["cost"]["beside_pool_bytes"]
        print(
            f"the daemon costs {beside / MIB:.0f} MiB beside the pool: effective ratio"
            f" {fullest.page_bytes / (fullest.pool_bytes + beside):.2f}, and larger with more data",
            flush=True,
        )
        workload.kill()
        daemon.swapoff()
        print("swapped off", flush=True)
    print(f"stopped, nothing left behind; {time.monotonic() - start:.1f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        The exit code: 0 all bytes verified, 1 failed, 2 could not run, 130 interrupted.
    """
    args = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        _check_machine(args.data_mib)
    except HarnessError as exc:
        print(f"scripts/demo: {exc}", file=sys.stderr)
        return 2
    try:
        with system.interruptible("\ninterrupted: swapping off and cleaning up"):
            _run(args)
    except HarnessError as exc:
        print(f"scripts/demo: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("swapped off, stopped, nothing left behind")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
