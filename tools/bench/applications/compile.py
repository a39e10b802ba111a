# SPDX-License-Identifier: GPL-2.0-or-later
"""A C project, compiled by more compilers at once than fit into the memory.

The project is the static library of Debian's source package of zstd: about 40 files, a few of which
take 100 MiB in the compiler. Only its Makefile configures it. `apt-get source` fetches it, with its
own source list and package lists, so the system's stay unchanged. Sources and compiler are in the
page cache, because a process in no cgroup used both before the first run.

Each run builds in the same directory. Its library has to equal the first build's byte for byte.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, ClassVar

from tools.bench.applications.base import (
    BUILD,
    Application,
    Column,
    Level,
    TooSlowError,
    children_cpu,
    in_cgroup,
    running,
)
from tools.bench.harness.system import HarnessError, missing_programs, run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PACKAGE = "libzstd"
SOURCES = "deb-src http://deb.debian.org/debian bookworm main\n"
DECODER_ONLY = (
    "ZSTD_LIB_COMPRESSION=0",
    "ZSTD_LIB_DICTBUILDER=0",
    "ZSTD_LEGACY_SUPPORT=0",
    "ZSTD_LIB_DEPRECATED=0",
)
FETCH_LIMIT_S = 180.0
BUILD_LIMIT_S = 600.0


class Compile(Application):
    """`make -jN` of a library in C; verified by its hash."""

    name: ClassVar[str] = "compile"
    levels: ClassVar[Sequence[Level]] = (
        Level("-j2, no limit", 2, None),
        Level("-j2 in 192 MiB", 2, 192),
        Level("-j4 in 192 MiB", 4, 192),
        # With less memory and a fast swap device, the kernel (6.18) kills a compiler: all
        # swapped-in pages are active.
        Level("-j8 in 192 MiB", 8, 192),
        Level("-j4 in 96 MiB", 4, 96),
    )
    short: ClassVar[Sequence[Level]] = (Level("-j2", 2, 48),)
    columns: ClassVar[Mapping[str, Column]] = {"seconds": Column("s"), "cpu": Column("processor s")}

    def __init__(self) -> None:
        self._place = BUILD / "compile"
        self._source = self._place
        self.options: tuple[str, ...] = ()
        self._reference = ""

    def missing(self) -> str:
        """Return which program is not installed, or an empty string."""
        absent = missing_programs(["make", "gcc", "ar", "dpkg-source", "apt-get"])
        return (
            f"{', '.join(absent)} not installed (apt-get install make gcc dpkg-dev)"
            if absent
            else ""
        )

    def prepare(self, *, quick: bool) -> None:
        """Fetch the source unless it is there, and build it once.

        The build warms the page cache and gives the hash of the library.
        """
        self.options = DECODER_ONLY if quick else ()
        self._source = fetch()
        self._build(2, None, BUILD_LIMIT_S)
        self._reference = self._hash()

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Build everything with `level.amount` compilers at once."""
        figures = self._build(level.amount, cgroup, limit)
        if self._hash() != self._reference:
            raise HarnessError(
                "DATA WAS LOST: the library differs from the one that was built without swap"
            )
        return figures

    def _hash(self) -> str:
        return hashlib.sha256((self._place / "lib/libzstd.a").read_bytes()).hexdigest()

    def _build(self, jobs: int, cgroup: Path | None, limit: float) -> dict[str, float]:
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._source, self._place)
        os.sync()  # the copy's writeback must not fall into the run
        command = ["make", "-C", str(self._place / "lib"), f"-j{jobs}", "libzstd.a", *self.options]
        started, cpu = time.monotonic(), children_cpu()
        with (
            (BUILD / "compile.log").open("wb") as log,
            running(
                in_cgroup(cgroup, command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ) as process,
        ):
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                raise TooSlowError(limit, {"seconds": limit}) from None
        if code:
            lines = (BUILD / "compile.log").read_text(errors="replace").splitlines()
            words = (
                "; ".join([line for line in lines if "error" in line.lower()][:2])
                or "no error in its output"
            )
            raise HarnessError(f"make ended with {code}: {words}")
        return {"seconds": time.monotonic() - started, "cpu": children_cpu() - cpu}


def fetch() -> Path:
    """Return the directory of the unpacked source; fetch it first if it is missing.

    Raises:
        HarnessError: apt cannot fetch it.
    """
    place = BUILD / "source"
    ready = place / PACKAGE
    if ready.exists():
        return ready
    lists = place / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (place / "sources.list").write_text(SOURCES)
    apt = [
        "apt-get",
        "-q",
        "-o",
        f"Dir::Etc::sourcelist={place / 'sources.list'}",
        "-o",
        "Dir::Etc::sourceparts=-",
    ]
    apt += ["-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=root"]
    run(*apt, "update", limit=FETCH_LIMIT_S)
    run(
        "sh",
        "-c",
        'cd "$0" && exec "$@"',
        place,
        *apt,
        "source",
        "--download-only",
        PACKAGE,
        limit=FETCH_LIMIT_S,
    )
    (description,) = place.glob("*.dsc")
    fresh = place / f"unpacked-{os.getpid()}"
    run("dpkg-source", "--no-check", "--extract", description, fresh, limit=FETCH_LIMIT_S)
    fresh.rename(ready)
    shutil.rmtree(lists)
    return ready
