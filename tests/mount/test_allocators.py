# SPDX-License-Identifier: GPL-2.0-or-later
"""Swap and a volume in one small core, through the kernel, over each choice of allocators.

A model for either half.

The frames are too few for both. Stores of swap evict what is cached, until nothing is cached.
"""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.test_files import errno_of
from tests.support.mounting import ALLOCATORS, KEEP_SIZE, PUNCH_HOLE, FileServer, fallocate, serving
from tests.support.strategies import KINDS, page
from zswapd.volumes.file_io import RACY_NS

PAGE = 4096
SWAP_PAGES, VOLUME_PAGES, FRAMES = 1200, 400, 500
CLASSES = {"zsmalloc": "ZsPool", "zbud": "ZbudPool"}


class SwapModel:
    """What the swap file holds: a page a number, None for one that is lost.

    Args:
        path: the file.
        rng: what happens.
    """

    def __init__(self, path: Path, rng: random.Random) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._rng = rng
        self.pages: list[bytes | None] = [bytes(PAGE)] * SWAP_PAGES
        self.refusals = 0

    def step(self) -> None:
        """Write, discard or read some pages side by side."""
        rng = self._rng
        first = rng.randrange(SWAP_PAGES)
        count = min(rng.choice((1, 2, 16, 100)), SWAP_PAGES - first)
        match rng.choice(("write", "write", "write", "part", "discard", "read", "read")):
            case "write":
                self._write(
                    first, [page(rng.choice(KINDS), rng.randrange(40), PAGE) for _ in range(count)]
                )
            case "part":
                self._write_part(first)
            case "discard":
                assert fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, first * PAGE, count * PAGE) == 0
                self.pages[first : first + count] = [bytes(PAGE)] * count
            case "read":
                self._read(first, count)

    def _write(self, first: int, new: list[bytes]) -> None:
        old = self.pages[first : first + len(new)]
        try:
            done = os.pwrite(self._fd, b"".join(new), first * PAGE) // PAGE
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.refusals += 1
            done = 0
        self.pages[first : first + done] = new[:done]
        for place in range(done, len(new)):
            self._look(first + place, {new[place], old[place]})

    def _look(self, number: int, possible: set[bytes | None]) -> None:
        """Find out what became of a page whose write has failed.

        It is as the write made it, or as it was, or an error.
        """
        try:
            self.pages[number] = os.pread(self._fd, PAGE, number * PAGE)
            assert self.pages[number] in possible
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.pages[number] = None

    def _write_part(self, number: int) -> None:
        before = self.pages[number]
        data = self._rng.randbytes(100)
        code = errno_of(os.pwrite, self._fd, data, number * PAGE + 50)
        if before is None:
            assert code == errno.EIO
        elif code:
            assert code == errno.ENOSPC
            self._look(number, {before})
        else:
            self.pages[number] = before[:50] + data + before[150:]

    def _read(self, first: int, count: int) -> None:
        expected = self.pages[first : first + count]
        readable = (
            expected.index(None) if None in expected else len(expected)
        )  # a read is answered up to a page that is not
        if not readable:
            assert errno_of(os.pread, self._fd, count * PAGE, first * PAGE) == errno.EIO
        else:
            assert os.pread(self._fd, count * PAGE, first * PAGE) == b"".join(
                filter(None, expected[:readable])
            )

    def read_all(self) -> None:
        """Read every page by itself."""
        for number in range(SWAP_PAGES):
            self._read(number, 1)

    def close(self) -> None:
        os.close(self._fd)


class VolumeModel:
    """What a volume in write-through mode holds.

    Args:
        path: in the mount.
        backing: its file.
        rng: what happens.
    """

    def __init__(self, path: Path, backing: Path, rng: random.Random) -> None:
        self._fd = os.open(path, os.O_RDWR)
        self._backing = backing
        self._rng = rng
        self.data = bytearray(backing.read_bytes())

    def step(self) -> None:
        """Read, mostly past the kernel's page cache, or write some pages."""
        rng = self._rng
        offset, length = rng.randrange(len(self.data)), rng.randrange(1, 40 * PAGE)
        if rng.random() < 0.9:
            if rng.random() < 0.8:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(self._fd, length, offset) == self.data[offset : offset + length]
            return
        piece = rng.randbytes(min(length, len(self.data) - offset))
        assert os.pwrite(self._fd, piece, offset) == len(piece)
        self.data[offset : offset + len(piece)] = piece
        assert self._backing.read_bytes() == self.data

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture(params=ALLOCATORS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileServer]:
    rng = random.Random(2)
    kinds = [kind for kind in KINDS if kind not in {"poor", "noise"}]
    backing = tmp_path / "backing"
    backing.write_bytes(
        b"".join(page(rng.choice(kinds), rng.randrange(40), PAGE) for _ in range(VOLUME_PAGES))
    )
    os.utime(backing, ns=(backing.stat().st_mtime_ns - RACY_NS,) * 2)
    words = json.dumps({"disk": (str(backing), "writethrough")})
    sizes = ("--size", str(SWAP_PAGES * PAGE), "--frames", str(FRAMES))
    with serving(
        tmp_path / "mnt", "--volumes", words, "--allocators", request.param, *sizes
    ) as server:
        yield server


def test_both_halves_hold_what_their_models_say(
    request: pytest.FixtureRequest, served: FileServer, tmp_path: Path
) -> None:
    rng = random.Random(5)
    volume = VolumeModel(served.mountpoint / "cache" / "disk", tmp_path / "backing", rng)
    swap = SwapModel(served.path, rng)
    try:
        for _ in range(60):  # the cache alone, then swap as well
            volume.step()
        for _ in range(250):
            swap.step()
            volume.step()
        swap.read_all()
    finally:
        swap.close()
        volume.close()
    core = served.stop()["core"]
    assert core["allocators"] == [
        CLASSES[name] for name in request.node.callspec.params["served"].split(",")
    ]
    assert core["cleancache"]["succ_gets"] > 100
    assert core["zbuds"]["evicted_zpages"] > 100, "swap has evicted nothing"
    assert swap.refusals > 0, "there was always room"
    assert core["frontswap"]["loads"] > 500
    assert (core["cleancache"]["damaged"], core["zbuds"]["failed_evictions"]) == (0, 0)
