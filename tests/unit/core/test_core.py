# SPDX-License-Identifier: GPL-2.0-or-later
"""The synchronous core as the daemon builds it.

Settings reach the parts, the self-test finds a broken codec.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.strategies import page
from zswapd.config import changed, load
from zswapd.core import compress, sizing
from zswapd.core import core as core_module
from zswapd.core.pam.zv import BODY_MASK
from zswapd.errors import CorruptedPageError
from zswapd.worker import reports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zswapd.config import Config

MIB = 1 << 20


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:        1048576 kB\n")
    assignments = [
        ("swap.size", "32M", "--size"),
        ("swap.files.more", "8M", "--set"),
        ("memory.reserve", "8M", "--set"),
    ]
    return load(codecs=compress.names(), assignments=assignments, root=tmp_path)


@pytest.fixture
def core(config: Config) -> Iterator[core_module.Core]:
    core = core_module.Core(config)
    yield core
    core.check()
    core.close()


def test_core_has_a_device_for_every_swap_file(core: core_module.Core) -> None:
    assert {name: device.size for name, device in core.devices.items()} == {
        "swap": 32 * MIB,
        "more": 8 * MIB,
    }
    assert next(iter(core.devices)) == "swap"


def test_core_begins_with_its_reserve_populated_and_nothing_stored(core: core_module.Core) -> None:
    seen = core.statistics()
    assert seen.frames.reserve_frames * seen.frames.page_size >= 8 * MIB
    assert seen.arena_backed_bytes >= 8 * MIB
    assert (seen.zv.curr_pages, seen.frames.used_frames) == (0, 0)


def test_settings_reach_the_parts_and_can_change(core: core_module.Core, config: Config) -> None:
    size = config.context.page_size
    wanted = {
        "pool.compressor": "lzo",
        "pool.checksum": False,
        "pool.limit": "4M",
        "pool.incompressible": "refuse",
        "pool.zv_max_zsize": 2000,
        "pool.zv_max_mean_zsize": 1000,
        "pool.zv_page_count_policy_percent": 3,
    }
    core.apply(changed(config, wanted, source="test"))
    zv = core.zv
    assert (zv.compressor.name, zv.checksum, zv.keep_poor) == ("lzo", False, False)
    assert (zv.limit_frames, zv.max_zsize, zv.max_mean_zsize, zv.policy_percent) == (
        4 * MIB // size,
        2000,
        1000,
        3,
    )
    assert core.frames.limit_frames == 4 * MIB // size
    core.apply(config)
    assert (zv.compressor.name, zv.checksum, zv.keep_poor) == ("lz4", True, True)
    assert zv.limit_frames >= 40 * MIB // size


def test_self_test_leaves_nothing_and_counts_nothing(core: core_module.Core) -> None:
    core.self_test()
    seen = core.statistics()
    assert (seen.frames.used_frames, seen.zv.stores, seen.frontswap.succ_stores) == (0, 0, 0)


def test_self_test_refuses_a_codec_that_does_not_give_back_what_it_got(
    core: core_module.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgetful:
        name, codec = "forgetful", 2

        def compress(self, page: memoryview) -> bytes:
            return bytes(page[:100])

        def decompress(self, data: memoryview, page_size: int) -> bytes:
            return bytes(data) + bytes(page_size - len(data))

    monkeypatch.setattr(core_module.compress, "get", lambda _name: Forgetful())
    monkeypatch.setattr(core_module.compress, "by_codec", lambda: {2: Forgetful()})
    with pytest.raises(CorruptedPageError, match="self-test"):
        core.self_test()


@pytest.mark.slow
def test_compaction_in_steps_gives_frames_back_and_keeps_every_page(
    core: core_module.Core, config: Config
) -> None:
    size = config.context.page_size
    device = core.devices["swap"]
    count = device.size // size
    for number in range(count):
        assert device.write(number * size, memoryview(page("words", number, size))) is None
        if core.frames.wants_refill():
            core.frames.refill_now()
    for number in range(count):
        if number % 5:
            device.discard(number * size, size)
    before = core.frames.used_frames
    assert core.wants_compaction()
    moved = 0
    while step := core.compact_step():
        assert step <= core_module.COMPACT_MOVES
        moved += step
    assert moved > 0
    assert core.frames.used_frames < before * 2 // 3
    assert not core.wants_compaction()
    out = memoryview(bytearray(size))
    for number in range(0, count, 5):
        device.read_into(number * size, out)
        assert out == page("words", number, size)


def test_statistics_are_what_json_can_say(core: core_module.Core) -> None:
    told = json.loads(json.dumps(reports.plain(core.statistics())))
    assert told["devices"][1]["name"] == "more"
    assert told["zv"]["curr_dist_counts"][0] == 0
    assert told["frontswap"]["rejects"] == {}
    pool = reports.pool_report(core.statistics(), "lz4")
    assert pool["stored_pages"] == 0
    assert pool["limit_bytes"] > 0


@pytest.mark.parametrize("size", ["64M", "800G", "900G", "4T"])
def test_arena_is_no_larger_than_a_raw_page_can_name_its_place(
    tmp_path: Path, size: str, page_size: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1048576 kB\n")
    assignments = [("swap.size", size, "--size"), ("memory.reserve", "8M", "--set")]
    config = load(
        codecs=compress.names(), assignments=assignments, root=tmp_path, page_size=page_size
    )
    arena = sizing.make_arena(config)
    length = arena.total_frames * page_size
    arena.close()
    assert length <= BODY_MASK + 1
    wanted = sum(config.swap_files().values())
    assert length > min(wanted, 0.99 * (BODY_MASK + 1))
