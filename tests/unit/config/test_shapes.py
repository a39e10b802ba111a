# SPDX-License-Identifier: GPL-2.0-or-later
"""What differs between two daemons' settings is told by the settings' names,
with values as a config file has them.
"""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from zswapd.config import SETTINGS
from zswapd.config.shapes import differences

SHAPE: dict[str, Any] = {
    "mountpoint": "/run/zswapd/mnt",
    "page_size": 4096,
    "files": {"swap": 2 << 30, "scratch": 512 << 20},
    "allocator": "zsmalloc",
    "max_zspage_frames": 8,
    "control.socket": "/run/zswapd/zswapd.sock",
    "backing": "/dev/vg/swap (encrypted)",
}


@pytest.mark.parametrize(
    ("change", "clauses"),
    [
        (
            {"files": {"swap": 4 << 30, "scratch": 512 << 20}},
            ['swap.size is "2G", the settings say "4G"'],
        ),
        ({"files": {"swap": 2 << 30}}, ['swap.files.scratch is "512M", the settings say nothing']),
        ({"files": {"scratch": 512 << 20}}, ['swap.size is "2G", the settings say nothing']),
        (
            {"files": {**SHAPE["files"], "new": 40960}},
            ['swap.files.new is not set, the settings say "40K"'],
        ),
        (
            {"files": {"swap": (2 << 30) - 1, "scratch": 512 << 20}},
            ['swap.size is "2G", the settings say "2147483647"'],
        ),
        (
            {"files": {"scratch": 512 << 20, "swap": 2 << 30}},
            ["order of swap files is swap, scratch, the settings say scratch, swap"],
        ),
        (
            {"mountpoint": "/mnt/" + 80 * "x"},
            [f'fuse.mountpoint is "/run/zswapd/mnt", the settings say "/mnt/{80 * "x"}"'],
        ),
        ({"max_zspage_frames": 4}, ["pool.max_zspage_frames is 8, the settings say 4"]),
        ({"backing": "/dev/vg/swap"}, ["backing.encrypt is true, the settings say false"]),
        (
            {"backing": "/dev/x (encrypted)"},
            ['backing.path is "/dev/vg/swap", the settings say "/dev/x"'],
        ),
        (
            {"allocator": "zbud", "max_zspage_frames": 4},
            [
                'pool.allocator is "zsmalloc", the settings say "zbud"',
                "pool.max_zspage_frames is 8, the settings say 4",
            ],
        ),
        ({}, []),
    ],
)
def test_differences(change: dict[str, Any], clauses: list[str]) -> None:
    found = differences(SHAPE, {**SHAPE, **change})
    assert found == clauses
    for clause in found:
        assert "{" not in clause
        name = clause.partition(" is ")[0]
        if not name.startswith("order"):
            assert name in SETTINGS or name.startswith("swap.files.")
            ours = clause.rpartition(" say ")[2]
            assert ours == "nothing" or tomllib.loads(f"x = {ours}")


def test_a_setting_that_one_of_them_lacks_is_told() -> None:
    without = {key: value for key, value in SHAPE.items() if key != "backing"}
    assert differences(without, SHAPE) == [
        'backing.path is not set, the settings say "/dev/vg/swap"',
        "backing.encrypt is not set, the settings say true",
    ]
    assert differences(SHAPE, dict(reversed(SHAPE.items()))) == []


@pytest.mark.parametrize("value", [None, 7, "text", [], {"a": "b"}])
@pytest.mark.parametrize("key", sorted(SHAPE))
def test_what_makes_no_sense_is_told_all_the_same(key: str, value: object) -> None:
    assert differences({**SHAPE, key: value}, SHAPE)
    assert differences(SHAPE, {**SHAPE, key: value})
