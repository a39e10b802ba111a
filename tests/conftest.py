# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for every test: strict logs, a capability header, tiers, and nothing left behind.

Tiers: tests marked `soak`, `bench`, `vm` or `package` run only when asked for (`-m soak`, or
`--tier soak`). Tests marked `mount`, `kernel` or `box` are skipped, with the reason, where the
machine cannot do what they need; they need not ask themselves. Tests marked `slow` run by default;
`make quick` leaves them out.

Property tests run under the Hypothesis profile "ci" (the default); `--hypothesis-profile=thorough`
looks longer, and "short", which `make quick` uses, looks less long.

In two processes (`scripts/test` without arguments, by pytest-xdist) the tests of a file stay
together. All tests that swap for real run one after the other in one process, because the kernel
has one set of swap areas. So do those that boot an emulated machine. Both begin first, because they
take longest. The process that started the others looks for leftovers.

On a machine where other zswapd daemons come and go while the tests run, `--shared-machine` limits
the check for leftovers to those that are certainly this run's own.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import capabilities, compiled, leftovers

if compiled.WANTS_PURE:
    compiled.use_pure()

pytest_plugins = ["pytester", "tests.support.checklogs"]

# No deadline: the machines are shared, and a slow example is not a wrong one. Counts are those at
# which all model tests together stay well below a minute on two cores; "thorough" is for a change
# to the core, and takes minutes.
settings.register_profile(
    "ci", max_examples=100, stateful_step_count=50, deadline=None, print_blob=True
)
settings.register_profile(
    "thorough",
    max_examples=1500,
    stateful_step_count=120,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# For `make quick`, and for tests that run a second time on plain Python (test_pure.py).
settings.register_profile(
    "short", max_examples=10, stateful_step_count=25, deadline=None, print_blob=True
)
settings.load_profile("ci")

SWAPPING = re.compile(
    r"tests/((kernel|packages|bench)/|mount/test_disk_refusals\.py"
    r"|unit/swapdevice/test_kernel\.py)"
)
"""Tests that swap for real, or measure."""
BOOTING = "tests/vm/"
"""Tests that boot an emulated machine."""
TIERS = ("soak", "bench", "vm", "package")
_BEFORE = pytest.StashKey[leftovers.Leftovers]()
_LEFT = pytest.StashKey[leftovers.Leftovers]()
_SWEPT = pytest.StashKey[list[str]]()

GRACE_S = 5.0
"""Seconds that a stopped daemon has for its unmount before its mount counts as left behind."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this suite."""
    group = parser.getgroup("zswapd")
    group.addoption(
        "--tier",
        action="append",
        default=[],
        choices=TIERS,
        help="run this tier too (off by default)",
    )
    group.addoption(
        "--shared-machine",
        action="store_true",
        help=(
            "other zswapd daemons run here: let only leftovers below this run's own directory fail"
            " the run"
        ),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Clear away what dead runs left, and note what is there before the first test."""
    if not compiled.WANTS_PURE and compiled.stale():
        names = ", ".join(str(path.relative_to(compiled.PACKAGE)) for path in compiled.stale())
        pytest.exit(
            f"compiled modules are older than their source ({names}): run scripts/test, or set"
            " ZSWAPD_PURE=1",
            3,
        )
    if capabilities.is_in_memory(
        Path(tempfile.gettempdir())
    ):  # tests have disks in files there, which a backing has to be on
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/var/tmp")
    # A background job of a shell without job control ignores SIGINT, and a process that a test
    # interrupts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _is_part(config):
        return
    config.stash[_SWEPT] = leftovers.sweep() if os.geteuid() == 0 else []
    config.stash[_BEFORE] = leftovers.snapshot()


def _is_part(config: pytest.Config) -> bool:
    """Say whether this process runs a part of the tests for another one (pytest-xdist)."""
    return hasattr(config, "workerinput")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what the machine can do, and what had to be swept."""
    return capabilities.report() + [
        f"zswapd: swept {line}" for line in config.stash.get(_SWEPT, [])
    ]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have pytest-xdist keep the tests of a file together, and all that swap for real."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "swap" if SWAPPING.match(file) else BOOTING if file.startswith(BOOTING) else file

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Switch tiers off, and skip what this machine cannot do; begin with what takes longest."""
    items.sort(
        key=lambda item: (not item.nodeid.startswith(BOOTING), not SWAPPING.match(item.nodeid))
    )
    asked = {*config.getoption("--tier"), *re.findall(r"\w+", config.option.markexpr)}
    for item in items:
        for tier in TIERS:
            if item.get_closest_marker(tier) and tier not in asked:
                item.add_marker(
                    pytest.mark.skip(
                        reason=f"the {tier} tier is off: ask for it with --tier {tier}"
                    )
                )
        if item.get_closest_marker("mount"):
            item.add_marker(capabilities.requires_fuse())
        if item.get_closest_marker("kernel"):
            item.add_marker(capabilities.requires_swap())
        if item.get_closest_marker("box"):
            item.add_marker(capabilities.requires_emulator())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let tests that compute for minutes do so.

    Faulthandler's look at a thread that runs may end the process (SIGSEGV).
    """
    if item.get_closest_marker("soak"):
        faulthandler.cancel_dump_traceback_later()


def _left_behind(config: pytest.Config) -> leftovers.Leftovers:
    new = leftovers.snapshot().since(config.stash[_BEFORE])
    if not config.getoption("--shared-machine"):
        return new

    def mine(thing: str) -> bool:
        if leftovers.decoy_pid(thing) == os.getpid():
            return True
        directory = leftovers.run_directory(thing.rsplit(" on ", maxsplit=1)[-1])
        return directory is not None and leftovers.run_pid(directory) == os.getpid()

    own_loops = frozenset(filter(mine, new.loops))
    names = {line.split(" on ")[0] for line in own_loops}
    own_swaps = frozenset(path for path in new.swaps if path.rsplit("/", 1)[-1] in names)
    own_cgroups = frozenset(path for path in new.cgroups if f"-{os.getpid()}" in path)
    return leftovers.Leftovers(
        frozenset(filter(mine, new.mounts)), own_loops, own_swaps, own_cgroups
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves a mount, a loop device, swap or a cgroup behind."""
    if _is_part(session.config):
        return
    end = time.monotonic() + GRACE_S
    while (left := _left_behind(session.config)).lines() and time.monotonic() < end:
        time.sleep(0.2)
    session.config.stash[_LEFT] = left
    if left.lines():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name what was left behind, loudly."""
    lines = config.stash.get(_LEFT, leftovers.Leftovers()).lines()
    if not lines:
        return
    terminalreporter.section(
        "left behind on this machine: the run FAILS", sep="!", red=True, bold=True
    )
    for line in lines:
        terminalreporter.line(line, red=True)
    if not config.getoption("--shared-machine"):
        terminalreporter.line("if another zswapd runs here at the same time, use --shared-machine")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Take away the handler of a test that has set up the program's log.

    It would print what a later test announces.
    """
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [one for one in root.handlers if type(one).__module__ == "zswapd.log"]:
        root.removeHandler(handler)
        root.setLevel(level)


@pytest.fixture(
    params=[4096, *(pytest.param(size, marks=pytest.mark.slow) for size in (16384, 65536))],
    ids=lambda size: f"{size // 1024}K",
)
def page_size(request: pytest.FixtureRequest) -> int:
    """Every page size Linux has; the core takes it as a plain value."""
    size: int = request.param
    return size
