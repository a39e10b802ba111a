# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters have zcache's names.

Settings as files take what is written, or refuse it with EINVAL: nothing in between.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.snapshots import make, make_snapshot
from zswapd.config import SETTINGS, changed, describe, load
from zswapd.core import compress
from zswapd.core.core import Core
from zswapd.errors import ConfigError
from zswapd.worker.files import SettingFile, add_files

RELOADABLE = sorted(dest for dest, setting in SETTINGS.items() if setting.reloadable)


_ATTRIBUTES = """
    curr_obj_count curr_obj_count_max curr_objnode_count curr_objnode_count_max flush_total
    flobj_total flush_found flobj_found failed_eph_puts failed_pers_puts compress_poor
    mean_compress_poor zbud_curr_raw_pages zbud_curr_zpages zbud_curr_zbytes zbud_cumul_zpages
    zbud_cumul_zbytes zbud_buddied_count zbpg_unused_list_count evicted_raw_pages
    evicted_unbuddied_pages evicted_buddied_pages failed_get_free_pages failed_alloc put_to_flush
    zbud_unbuddied_list_counts zbud_cumul_chunk_counts
    zv_curr_dist_counts zv_cumul_dist_counts
"""
SEED = _ATTRIBUTES.split()
"""zcache_attrs of the source document but for the knobs, in its order."""
FRONTSWAP = ("succ_stores", "failed_stores", "loads", "invalidates")


class Shown:
    """A mount's directory, and what is in it."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def add_directory(self, name: str) -> str:
        return name

    def add_text_file(self, parent: str, name: str, text: object) -> None:
        assert f"{parent}/{name}" not in self.files
        self.files[f"{parent}/{name}"] = text


def shown(core: Core) -> dict[str, Any]:
    """Return the files of a daemon with this core."""
    directory = Shown()
    config = load(codecs=compress.names())
    snapshot = make_snapshot(core)
    add_files(directory, snapshot, lambda *, ages_sampled: snapshot, lambda: config, lambda _: None)  # type: ignore[arg-type]
    return directory.files


@pytest.mark.parametrize("cache", ["", "4M"])
@pytest.mark.parametrize("allocator", ["zsmalloc", "zbud"])
def test_zcaches_counters_are_there_by_their_own_names_whatever_the_settings(
    allocator: str, cache: str
) -> None:
    core = make(pool__allocator=allocator, cache__allocator=allocator, cache__limit=cache)
    files = shown(core)
    for name in (*SEED, *FRONTSWAP):
        numbers = files[f"stats/{name}"].read().decode().strip().split(",")
        assert all(number.isdecimal() for number in numbers), name
    assert "params/zv_page_count_policy_percent" in files
    core.close()


def test_zcaches_counters_count() -> None:
    core = make(cache__allocator="zbud", cache__limit="4M")
    assert core.cache
    volume = core.cache.cleancache.init_fs()
    for number in range(8):
        core.cache.cleancache.put_page(
            volume, 2, number, memoryview(os.urandom(900) + bytes(4096 - 900))
        )
    read = {
        name: file.read().decode().strip()
        for name, file in shown(core).items()
        if name.startswith("stats/")
    }
    statistics = core.statistics()
    assert statistics.cache
    assert (
        read["stats/zbud_curr_raw_pages"]
        == str(statistics.cache.frames)
        == read["stats/zbud_buddied_count"]
        == "4"
    )
    assert read["stats/zbud_curr_zpages"] == read["stats/zbud_cumul_zpages"] == "8"
    assert int(read["stats/zbud_curr_zbytes"]) > 8 * 900
    assert sum(map(int, read["stats/zbud_cumul_chunk_counts"].split(","))) == 8
    assert read["stats/zbpg_unused_list_count"] == str(statistics.frames.free_frames) != "0"
    core.close()


class Settings:
    """The settings of a daemon."""

    def __init__(self) -> None:
        self.config = load(codecs=compress.names())

    def change(self, settings: dict[str, object]) -> None:
        self.config = changed(self.config, settings, source="test")

    def knob(self, dest: str) -> SettingFile:
        return SettingFile(dest, lambda: self.config, self.change)


WRITTEN = st.one_of(
    st.binary(max_size=40),
    st.text(max_size=30).map(str.encode),
    st.sampled_from(
        [
            b"1",
            b"4096\n",
            b"true\n",
            b"lzo\n",
            b"32M",
            b"50%",
            b"min(1G, 10%)",
            b"error",
            b"store\n",
            b"nan",
            b"1e9",
        ]
    ),
)


@given(dest=st.sampled_from(RELOADABLE), data=WRITTEN)
def test_it_is_taken_whole_or_refused_whole(dest: str, data: bytes) -> None:
    settings = Settings()
    before = describe(settings.config)
    knob = settings.knob(dest)
    try:
        knob.write(data)
    except ConfigError:  # EINVAL
        assert describe(settings.config) == before
        return
    after = describe(settings.config)
    for row in (before["pool.limit"], after["pool.limit"]):
        del row["effective"]  # another setting bounds the same memory
    assert {name for name in after if after[name] != before[name]} <= {dest}
    content = knob.read()
    knob.write(content)  # what it says can be written
    assert knob.read() == content


def test_every_setting_can_be_read() -> None:
    settings = Settings()
    settings.config = replace(
        settings.config, swap=replace(settings.config.swap, files={"more": 4096 * 10})
    )
    settings.config = replace(
        settings.config, cache=replace(settings.config.cache, volumes={"disk": "ro:/dev/sda"})
    )
    assert settings.knob("swap.files").read() == b"more 40960\n"
    for dest in SETTINGS:
        assert settings.knob(dest).read().endswith(b"\n")


@pytest.mark.parametrize("data", [b"x" * 4097, b" " * 5000])
def test_a_value_is_no_longer_than_a_page(data: bytes) -> None:
    with pytest.raises(ConfigError):
        Settings().knob("pool.compressor").write(data)
