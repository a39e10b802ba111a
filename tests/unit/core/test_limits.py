# SPDX-License-Identifier: GPL-2.0-or-later
"""The limit of a swap file: it is refused or drained, and the others are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.disk import Disk
from tests.support.strategies import page
from tests.support.successor import make_config, read
from zswapd.config import changed
from zswapd.core.backing.store import make_buffers
from zswapd.core.backing.transfers import Transfers
from zswapd.core.core import Core
from zswapd.core.disk import CoreDisk
from zswapd.core.pam.base import RejectReason
from zswapd.core.sizing import slot_map_sizes, slots_needed

if TYPE_CHECKING:
    from zswapd.config import Config

SIZE = 4096
FILES = ("swap.size=4M", "swap.files.guest=4M", "memory.reserve=4M", "memory.arena=memfd")


def with_settings(config: Config, **settings: object) -> Config:
    new = {f"swap.files.guest.{key}": value for key, value in settings.items()}
    return changed(config, new, source="test")


def write(core: Core, name: str, number: int, kind: str = "noise", seed: int = 0) -> object:
    if core.frames.wants_refill():
        core.frames.refill_now()
    data = memoryview(page(kind, number + 1000 * seed, SIZE))
    return core.devices[name].write(number * SIZE, data)


def test_file_at_its_limit_is_refused_and_others_are_not() -> None:
    config = make_config(*FILES)
    core = Core(config)
    core.apply(with_settings(config, limit="256K"))
    reasons = [write(core, "guest", number) for number in range(100)]
    stored = reasons.count(None)
    assert 60 <= stored <= 64
    assert set(reasons[stored:]) == {RejectReason.POOL_LIMIT_HIT}
    guest = core.devices["guest"].statistics()
    assert guest.object_bytes <= (256 << 10) + SIZE + 32
    assert (guest.limit_bytes, guest.limit_hits) == (256 << 10, 100 - stored)
    assert [write(core, "swap", number) for number in range(100)] == [None] * 100
    assert core.devices["swap"].statistics().limit_hits == 0
    assert core.zv.statistics().pool_limit_hit == 0
    # Another copy of a page takes the place of the older one, so it is not refused.
    assert write(core, "guest", 3, seed=1) is None
    assert read(core, 3, "guest") == page("noise", 1003, SIZE)
    core.devices["guest"].discard(0, 10 * SIZE)
    assert write(core, "guest", 0) is None
    core.check()
    core.close()


def test_limit_below_what_is_stored_keeps_it_and_refuses_more() -> None:
    config = make_config(*FILES)
    core = Core(config)
    for number in range(50):
        assert write(core, "guest", number) is None
    core.apply(with_settings(config, limit="64K"))
    assert write(core, "guest", 60) is RejectReason.POOL_LIMIT_HIT
    assert [read(core, number, "guest") for number in range(50)] == [
        page("noise", number, SIZE) for number in range(50)
    ]
    core.apply(with_settings(config, limit=""))
    assert write(core, "guest", 60) is None
    core.close()


def test_file_has_a_codec_of_its_own() -> None:
    config = make_config(*FILES)
    core = Core(config)
    core.apply(with_settings(config, compressor="zstd"))
    write(core, "guest", 0, "words")
    write(core, "swap", 0, "words")
    codecs = {name: device.state_of(0).codec for name, device in core.devices.items()}  # type: ignore[union-attr]
    assert codecs["guest"] != codecs["swap"]
    assert read(core, 0, "guest") == read(core, 0) == page("words", 0, SIZE)
    core.close()


class Backed:
    """A core with two files and a disk in memory, and its writeback."""

    def __init__(self, *settings: str) -> None:
        self.config = make_config(
            *FILES, "backing.path=/nonexistent/store", "pool.incompressible=store", *settings
        )
        self.disk = Disk(SIZE, slots_needed(self.config))
        buffers = make_buffers(64 * SIZE, SIZE)
        self.transfers = Transfers(self.disk, self.disk.submit, page_size=SIZE, buffers=buffers)
        maps = {
            name: memoryview(bytearray(length))
            for name, length in slot_map_sizes(self.config).items()
        }
        self.core = Core(self.config, backing=CoreDisk(self.transfers, maps))
        assert self.core.writeback
        self.writeback = self.core.writeback

    def fill(self, name: str, count: int, seed: int = 0) -> None:
        for number in range(count):
            assert write(self.core, name, number, seed=seed) is None

    def settle(self, *, looks: bool = True) -> list[str]:
        """Write back until there is no reason left; return the triggers."""
        why: list[str] = []
        for _ in range(50):
            if looks:
                self.writeback.look()
            while reason := self.writeback.wanted():
                begun = self.writeback.step(reason)
                self.transfers.kick()
                self.disk.finish_all()
                why += [reason] * begun
                if not begun and not self.writeback.is_looking:
                    break
        return why

    def pages(self) -> dict[str, int]:
        return {device.name: device.stored_pages for device in self.core.statistics().devices}

    def age(self) -> None:
        """End the present epoch, so that pages may go."""
        self.writeback._next_epoch(0.0)


def test_file_above_its_limit_has_its_own_oldest_pages_written_back() -> None:
    box = Backed()
    box.fill("swap", 100)
    box.fill("guest", 100)
    box.age()
    for number in range(40):
        read(box.core, number, "guest")
    box.core.apply(with_settings(box.config, limit="256K"))
    assert set(box.settle()) == {"file"}
    pages = box.pages()
    assert pages["swap"] == 100
    assert 40 <= pages["guest"] <= 64 * 90 // 100 + 1
    guest = box.core.devices["guest"]
    assert all(guest.state_of(number).state != "disk" for number in range(40))  # type: ignore[union-attr]
    assert guest.state_of(50).state == "disk"  # type: ignore[union-attr]
    statistics = box.core.statistics().writeback
    assert statistics is not None
    assert statistics.by_file == 100 - pages["guest"]
    box.core.check()


def test_full_pool_takes_from_the_file_that_is_above_its_share() -> None:
    box = Backed("pool.limit=1M")  # 256 frames
    box.fill("swap", 60)
    box.fill("guest", 190)
    box.age()
    assert set(box.settle()) == {"limit"}
    assert box.pages()["swap"] == 60


@pytest.mark.parametrize(("weight", "loser"), [(1000, "swap"), (10, "guest")])
def test_weight_is_what_a_file_has_more_of(weight: int, loser: str) -> None:
    box = Backed("pool.limit=1M", f"swap.files.guest.weight={weight}")
    box.fill("swap", 125)
    box.fill("guest", 125)
    box.age()
    assert set(box.settle()) == {"limit"}
    pages = box.pages()
    assert pages[loser] < 125
    assert sum(pages.values()) == 125 + pages[loser]


def test_hot_pages_above_the_share_stay_and_the_next_file_gives() -> None:
    box = Backed("pool.limit=1M")
    box.fill("swap", 60)
    box.fill("guest", 190)
    box.age()
    for number in range(190):
        read(box.core, number, "guest")
    assert set(box.settle(looks=False)) == {"limit"}  # a look would end the epoch
    pages = box.pages()
    assert pages["guest"] == 190
    assert pages["swap"] < 60


def test_file_that_is_never_written_back_keeps_its_pages_and_is_refused() -> None:
    box = Backed("pool.limit=1M", "swap.files.guest.writeback=never")
    box.fill("guest", 200)
    box.fill("swap", 48)
    box.age()
    assert set(box.settle()) <= {"limit"}
    assert box.pages()["guest"] == 200
    assert box.pages()["swap"] < 48
    device = box.core.backed[1]
    ticket = device.begin()
    reasons = {write(box.core, "guest", number) for number in range(200, 300)}
    device.end()
    assert RejectReason.POOL_LIMIT_HIT in reasons
    assert not ticket.left
    # A page that does not compress stays in the pool although the disk would take it.
    assert box.core.statistics().backed[1].bd_count == 0


def test_flood_of_one_file_leaves_the_others_their_hot_pages() -> None:
    """Three files of equal weight: the two that do not flood keep 95 % of their hits."""
    box = Backed("pool.limit=2M", "swap.files.third=4M")  # 512 frames
    hot = {"swap": range(100), "third": range(100)}
    for name, numbers in hot.items():
        box.fill(name, len(numbers))
    guest, refused = box.core.backed[1], 0
    for start in range(0, 6000, 100):
        for number in range(start, start + 100):
            ticket = guest.begin()
            refused += write(box.core, "guest", number % 1024, seed=number // 1024) is not None
            guest.end()
            box.disk.finish_all()
            assert not ticket.left
        for name, numbers in hot.items():
            for number in numbers:
                device = box.core.devices[name]
                state = device.state_of(number)
                assert state is not None
                if state.state != "disk":
                    assert read(box.core, number, name) == page("noise", number, SIZE)
        box.settle()
    assert refused == 0
    seen = {device.name: device for device in box.core.statistics().devices}
    for name, numbers in hot.items():
        assert seen[name].hits >= 0.95 * 60 * len(numbers)
    on_disk = {one.name: one.bd_count for one in box.core.statistics().backed}
    assert on_disk["guest"] > 500
    box.core.check()
