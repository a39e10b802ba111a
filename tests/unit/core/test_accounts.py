# SPDX-License-Identifier: GPL-2.0-or-later
"""The account of each swap file: bytes in the pool, hits and reads from the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.backed import Files
from tests.support.strategies import page
from tests.support.successor import fill, make_config, read, succeed
from zswapd.core import compress
from zswapd.core.core import Core
from zswapd.core.pam.base import HEADER_BYTES

if TYPE_CHECKING:
    from zswapd.core.block.device import DeviceStatistics

SIZE = 4096


def seen(core: Core) -> dict[str, DeviceStatistics]:
    return {device.name: device for device in core.statistics().devices}


@pytest.fixture
def core() -> Core:
    return Core(make_config("swap.files.more=1M", "memory.arena=memfd"))


def test_each_kind_of_page_is_in_the_account_of_its_file_and_leaves_it(core: Core) -> None:
    kinds = {"zeros": HEADER_BYTES + 8, "noise": HEADER_BYTES + 8 + SIZE}
    for number, (kind, size) in enumerate(kinds.items()):
        before = seen(core)
        core.devices["more"].write(number * SIZE, memoryview(page(kind, 3, SIZE)))
        after = seen(core)
        assert after["more"].object_bytes - before["more"].object_bytes == size
        assert after["swap"].object_bytes == 0
    core.devices["more"].write(0, memoryview(page("noise", 4, SIZE)))  # replaces the zeros
    assert seen(core)["more"].object_bytes == 2 * (HEADER_BYTES + 8 + SIZE)
    core.devices["more"].discard(0, 1 << 20)
    assert seen(core)["more"].object_bytes == 0
    core.check()
    core.close()


def test_accounts_add_up_to_the_pool_and_come_back_at_a_takeover(core: Core) -> None:
    fill(core, 300)
    fill(core, 100, device="more", seed=7)
    for number in range(0, 300, 2):
        core.devices["swap"].discard(number * SIZE, SIZE)
    before, whole = seen(core), core.statistics().zv.curr_object_bytes
    assert sum(device.object_bytes for device in before.values()) == whole
    assert before["more"].object_bytes > 0
    core = succeed(core, make_config("swap.files.more=1M", "memory.arena=memfd"))
    after = seen(core)
    assert {name: device.object_bytes for name, device in after.items()} == {
        name: device.object_bytes for name, device in before.items()
    }
    core.check()
    core.close()


def test_recompressed_page_takes_less_of_its_account(core: Core) -> None:
    fill(core, 64, device="more")
    before = seen(core)["more"].object_bytes
    done = [
        core.devices["more"].recompress(number, compress.get("zstd"), 10) for number in range(64)
    ]
    assert 1 in done
    assert seen(core)["more"].object_bytes < before
    core.check()
    core.close()


def test_hits_are_reads_that_the_pool_answered(core: Core) -> None:
    fill(core, 4, device="more")
    read(core, 0, "more")
    read(core, 200, "more")  # zeros: never written
    device = seen(core)["more"]
    assert (device.pages_read, device.hits, device.disk_reads) == (2, 1, 0)
    assert seen(core)["swap"].hits == 0
    core.close()


def test_a_read_that_waits_for_the_disk_counts_each_page_once() -> None:
    files = Files(64)
    for number in range(8):
        files.write(number * SIZE, page("half", number, SIZE))
    assert files.write_back([5, 6]) == 2
    files.settle()
    number = files.read(0, 8 * SIZE)  # the first attempt meets pages in the pool and on the disk
    files.settle()
    assert isinstance(files.answers[number], bytes)
    device = seen(files.core)["swap"]
    assert (device.hits, device.disk_reads, device.pages_read) == (6, 2, 8)
