# SPDX-License-Identifier: GPL-2.0-or-later
"""Any byte range written, punched and zeroed at random on a real daemon whose workers are killed.

A model of bytes agrees.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.support.mounting import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from tests.support.strategies import KINDS, page
from tests.support.swap import Stage, next_worker, stage

__all__ = ["stage"]
pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

PAGE = 4096
SIZE = 8 << 20
STEPS = 1200
KILLED_AT = (400, 800)
HOLES = {"punch": PUNCH_HOLE | KEEP_SIZE, "zero": ZERO_RANGE | KEEP_SIZE, "zero alone": ZERO_RANGE}


class Model:
    """What the file holds.

    Args:
        path: the file.
        rng: what happens.
    """

    def __init__(self, path: Path, rng: random.Random) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._rng = rng
        self._bytes = bytearray(SIZE)
        self.last = ""

    def step(self) -> None:
        """Do one thing to one range."""
        rng = self._rng
        length = rng.choice(
            (1, 7, 511, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 40 * PAGE, rng.randrange(1, SIZE // 8))
        )
        offset = rng.choice((rng.randrange(SIZE), rng.randrange(SIZE // PAGE) * PAGE))
        length = min(length, SIZE - offset)
        what = rng.choice(("write", "write", "read", *HOLES))
        self.last = f"{what} {length} at {offset}"
        if what == "write":
            self._write(offset, length)
        elif what == "read":
            assert os.pread(self._fd, length, offset) == self._bytes[offset : offset + length]
        else:
            assert fallocate(self._fd, HOLES[what], offset, length) == 0
            self._bytes[offset : offset + length] = bytes(length)

    def _write(self, offset: int, length: int) -> None:
        rng = self._rng
        data = b"".join(
            page(rng.choice(KINDS), rng.randrange(40), PAGE) for _ in range(length // PAGE + 1)
        )[:length]
        assert os.pwrite(self._fd, data, offset) == length
        self._bytes[offset : offset + length] = data

    def check(self) -> None:
        """Compare all of it."""
        for offset in range(0, SIZE, PAGE):
            assert os.pread(self._fd, PAGE, offset) == self._bytes[offset : offset + PAGE], (
                f"page {offset // PAGE}"
            )

    def empty(self) -> None:
        """Punch all of it."""
        assert fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, 0, SIZE) == 0

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.parametrize("allocator", ["zsmalloc", "zbud"])
@pytest.mark.parametrize("seed", [1, None], ids=["fixed", "random"])
def test_byte_ranges_are_what_a_model_says(stage: Stage, allocator: str, seed: int | None) -> None:
    seed = random.randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}")
    daemon = stage.daemon("8M", memory__reserve="32M", pool__limit="64M", pool__allocator=allocator)
    model = Model(daemon.file, random.Random(seed))
    try:
        for number in range(STEPS):
            if number in KILLED_AT:
                worker = daemon.worker_pid()
                os.kill(worker, signal.SIGKILL)
                next_worker(daemon, worker)
            try:
                model.step()
            except (AssertionError, OSError) as error:
                error.add_note(f"seed {seed}, step {number}: {model.last}")
                raise
        model.check()
        assert daemon.pool_sample().pages > 0
        model.empty()
        assert daemon.pool_sample().pages == 0
    finally:
        model.close()
    assert daemon.ask("stats")["fuse"]["internal_errors"] == 0
