# SPDX-License-Identifier: GPL-2.0-or-later
"""No read of a cache volume is stale, in any order of events.

The events are reads, writes and changes of the backing file. Its device answers in any order.

Time is logical: each page's contents say which version they are. A reader may get any version that
was current at some moment between its question and its answer, and, since looks may be old, none
older than the last look that was over before it asked.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import trio

from tests.support.volumes import PAGE, Box, Device
from zswapd.volumes import file_io as files
from zswapd.volumes.volume import Volume

PAGES = 12
STEPS = 100


class World:
    """The backing file, page by page.

    Attributes:
        versions: of each page, (version, since when, by our logical clock), oldest first.
        looked: by the clock, when what the last finished look saw was current.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = 0
        self.versions: list[list[tuple[int, int]]] = [[(0, 0)] for _ in range(PAGES)]
        self.looked = 0
        path.write_bytes(b"".join(self.contents(page, 0) for page in range(PAGES)))

    @staticmethod
    def contents(page: int, version: int) -> bytes:
        """What a page holds in a version."""
        return (b"page %08d version %08d." % (page, version)).ljust(64, b".") * (PAGE // 64)

    def change(self, page: int) -> bytes:
        """Make a new version current; return its contents. The file is the caller's business."""
        self.clock += 1
        version = self.versions[page][-1][0] + 1
        self.versions[page].append((version, self.clock))
        return self.contents(page, version)

    def oldest_allowed(self, page: int, moment: int) -> int:
        """Return the version that was current at a moment."""
        return max(version for version, since in self.versions[page] if since <= moment)

    def check(self, first: int, data: bytes, asked: int) -> None:
        """Prove that a read that began at `asked` may return this data."""
        assert len(data) % PAGE == 0
        for place in range(len(data) // PAGE):
            page, piece = first + place, data[place * PAGE : (place + 1) * PAGE]
            version = int(piece[22:30])
            assert piece == self.contents(page, version), "torn, or another page's"
            assert version >= self.oldest_allowed(page, asked), (
                f"page {page}: version {version} is stale"
            )


@pytest.mark.parametrize("seed", range(12))
async def test_no_reader_ever_gets_what_was_old_when_it_asked(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    lock = threading.Lock()
    device = Device(monkeypatch)
    world = World(tmp_path / "backing")
    await trio.sleep(files.RACY_NS / 1e9 + 0.002)

    def dawdle() -> None:
        with lock:
            pause = rng.choice((0, 0, 0.001, 0.004))
        time.sleep(pause)

    device.after = dawdle
    box = Box(device)
    async with box.running(depth=3) as volumes, trio.open_nursery() as nursery:
        volume = await volumes.add("disk", str(world.path), "writethrough")
        writing = trio.Lock()

        async def read() -> None:
            first = rng.randrange(PAGES)
            count = rng.randint(1, PAGES - first)
            asked = world.looked
            world.check(first, await volume.read(first * PAGE, count * PAGE), asked)

        async def write() -> None:
            async with writing:  # as the kernel's inode lock
                page = rng.randrange(PAGES)
                await volume.write(page * PAGE, world.change(page))
                world.looked = world.clock

        async def change_underneath() -> None:
            async with writing:  # no other process may write at the same time: docs/cache.md
                page = rng.randrange(PAGES)
                with world.path.open("r+b") as file:
                    file.seek(page * PAGE)
                    file.write(world.change(page))
                now = world.clock
                await look(volume)
                world.looked = max(world.looked, now)

        async def look(volume: Volume) -> None:
            await trio.sleep(files.RACY_NS / 1e9 if rng.random() < 0.3 else 0.001)
            await volume.opened()

        async def evict() -> None:
            for page in range(PAGES):
                if rng.random() < 0.3:
                    box.cache.invalidate_page(volume._pool, volume.inode, page)

        actions = (read, read, read, read, write, change_underneath, evict)
        for _ in range(STEPS):
            nursery.start_soon(rng.choice(actions))
            await trio.sleep(rng.choice((0, 0, 0.001, 0.003)))
