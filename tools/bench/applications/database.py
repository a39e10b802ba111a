# SPDX-License-Identifier: GPL-2.0-or-later
"""A database in memory that is larger than its memory: Redis with one client.

Redis is the program in Debian's redis-tools, started by the name that makes it a server; no service
is installed or started. It has no persistence and a socket of its own. The client is this process,
outside the cgroup. A value is 1 KiB of the raw workload's pages (tools/bench/harness/workload.c)
with key and generation in front. So the client verifies each answer without a copy of the value.

The client first sets all keys. Then it does single operations: nine of ten on a tenth of the keys,
the rest on all keys. A fifth of the operations set a new value. The times include about 40 µs of
the client's own Python, so they are good only for comparison.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tools.bench.applications.base import (
    Application,
    Column,
    Level,
    TooSlowError,
    in_cgroup,
    running,
)
from tools.bench.harness.system import MIB, HarnessError
from tools.bench.harness.workload import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROGRAM = Path("/usr/bin/redis-check-rdb")
VALUE_BYTES = 1024
HEAD = struct.Struct("=QQ")
PIPELINE = 500
OPERATIONS_PER_MIB = 100
START_LIMIT_S = 10.0


class Database(Application):
    """Redis with more data than memory."""

    name: ClassVar[str] = "database"
    levels: ClassVar[Sequence[Level]] = (
        Level("256 MiB, no limit", 256, None),
        Level("256 in 200 MiB", 256, 200),
        Level("256 in 96 MiB", 256, 96),
    )
    short: ClassVar[Sequence[Level]] = (Level("24 in 20 MiB", 24, 20),)
    columns: ClassVar[Mapping[str, Column]] = {
        "rate": Column("operations/s", more_is_better=True),
        "load": Column("load s"),
        "p50": Column("p50 µs"),
        "p99": Column("p99 µs"),
        "p999": Column("p99.9 µs"),
    }

    def __init__(self) -> None:
        self._pages = b""

    def missing(self) -> str:
        """Return what is not installed, or an empty string."""
        if not PROGRAM.exists():
            return f"{PROGRAM} is not there (apt-get install redis-tools)"
        try:
            import redis  # noqa: F401
        except ImportError:
            return "the Python package redis is not installed (pip install 'zswapd[bench]')"
        return ""

    def prepare(self, *, quick: bool) -> None:
        """Make the data that values are cut from."""
        command = [str(build()), "--mib", "2" if quick else "16", "--phases", "dump"]
        self._pages = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout

    def _value(self, key: int, generation: int) -> bytes:
        at = (key * 7 + generation * 3) * VALUE_BYTES % (len(self._pages) - VALUE_BYTES)
        return HEAD.pack(key, generation) + self._pages[at : at + VALUE_BYTES - HEAD.size]

    def run(self, level: Level, cgroup: Path | None, limit: float) -> Mapping[str, float]:
        """Fill it with `level.amount` MiB of values, then ask."""
        import redis

        directory = Path(tempfile.mkdtemp(prefix="zbench-redis-"))
        address = directory / "socket"
        words = [
            f"--{name} {value}"
            for name, value in (("port", 0), ("unixsocket", address), ("dir", directory))
        ]
        options = [word for pair in words for word in pair.split(" ", 1)]
        # The name that a program is started by is what makes this one a server.
        named = [
            "bash",
            "-c",
            'exec -a redis-server "$0" "$@"',
            str(PROGRAM),
            *options,
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        try:
            with (
                (directory / "log").open("wb") as log,
                running(
                    in_cgroup(cgroup, named), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                ) as process,
            ):
                _wait_for(address, process, directory / "log")
                with redis.Redis(unix_socket_path=str(address), socket_timeout=limit) as client:
                    try:
                        return self._ask(client, level, time.monotonic() + limit, limit)
                    except redis.TimeoutError:
                        raise TooSlowError(limit, {"load": limit}) from None
                    except redis.RedisError as exc:
                        raise HarnessError(f"redis: {exc}") from exc
        finally:
            shutil.rmtree(directory)

    def _ask(self, client: Any, level: Level, end: float, limit: float) -> Mapping[str, float]:
        keys = level.amount * MIB // VALUE_BYTES
        generations = bytearray(keys)
        started = time.monotonic()
        for first in range(0, keys, PIPELINE):
            with client.pipeline(transaction=False) as pipeline:
                for key in range(first, min(first + PIPELINE, keys)):
                    pipeline.set(key, self._value(key, 0))
                pipeline.execute()
            if time.monotonic() > end:
                raise TooSlowError(limit, {"load": limit})
        load = time.monotonic() - started
        rng = random.Random(1)
        hot = rng.sample(range(keys), keys // 10)
        times: list[float] = []
        operations = level.amount * OPERATIONS_PER_MIB
        started = time.monotonic()
        for _ in range(operations):
            key = rng.choice(hot) if rng.random() < 0.9 else rng.randrange(keys)
            before = time.perf_counter()
            answer = client.get(key)
            times.append(time.perf_counter() - before)
            if answer != self._value(key, generations[key]):
                raise HarnessError(f"DATA WAS LOST: the value of key {key} differs")
            if rng.random() < 0.2:
                generations[key] = generations[key] + 1 & 0xFF
                before = time.perf_counter()
                client.set(key, self._value(key, generations[key]))
                times.append(time.perf_counter() - before)
            if time.monotonic() > end:
                break
        figures = _figures(times, time.monotonic() - started, load)
        if time.monotonic() > end:
            raise TooSlowError(limit, figures)
        return figures


def _figures(times: list[float], seconds: float, load: float) -> dict[str, float]:
    times.sort()
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    return {
        "rate": len(times) / seconds,
        "load": load,
        **{name: times[int(len(times) * share)] * 1e6 for name, share in shares.items()},
    }


def _wait_for(address: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while not address.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise HarnessError(
                f"redis-server does not come up: {log.read_text(errors='replace')[-400:]}"
            )
        time.sleep(0.02)
