# SPDX-License-Identifier: GPL-2.0-or-later
"""What settings cost is compared with memory before anything is made;
refusals say what would fit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.cgrouptree import MIB, second, write_system
from zswapd.config import Config, load
from zswapd.errors import ArenaError, ConfigError
from zswapd.handover import costs

GIB = 1 << 30


def configured(root: Path, *settings: str) -> Config:
    assignments = [(*setting.split("=", 1), "--set") for setting in settings]
    return load(codecs=["lz4", "zstd"], root=root, assignments=assignments)  # type: ignore[arg-type]


def box(root: Path, total: int, available: int | None = None) -> Path:
    write_system(
        root,
        "0::/",
        mounts=("/ /sys/fs/cgroup 2",),
        total=total,
        available=total if available is None else available,
    )
    return root


@pytest.mark.parametrize(
    ("total", "settings"),
    [
        (24 * GIB, ["swap.size=4T"]),
        (24 * GIB, ["swap.size=16383G"]),
        (2 * GIB, ["swap.size=400G"]),
        (24 * GIB, ["swap.size=1G", "swap.files.a=2T", "swap.files.b=2T"]),
        (24 * GIB, [f"swap.files.f{number}=512G" for number in range(8)]),
        (24 * GIB, ["swap.size=20000%"]),
        (24 * GIB, ["swap.size=2T", "pool.recompress_age=60"]),
        (8 * GIB, ["swap.size=4T", "backing.path=/x"]),
    ],
)
def test_books_that_do_not_fit_memory_are_refused_with_a_size_that_does(
    total: int, settings: list[str], tmp_path: Path
) -> None:
    config = configured(box(tmp_path, total), *settings)
    with pytest.raises(ConfigError) as refused:
        costs.check(config, tmp_path)
    assert "25%" in refused.value.message
    assert "--set" in refused.value.message
    hint = refused.value.hint or ""
    fitting = re.search(r"set swap.size to (\d+[MGT]) or less", hint)
    if fitting is None:
        assert "smaller swap files" in hint
        return
    costs.check(configured(tmp_path, *settings, f"swap.size={fitting[1]}"), tmp_path)


@pytest.mark.parametrize(
    ("total", "settings"),
    [
        (256 * MIB, ["memory.reserve=75%"]),
        (1 * GIB, ["memory.reserve=75%", "swap.size=8G"]),
        (2 * GIB, ["backing.path=/x", "backing.buffers=70%"]),
        (1 * GIB, ["cache.max_volumes=64", "cache.queue_depth=64", "memory.reserve=500M"]),
    ],
)
def test_what_is_locked_at_start_leaves_a_fifth_of_memory(
    total: int, settings: list[str], tmp_path: Path
) -> None:
    config = configured(box(tmp_path, total), *settings)
    with pytest.raises(ConfigError) as refused:
        costs.check(config, tmp_path)
    assert "80%" in refused.value.message
    fitting = re.search(r"set ([\w.]+) to (\d+[MGT]) or less", refused.value.hint or "")
    assert fitting is not None
    costs.check(configured(tmp_path, *settings, f"{fitting[1]}={fitting[2]}"), tmp_path)


def test_box_without_memory_for_a_spare_is_told_so(tmp_path: Path) -> None:
    config = configured(box(tmp_path, 128 * MIB))
    with pytest.raises(ConfigError) as refused:
        costs.check(config, tmp_path)
    assert "set service.spare to false" in (refused.value.hint or "")
    costs.check(configured(tmp_path, "service.spare=false"), tmp_path)
    with pytest.raises(ConfigError) as refused:
        costs.check(configured(box(tmp_path, 64 * MIB)), tmp_path)
    assert "more memory" in (refused.value.hint or "")


def test_what_is_not_available_now_is_refused_as_a_lack_of_memory(tmp_path: Path) -> None:
    config = configured(box(tmp_path, 4 * GIB, available=100 * MIB))
    with pytest.raises(ArenaError, match=r"100\.0 MiB of memory are available"):
        costs.check(config, tmp_path)


def test_what_a_cgroup_leaves_is_what_is_available(tmp_path: Path) -> None:
    box(tmp_path, 4 * GIB)
    second(tmp_path, "/sys/fs/cgroup", GIB, usage=GIB - 100 * MIB)
    with pytest.raises(ArenaError, match=r"100\.0 MiB of memory are available"):
        costs.check(configured(tmp_path), tmp_path)
    second(tmp_path, "/sys/fs/cgroup", 120 * MIB)
    with pytest.raises(ConfigError, match=r"memory\.max"):
        costs.check(configured(tmp_path), tmp_path)


@pytest.mark.parametrize("total", [512 * MIB, 2 * GIB, 24 * GIB, 512 * GIB])
@pytest.mark.parametrize(
    "settings", [[], ["swap.size=400%"], ["pool.limit=100%", "cache.limit=50%"]]
)
def test_ordinary_settings_are_no_matter(total: int, settings: list[str], tmp_path: Path) -> None:
    costs.check(configured(box(tmp_path, total), *settings), tmp_path)


def test_marks_of_recompression_are_not_there_without_it(tmp_path: Path) -> None:
    box(tmp_path, 24 * GIB)
    without = costs.at_start(configured(tmp_path, "swap.size=1T"))
    assert "marks of recompression" not in without
    with_it = costs.at_start(configured(tmp_path, "swap.size=1T", "pool.recompress_age=60"))
    assert with_it["marks of recompression"] == 256 * MIB


def test_switching_recompression_on_needs_memory_for_its_marks(tmp_path: Path) -> None:
    box(tmp_path, 24 * GIB, available=256 * MIB)
    before, after = (
        configured(tmp_path, "swap.size=1T"),
        configured(tmp_path, "swap.size=1T", "pool.recompress_age=60"),
    )
    with pytest.raises(ConfigError, match="recompress_age needs a byte for each page"):
        costs.check_change(before, after, marked=False, root=tmp_path)
    costs.check_change(before, after, marked=True, root=tmp_path)
    costs.check_change(after, after, marked=False, root=tmp_path)
    costs.check_change(before, before, marked=False, root=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["swap.size=100T"], "more than a swap area can have"),
        (["swap.size=17592186040320"], None),
        (["swap.size=99999999999999999999%"], "larger than the largest file"),
        (["swap.size=-5G"], "is negative"),
        (["swap.size=0%"], "is not positive"),
        (["memory.reserve=100G"], "more than 75%"),
        (["memory.reserve=500%"], "more than 75%"),
        (["cache.limit=51%"], "more than 50%"),
        (["pool.limit=101%"], "more than all"),
    ],
)
def test_sizes_that_nothing_can_have_are_refused_by_their_line(
    settings: list[str], message: str | None, tmp_path: Path
) -> None:
    box(tmp_path, 24 * GIB)
    if message is None:
        configured(tmp_path, *settings)
        return
    with pytest.raises(ConfigError, match=message) as refused:
        configured(tmp_path, *settings)
    assert "--set" in refused.value.message


def test_more_swap_files_than_have_numbers_or_names_are_refused(tmp_path: Path) -> None:
    box(tmp_path, 24 * GIB)
    many = [f"swap.files.f{number}=1M" for number in range(32)]
    with pytest.raises(ConfigError, match="33 swap files, 32 are the most"):
        costs.check(configured(tmp_path, *many), tmp_path)
    wordy = [f"swap.files.f{number}{'x' * 60}=1M" for number in range(30)]
    costs.check(configured(tmp_path, *wordy), tmp_path)
    assignments = [(*setting.split("=", 1), "--set") for setting in wordy]
    small = load(codecs=["lz4"], root=tmp_path, page_size=1024, assignments=assignments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="too long together"):
        costs.check(small, tmp_path)
